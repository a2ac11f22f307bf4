"""Former names and defaults of options, and names that other libraries use, with the names to use instead."""

from ssl_runner.config.rules import format_value

RENAMED = {  # former key -> key, or group
    "dataset.location": "dataset.storage",
    "dataset.val": "dataset.val_fraction",
    "diagnostics.images": "diagnostics.num_images",
    "optimizer.clip": "optimizer.clip_grad_norm",
    "optimizer.final_lr": "optimizer.final_lr_ratio",
    "relation.of": "relation@relation.base",
    "relation.p": "relation.rewire_fraction",
    "solver.name": "solver",
    "views.sizes": "views.resolutions",
    "views_forward": "forward",
    "weights": "init_weights",
}
REMOVED = {"diagnostics.moments": "use evaluators.moments, as experiment=linear_regime does"}
SHARES = {"dataset.test": "dataset.test_fraction"}  # key of some data sets -> the option for a share
VALUES = {("views_forward", "separate"): "per_view"}  # former key and value -> value
CHOICES = {("loss", "simclr_squared"): "spectral"}  # group and former choice -> choice
DEFAULTS = {"compile": False}  # key -> former default

SYNONYMS = {  # last part of a key -> the option of this package
    "augmentation": "views",
    "augmentations": "views",
    "amp": "precision",
    "arch": "backbone",
    "bs": "batch_size",
    "ckpt_path": "resume",
    "clip_lr": "optimizer.trust_clip",
    "cov_loss_weight": "beta",
    "data_dir": "dataset.root",
    "data_path": "dataset.root",
    "embedding_dim": "projector.K",
    "encoder": "backbone",
    "eta": "optimizer.trust_coeff",
    "fp16": "precision",
    "grad_clip": "optimizer.clip_grad_norm",
    "image_size": "dataset.size",
    "img_size": "dataset.size",
    "learning_rate": "optimizer.lr",
    "max_epochs": "epochs",
    "method": "loss",
    "model": "backbone",
    "n_views": "V",
    "num_epochs": "epochs",
    "num_large_crops": "V",
    "num_views": "V",
    "output_dim": "projector.K",
    "output_dir": "hydra.run.dir",
    "proj_hidden_dim": "projector.width",
    "proj_output_dim": "projector.K",
    "random_state": "seed",
    "root": "dataset.root",
    "sim_loss_weight": "gamma",
    "temperature": "tau",
    "transforms": "views",
    "var_loss_weight": "alpha",
    "warmup": "optimizer.warmup_epochs",
    "wd": "optimizer.weight_decay",
}
WITHOUT = {  # key -> why there is no such option
    "num_workers": "the images are in memory, and the views are made on the device; leave it out",
    "scheduler": "the learning rate has a warm-up and a cosine decay; see optimizer.warmup_epochs",
}


def message(key: str, *value: object) -> str | None:
    """Return the error message for a former key, or for a former choice of the group `key`, else None.

    `value` is left out for a key without a value.
    """
    if key in REMOVED:
        return f"{key} was removed: {REMOVED[key]}"
    if key in WITHOUT:
        return f"Unknown option '{key}': {WITHOUT[key]}"
    for given in value:
        if key in SHARES and isinstance(given, float):
            return f"{key}={given}: a share of the images is {SHARES[key]}={given}; use it"
        if isinstance(given, str) and (key, given) in CHOICES:
            return f"{key}={given} was renamed: use {key}={CHOICES[key, given]}"
    if key in RENAMED:
        new = "".join(f"={VALUES.get((key, str(given)), format_value(given))}" for given in value)
        return f"{key} was renamed: use {RENAMED[key]}{new}"
    return None
