"""One run, from its configuration to its files: the stages, top to bottom."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from ssl_runner import distributed, numerics
from ssl_runner.background import Background
from ssl_runner.build import Experiment, baseline_cache, build
from ssl_runner.compiler import compile_solver
from ssl_runner.data.preview import preview
from ssl_runner.degenerate import warnings
from ssl_runner.device import release_freed_memory
from ssl_runner.embedding_map import write_map
from ssl_runner.errors import counted
from ssl_runner.evaluator import Columns, Evaluator, merge
from ssl_runner.facts import description, facts, format_table, headline, notes
from ssl_runner.loggers import Feed
from ssl_runner.preemption import Preemption
from ssl_runner.probe import affordable, evaluate_seeded, feature_networks, label_draws, layer_names
from ssl_runner.profile import profiled
from ssl_runner.progress import progress
from ssl_runner.runs import checkpoint, filenames, resume, saved, weights
from ssl_runner.runs.files import CsvLog
from ssl_runner.runs.other_backbone import option_lines
from ssl_runner.runs.record import RunRecord, names
from ssl_runner.runs.schedule import identity, read_schedule, remove_outdated
from ssl_runner.solver import Save, Solver
from ssl_runner.theory.gamma import describe_gamma


def run(
    cfg: DictConfig,
    folder: Path,
    at_begin: Callable[[], None] | None = None,
    abandon: Callable[[], None] | None = None,
) -> dict[str, float | None]:
    """Pretrain, probe, and write the files of the run to `folder`.

    These are metrics.csv, probe.csv, spectrum.csv, run.json, checkpoint.pt, the weights in
    backbone.safetensors and projector.safetensors, and the map of the embedding. Resumes from the checkpoint
    in `folder` if there is one. Every rank calls this; the main process writes. It calls `at_begin` when all
    checks have passed and training begins, and `abandon` if a new run ends before.

    Returns the last `loss` and the first probe's top-1 on the test split (`top1`) and on the validation split
    (`val_top1`). Without test images, `top1` is `val_top1`; without labels, both are None.

    Raises UsageError for a run that cannot work and Preempted after a signal; run.json records every
    exception of a run that has begun.
    """
    is_main = distributed.is_main_process()
    schedule = distributed.broadcast_object(read_schedule(folder, cfg.epochs) if is_main else None)
    record = RunRecord(folder, identity(cfg, schedule), abandon, schedule=schedule, **names(cfg))
    with (
        Preemption() as preemption,
        Feed() as feed,  # after the record: a slow logger does not delay its status
        record,
        distributed.propagate_failures(record.fail),
        numerics.preserved(),
        Background() as background,
        checkpoint.Writer(folder, background) as writer,
    ):
        resume_from = distributed.broadcast_object(checkpoint.find(folder) if is_main else None)
        experiment = build(cfg, init_weights=resume_from is None)
        if resume_from is not None:
            data = experiment.data
            resume.refuse_other_images(cfg, folder, record.content, data.digest, data.counts)
            if is_main:
                remove_outdated(folder)
        metrics, probes = (
            CsvLog(folder / f"{name}.csv" if is_main else None, feed.listener(name))
            for name in ("metrics", "probe")
        )
        evaluators: list[Evaluator] = []
        solver = experiment.solver(preemption, partial(save, evaluators, writer, background), schedule)
        evaluators += experiment.evaluators(folder, probes)
        if resume_from is not None:  # last, since it restores the random states
            restore(resume_from, solver, evaluators)
        metrics.truncate_after(solver.epoch)
        probes.truncate_after(solver.epoch)
        # final rows carry the epoch of the kept weights with probe.keep=best, so truncate_after keeps them
        probes.truncate_at_repeat(("epoch", "features", "probe", "eval_split"))
        record.update(**facts(experiment))
        options: list[str] = []
        if is_main:
            options = option_lines(cfg.backbone)  # reads a file that may change during training
            if at_begin is not None:
                at_begin()
            begin(experiment, solver, record, feed, folder)
        before = record.content.get("compile")
        record.update(compile=compile_solver(cfg.compile, solver, experiment.loader, before))
        train(experiment, solver, evaluators, metrics, background, folder)
        for evaluator in evaluators:
            record.update(**(evaluator.finish(experiment.model) or {}))
        result = finish(experiment, solver, probes, record, folder, options)
        record.update(**result)
        if cfg.embedding.method != "none":
            network = networks(experiment)[solver.result_features]()
            write_map(network, experiment.data, folder, **cfg.embedding, seed=cfg.dataset.split_seed)
    return result


def save(
    evaluators: Sequence[Evaluator],
    writer: checkpoint.Writer,
    background: Background,
    state: dict[str, Any],
    how: Save,
) -> None:
    """Write the state of a solver and the evaluators as a checkpoint. Only the main process does."""
    if not distributed.is_main_process():
        return
    state |= {"evaluators": [evaluator.state_dict() for evaluator in evaluators]}
    slow = any(evaluator.due(state["epoch"] + 1) for evaluator in evaluators if not evaluator.quick)
    (writer.hold if how is Save.HOLD and not slow else writer.write)(state)
    if how is Save.WAIT:
        background.wait()


def begin(experiment: Experiment, solver: Solver, record: RunRecord, feed: Feed, folder: Path) -> None:
    """Print the first lines, start the logger, and draw the preview of the views, in the main process."""
    cfg = experiment.cfg
    record.begin()
    print("\n".join(first_lines(experiment, solver, record)), flush=True)
    if experiment.logger is not None:
        ids = record.content.get("loggers", {})
        record.update(loggers=feed.start(experiment.logger, folder, cfg, ids))
    if cfg.views.preview:
        preview(experiment.loader, folder / "views.png", f"views={saved.choices(folder).views}")


def train(
    experiment: Experiment,
    solver: Solver,
    evaluators: Sequence[Evaluator],
    metrics: CsvLog,
    background: Background,
    folder: Path,
) -> None:
    """Run the solver to its last epoch. The background appends one row per epoch to `metrics`."""
    epochs = solver.epochs()
    if experiment.cfg.profile and distributed.is_main_process():
        epochs = profiled(epochs, experiment.loader, folder, experiment.device)
    for row in epochs:
        start = time.perf_counter()
        last = solver.epoch == solver.total_epochs
        columns = [evaluator(experiment.model, solver.epoch, last=last) for evaluator in evaluators]
        for evaluator in evaluators:
            solver.shown = {**solver.shown, **evaluator.shown}
        row = with_evaluators_time(row, time.perf_counter() - start)
        # a checkpoint of a later step is written after the row
        background.submit(partial(append, metrics, row, columns))
    background.wait()


def finish(
    experiment: Experiment,
    solver: Solver,
    probes: CsvLog,
    record: RunRecord,
    folder: Path,
    options: list[str],
) -> dict[str, float | None]:
    """Export the weights, with the `options` that select the backbone, and run the final probes.

    Returns the result of the run.
    """
    cfg, data, model = experiment.cfg, experiment.data, experiment.model
    is_main = distributed.is_main_process()
    if is_main:
        header = description(experiment) | {"options": options}
        weights.export(model.backbone, folder / filenames.BACKBONE, header)
        weights.export(model.projector, folder / filenames.PROJECTOR, header)
    scores = probe(experiment, solver, probes, record.content.get("exported_epoch", solver.epoch))
    if is_main and scores:
        print(format_table(scores, "test" if len(data.test) else "val"), flush=True)
    val, test = (
        scores.get((solver.result_features, cfg.probe.probes[0], split)) for split in ("val", "test")
    )
    return {"loss": solver.last_row["loss"], "top1": val if test is None else test, "val_top1": val}


def restore(path: Path, solver: Solver, evaluators: Sequence[Evaluator]) -> None:
    """Load a checkpoint. Raises UsageError if it is not one of these parts."""
    state = checkpoint.load(path)
    with checkpoint.restoring(path):
        for evaluator, of_evaluator in zip(evaluators, state.pop("evaluators"), strict=True):
            evaluator.load_state_dict(of_evaluator)
        solver.load_state_dict(state)


def first_lines(experiment: Experiment, solver: Solver, record: RunRecord) -> list[str]:
    """The lines that are printed before training."""
    cfg, data = experiment.cfg, experiment.data
    lines = [experiment.initial_weights, headline(cfg, record), *notes(data, cfg.probe.features)]
    if solver.epochs_done:
        lines.append(f"resumed after {solver.epochs_done} of {counted(solver.total_epochs, 'epoch')}")
    if experiment.solver_class.trains:
        lines += warnings(cfg, experiment.loss, experiment.relation, data, experiment.model.K)
    lines += [*solver.warnings(), describe_gamma(record.content["gamma_limits"])]
    return [line for line in lines if line]


def with_evaluators_time(row: Columns, seconds: float) -> Columns:
    """Add the seconds of the evaluators to a row.

    Where the row has the seconds of training as seconds_*, images_per_s becomes the images of the epoch over
    all seconds of the epoch.
    """
    training = sum(value for name, value in row.items() if name.startswith("seconds_"))
    row = row | {"seconds_evaluators": round(seconds, 4)}
    if training:
        row["images_per_s"] = round(row["images_seen"] / row["epoch"] / (training + seconds), 1)
    return row


def append(log: CsvLog, row: Columns, columns: Sequence[Columns | Callable[[], Columns]]) -> None:
    """Append a row with the columns of the evaluators, some of which are computed here."""
    for values in columns:
        row = merge(row, values() if callable(values) else values)
    log.append(row)


def networks(experiment: Experiment) -> dict[str, Callable[[], nn.Module]]:
    """The networks whose outputs can be probed, by the name of the features, built on demand."""
    return feature_networks(
        experiment.data, experiment.model, experiment.fresh_backbone, experiment.cfg.probe.layer
    )


def probe(
    experiment: Experiment, solver: Solver, log: CsvLog, epoch: int
) -> dict[tuple[str, str, str], float]:
    """Run the final probes, and score the test split, once. Appends their rows to `log`.

    `epoch` is that of the weights.

    Returns the top-1 accuracies on all labels by features, probe and split. Without labels there are none.
    """
    cfg, data = experiment.cfg, experiment.data
    if not data.classes:
        return {}
    names = [solver.result_features, *cfg.probe.features, *layer_names(cfg.probe.layer)]
    chosen, _ = affordable(names, data)
    draws = [None, *label_draws(data.train.y, cfg.probe.labels, cfg.probe.draws, cfg.dataset.split_seed)]
    builders, seed = networks(experiment), cfg.dataset.split_seed
    cache = baseline_cache(cfg, data, draws, experiment.numerics, experiment.model.K)
    scores: dict[tuple[str, str, str], float] = {}
    for features in progress(chosen, "probe", hidden=not distributed.is_main_process()):
        release_freed_memory()  # of the training, or of other features
        compute = partial(
            evaluate_seeded, features, builders[features], data, experiment.classifiers, draws, seed
        )
        for row in cache.rows(features, compute):
            log.append({"epoch": epoch, **row})
            if "draw" not in row:
                scores[features, row["probe"], row["eval_split"]] = row["top1"]
    return scores
