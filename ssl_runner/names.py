"""Names that settings accept. Imports nothing, since the command line checks them before importing torch."""

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
COMPILE = ("auto", "graphs")  # and true, false
FORWARD = ("joint", "per_view")
KEEP = ("last", "best")
STORAGE = ("auto", "device", "host")
VARIANCES = ("hinge", "squared")
REDUCTIONS = ("mean", "sum")
DENOMINATORS = ("all", "negatives")
STEMS = ("auto", "cifar", "pool", "imagenet")
MAPS = ("pca", "tsne", "umap", "none")
FEATURES = ("backbone", "projector", "random_init", "pixels", "pca", "lda")
EVALUATION = ("eval_resize", "eval_crop")  # dataset.*: the evaluation transform
ON_ERROR = ("refuse", "skip")  # dataset.on_error
