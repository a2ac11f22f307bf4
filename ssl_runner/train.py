"""Pretraining by gradient steps: X -> model -> Z -> loss(Z, G) -> backward -> optimizer step."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from ssl_runner import distributed, numerics, step_graph
from ssl_runner.batch import Batch, ViewTensors, per_size
from ssl_runner.data.loader import MultiViewLoader
from ssl_runner.device import AUTOCAST_DTYPES
from ssl_runner.errors import UsageError
from ssl_runner.guard import ADVICE, Diverged, NonFiniteGuard
from ssl_runner.loss import Loss
from ssl_runner.model import SSLModel
from ssl_runner.preemption import Preempted, Preemption
from ssl_runner.progress import image_progress
from ssl_runner.relation.builders import RelationBuilder
from ssl_runner.solver import Save, Solver
from ssl_runner.step_graph import Capture, StepGraph
from ssl_runner.timer import IteratorTimer
from ssl_runner.views import IMAGE_FORMAT, Augment, ViewFormat

SAVE_INTERVAL = 60.0  # seconds between checkpoints
SAVE, STOP = 1, 2  # what a rank may request after a step; the largest request over all ranks is executed


class Pretraining(Solver):
    """Gradient descent on the model and the loss's own parameters, if it has any.

    A checkpoint can be taken after any step and holds everything an exact resume needs: weights, optimizer,
    gradient scaler, data order, random states, counters, and the sums of the epoch's row. `save` is called
    with it every SAVE_INTERVAL, after the last epoch, and when `preemption` requests a stop, after which
    Preempted is raised. At the end of every other epoch it is called with Save.HOLD. Both precede the row of
    the epoch: a run that resumes from the end of an epoch yields its row again.

    With several ranks each holds an equal part of every batch and the same weights. The loss is that of the
    whole batch.
    """

    trains = True

    def __init__(
        self,
        model: SSLModel,
        loss: Loss,
        loader: MultiViewLoader,
        relation: RelationBuilder,
        *,
        optimizer: Optimizer,
        learning_rate: Callable[[int], float],
        precision: str,
        clip_grad_norm: float | None = None,
        per_view: bool = False,
        preemption: Preemption | None = None,
        save: Callable[[dict[str, Any], Save], None] = lambda state, how: None,
    ):
        self.model, self.loss, self.loader, self.relation = model, loss, loader, relation
        self.optimizer, self.learning_rate, self.clip_grad_norm = optimizer, learning_rate, clip_grad_norm
        self.preemption, self.save = preemption or Preemption(), save
        self.total_epochs, self.device = loader.epochs, loader.device
        self.network = distributed.data_parallel(model)
        self.sharded = distributed.world_size() == 1 or (loss.supports_sharding and relation.shardable)
        self.requests = distributed.AsyncMax()
        self.dtype = AUTOCAST_DTYPES[precision]
        self.loss_products = numerics.fp32_products if precision == "tf32" else nullcontext
        self.view_format = IMAGE_FORMAT
        if self.device.type != "cpu":  # as the network reads them; the kernels of a CPU write float32
            self.view_format = ViewFormat(None, self.dtype or torch.float32, model.memory_format)
        self.computed_on = f"{self.device.type} in {precision}"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.per_view = per_view
        self.epoch = self.step = 0
        self.gradients: Callable[[ViewTensors, Batch], dict[str, Tensor]] = self._gradients
        self.seconds, self.saved = 0.0, time.perf_counter()  # of views and steps; time of the last checkpoint
        self.times = dict.fromkeys(("views", "step", "checkpoint"), 0.0)  # seconds in this epoch
        self.sums: dict[str, Tensor] = {}  # of the loss and its terms over this epoch's steps
        self.last_row: dict[str, Any] = {}
        if distributed.rank():
            torch.manual_seed(loader.seed + distributed.rank())  # decorrelate dropout masks across ranks

    @property
    def epochs_done(self) -> int:
        return self.step // self.loader.steps_per_epoch

    def epochs(self) -> Iterator[dict[str, Any]]:
        """Train the remaining epochs.

        Yields after each: epoch, step, images_seen, seconds (of views and steps in all epochs), images_per_s,
        seconds of this epoch's views, steps and checkpoints, lr, loss and the terms of the loss (the last two
        as means over the epoch's steps). Raises Diverged if a term or a weight is not finite.
        """
        self.saved = time.perf_counter()
        size = self.loader.batch_size
        total = self.total_epochs * self.loader.steps_per_epoch * size
        hidden = not distributed.is_main_process()
        with image_progress("pretrain", total, self.step * size, hidden) as bar:
            while self.epoch < self.total_epochs:
                yield self._epoch(bar)

    def compile(self, graphs: bool = False) -> str | None:
        self.network.compile(dynamic=False)
        if isinstance(self.loader.augment, Augment):  # a user's views need no `compile`
            self.loader.augment.compile()
        if not graphs:
            return None
        parts = {"loss": self.loss, "relation": self.relation}
        if reason := step_graph.why_not(self.device, distributed.world_size(), **parts):
            return reason
        self.gradients = StepGraph(self._gradients, self.parameters(), Capture(self.device))
        return None

    def _epoch(self, bar: tqdm) -> dict[str, Any]:
        with self.preemption.deferred():
            stopped = self._steps(bar)
            if not nn.utils.get_total_norm(self.parameters()).isfinite():
                raise Diverged(
                    f"the weights are not finite after step {self.step - 1}, but the loss was; {ADVICE}"
                )
            # a signal since the last step; the ranks agree
            stopped = stopped or any(distributed.all_gather_object(self.preemption.received is not None))
            last = self.epoch + 1 == self.total_epochs
            write = last or self._save_is_due()
            self._save(Save.WAIT if stopped else Save.WRITE if write else Save.HOLD)
            if stopped:
                raise Preempted(f"preempted after step {self.step}; the run can be resumed")
        steps, images = self.loader.steps_per_epoch, self.loader.steps_per_epoch * self.loader.batch_size
        means = dict(zip(self.sums, (torch.stack(list(self.sums.values())) / steps).tolist(), strict=True))
        self.epoch += 1
        self.last_row = {
            "epoch": self.epoch,
            "step": self.step,
            "images_seen": self.step * self.loader.batch_size,
            "seconds": round(self.seconds, 3),
            "images_per_s": round(images / sum(self.times.values()), 1),
            **{f"seconds_{part}": round(seconds, 4) for part, seconds in self.times.items()},
            "lr": self.learning_rate(self.step - 1),
            **means,
        }
        self.sums, self.times = {}, dict.fromkeys(self.times, 0.0)
        return self.last_row

    def _steps(self, bar: tqdm) -> bool:
        """Run the remaining steps of this epoch. Returns True if a stop was requested after one of them."""
        start = time.perf_counter()
        self.model.train()
        guard, timer = NonFiniteGuard(), IteratorTimer(self.device)
        bar.set_description_str(f"pretrain, epoch {self.epoch + 1} of {self.total_epochs}", refresh=False)
        first = self.step - self.epoch * self.loader.steps_per_epoch
        batches = self.loader.batches(
            self.epoch, first, whole_batch=not self.sharded, view_format=self.view_format
        )
        for X, batch in timer(batches):
            values = self._step(X, batch, guard)
            self.sums = {name: value + self.sums.get(name, 0) for name, value in values.items()}
            self.step += 1
            bar.set_postfix({**guard.latest, **self.shown}, refresh=False)
            bar.update(self.loader.batch_size)
            request = self.requests(STOP if self.preemption.received else SAVE if self._save_is_due() else 0)
            if request:
                guard.finish()
                self._count(time.perf_counter() - start, timer)
                if request == STOP:
                    return True
                self._save(Save.WRITE)
                start = time.perf_counter()
        guard.finish()
        self._count(time.perf_counter() - start, timer)
        return False

    def _count(self, seconds: float, timer: IteratorTimer) -> None:
        """Add seconds of this epoch. Those in the loader's iterator are of views, the others of steps."""
        views = timer.seconds()
        self.seconds += seconds
        self.times["views"] += views
        self.times["step"] += seconds - views

    def _step(self, X: ViewTensors, batch: Batch, guard: NonFiniteGuard) -> dict[str, Tensor]:
        """One step on X. Returns the loss and its terms, scalars on the device.

        There is no host-device sync, except by fp16's scaler with an optimizer that is not fused.
        """
        values = self.gradients(X, batch)
        guard.put(self.step, values)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        if self.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters(), self.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return values

    def _gradients(self, X: ViewTensors, batch: Batch) -> dict[str, Tensor]:
        """Set the gradients of a step. Returns the loss and its terms."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            passes = per_size(X)
            if self.per_view:
                n = sum(map(len, passes)) // self.loader.V
                passes = [view for x in passes for view in x.split(n)]
            views = [x.contiguous(memory_format=self.model.memory_format) for x in passes]
            Z = torch.cat([self.network(x) for x in views])
        terms = self._terms(Z, batch) if self.sharded else self._gathered_terms(Z, batch)
        loss = self.loss.total(terms)
        self.scaler.scale(loss).backward()
        return {name: value.detach() for name, value in {"loss": loss, **terms}.items()}

    def _terms(self, Z: Tensor, batch: Batch) -> dict[str, Tensor]:
        with self.loss_products():
            G = self.relation(batch, Z.detach())
            if G.support is not None:
                Z = torch.cat([Z, G.support.to(Z.dtype)])
            return self.loss.terms(Z, G)

    def _gathered_terms(self, Z: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The terms of a loss or relation that cannot be sharded: every rank computes them from all rows."""
        shards = distributed.all_gather_replicated(Z.float()).unflatten(
            0, (distributed.world_size(), batch.V, -1)
        )
        whole = shards.transpose(0, 1).flatten(0, 2)  # view-major over the images of all ranks
        devices = [self.device] if self.device.type == "cuda" else []
        with distributed.local_only(), torch.random.fork_rng(devices):
            torch.manual_seed(self.loader.seed + self.step)  # a loss draws the same numbers on all ranks
            return self._terms(whole, batch)

    def _save_is_due(self) -> bool:
        """Whether the last checkpoint is SAVE_INTERVAL old. If so, the interval starts again.

        Only the main process decides: a rank with another clock would request a second checkpoint.
        """
        now = time.perf_counter()
        due = distributed.is_main_process() and now - self.saved > SAVE_INTERVAL
        if due:
            self.saved = now
        return due

    def _save(self, how: Save) -> None:
        start = time.perf_counter()
        self.save(self.state_dict(), how)
        if how is Save.WAIT:
            distributed.broadcast_object(None)  # no rank exits before the checkpoint is on disk
        self.times["checkpoint"] += time.perf_counter() - start

    def parameters(self) -> list[Tensor]:
        """All parameters that the optimizer updates."""
        return list(itertools.chain.from_iterable(group["params"] for group in self.optimizer.param_groups))

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "times": self.times,
            "sums": self.sums,
            "backbone": self.model.backbone.state_dict(),
            "projector": self.model.projector.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "relation": self.relation.state_dict(),
            "rng": distributed.all_gather_object(self._random_states()),
            "computed_on": self.computed_on,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["computed_on"] != self.computed_on:
            raise UsageError(
                f"resume: the checkpoint was computed on {state['computed_on']}, this process computes on"
                f" {self.computed_on}; results would differ: resume where it began, or start a new run"
            )
        for name in ("epoch", "step", "seconds"):
            setattr(self, name, state[name])
        self.times |= state.get("times") or {"step": self.seconds - state["seconds_before"]}  # older runs
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.model.backbone.load_state_dict(state["backbone"])
        self.model.projector.load_state_dict(state["projector"])
        for name in ("loss", "optimizer", "scaler", "loader", "relation"):
            getattr(self, name).load_state_dict(state[name])
        if distributed.rank() < len(state["rng"]):  # additional ranks keep their own state
            host, device = state["rng"][distributed.rank()]
            torch.set_rng_state(host)
            if device is not None:
                torch.get_device_module(self.device).set_rng_state(device)

    def _random_states(self) -> tuple[Tensor, Tensor | None]:
        """States of this rank's global generators, of the host and of the device."""
        device = None if self.device.type == "cpu" else torch.get_device_module(self.device).get_rng_state()
        return torch.get_rng_state(), device
