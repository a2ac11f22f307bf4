"""Pretraining by gradient steps: X -> model -> Z -> loss(Z, G) -> backward -> optimizer step."""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from ssl_runner import distributed
from ssl_runner.batch import Batch
from ssl_runner.data.loader import MultiViewLoader
from ssl_runner.device import AUTOCAST_DTYPES
from ssl_runner.errors import UsageError
from ssl_runner.loss import Loss
from ssl_runner.model import SSLModel
from ssl_runner.preemption import Preempted, Preemption
from ssl_runner.relation.builders import RelationBuilder
from ssl_runner.solver import Solver
from ssl_runner.views import IMAGE_FORMAT, ViewFormat

SAVE_INTERVAL = 600.0  # seconds between checkpoints within an epoch
SAVE, STOP = 1, 2  # what a rank may request after a step; the largest request over all ranks is executed

ADVICE = "lower optimizer.lr, set optimizer.clip_grad_norm or use precision=fp32"


class Diverged(RuntimeError):
    """The loss or the weights are no longer finite."""


class Pretraining(Solver):
    """Gradient descent on the model and the loss's own parameters, if it has any.

    A checkpoint can be taken after any step and holds everything an exact resume needs: weights, optimizer,
    gradient scaler, data order, random states, counters, and the sums of the epoch's row. `save` is called
    with it at the end of every epoch, before the epoch's row is yielded; every ten minutes; and when
    `preemption` requests a stop, after which Preempted is raised.

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
        save: Callable[[dict[str, Any]], None] = lambda state: None,
    ):
        self.model, self.loss, self.loader, self.relation = model, loss, loader, relation
        self.optimizer, self.learning_rate, self.clip_grad_norm = optimizer, learning_rate, clip_grad_norm
        self.preemption, self.save = preemption or Preemption(), save
        self.total_epochs, self.device = loader.epochs, loader.device
        self.network = distributed.data_parallel(model)
        self.sharded = distributed.world_size() == 1 or (loss.supports_sharding and relation.shardable)
        self.requests = distributed.AsyncMax()
        self.dtype = AUTOCAST_DTYPES[precision]
        self.view_format = IMAGE_FORMAT
        if self.device.type != "cpu":  # as the network reads them; the kernels of a CPU write float32
            self.view_format = ViewFormat(None, self.dtype or torch.float32, model.memory_format)
        self.computed_on = f"{self.device.type} in {precision}"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.forwards = loader.V if per_view else 1
        self.epoch = self.step = 0
        self.seconds = self.seconds_before = 0.0  # of training: in total, and in finished epochs
        self.sums: dict[str, Tensor] = {}  # of the loss and its terms over this epoch's steps
        self.last_row: dict[str, Any] = {}
        if distributed.rank():
            torch.manual_seed(loader.seed + distributed.rank())  # decorrelate dropout masks across ranks

    def epochs(self) -> Iterator[dict[str, Any]]:
        """Train the remaining epochs.

        Yields after each: epoch, step, images_seen, seconds, images_per_s, lr, loss and the terms of the loss
        (the last two as means over the epoch's steps). Raises Diverged if a term or a weight is not finite.
        """
        with tqdm(
            total=self.total_epochs * self.loader.steps_per_epoch * self.loader.batch_size,
            initial=self.step * self.loader.batch_size,
            desc="pretrain",
            unit="images",
            unit_scale=True,
            disable=None if distributed.is_main_process() else True,
        ) as bar:
            while self.epoch < self.total_epochs:
                yield self._epoch(bar)

    def compile(self) -> None:
        self.network.compile(dynamic=False)

    def _epoch(self, bar: tqdm) -> dict[str, Any]:
        with self.preemption.deferred():
            stopped = self._steps(bar)
            if not nn.utils.get_total_norm(self.parameters()).isfinite():
                raise Diverged(
                    f"the weights are not finite after step {self.step - 1}, but the loss was; {ADVICE}"
                )
            self._save()
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
            "images_per_s": round(images / (self.seconds - self.seconds_before), 1),
            "lr": self.learning_rate(self.step - 1),
            **means,
        }
        self.sums, self.seconds_before = {}, self.seconds
        return self.last_row

    def _steps(self, bar: tqdm) -> bool:
        """Run the remaining steps of this epoch. Returns True if a stop was requested after one of them."""
        start = saved = time.perf_counter()
        self.model.train()
        guard = NonFiniteGuard(self.device)
        first = self.step - self.epoch * self.loader.steps_per_epoch
        for X, batch in self.loader.batches(
            self.epoch, first, whole_batch=not self.sharded, view_format=self.view_format
        ):
            values = self._step(X, batch, guard)
            self.sums = {name: value + self.sums.get(name, 0) for name, value in values.items()}
            self.step += 1
            bar.set_postfix(guard.latest, refresh=False)
            bar.update(self.loader.batch_size)
            save_is_due = time.perf_counter() - saved > SAVE_INTERVAL
            request = self.requests(STOP if self.preemption.received else SAVE if save_is_due else 0)
            if request:
                guard.finish()
                self.seconds += time.perf_counter() - start
                if request == STOP:
                    return True
                self._save()
                start = saved = time.perf_counter()
        guard.finish()
        self.seconds += time.perf_counter() - start
        return False

    def _step(self, X: Tensor, batch: Batch, guard: "NonFiniteGuard") -> dict[str, Tensor]:
        """One step on X (V n, C, h, w). Returns the loss and its terms, scalars on the device.

        There is no host-device sync, except by fp16's scaler with an optimizer that is not fused.
        """
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            views = [x.contiguous(memory_format=self.model.memory_format) for x in X.chunk(self.forwards)]
            Z = torch.cat([self.network(x) for x in views])
        terms = self._terms(Z, batch) if self.sharded else self._gathered_terms(Z, batch)
        loss = self.loss.total(terms)
        values = {name: value.detach() for name, value in {"loss": loss, **terms}.items()}
        guard.put(self.step, values)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters(), self.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return values

    def _terms(self, Z: Tensor, batch: Batch) -> dict[str, Tensor]:
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

    def _save(self) -> None:
        self.save(self.state_dict())
        distributed.broadcast_object(None)  # no rank continues or exits before the checkpoint is on disk

    def parameters(self) -> list[Tensor]:
        """All parameters that the optimizer updates."""
        return list(itertools.chain.from_iterable(group["params"] for group in self.optimizer.param_groups))

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "seconds_before": self.seconds_before,
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
        for name in ("epoch", "step", "seconds", "seconds_before"):
            setattr(self, name, state[name])
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


class NonFiniteGuard:
    """Stops a run whose loss is not finite, without a host-device sync.

    On CUDA a step's terms are copied to the host asynchronously and checked when they have arrived, one or
    two steps later. Elsewhere they are checked at once, before the weights are updated.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.pending: deque[tuple[int, list[str], Tensor, torch.cuda.Event | None]] = deque()
        self.latest: dict[str, str] = {}  # for the progress bar

    def put(self, step: int, values: dict[str, Tensor]) -> None:
        """Check the loss and terms of a step, now or later. Raises Diverged."""
        stacked = torch.stack(list(values.values()))
        event = None
        if self.device.type == "cuda":
            host = torch.empty(len(values), dtype=stacked.dtype, pin_memory=True)
            stacked = host.copy_(stacked, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        self.pending.append((step, list(values), stacked, event))
        self._check(wait=False)

    def finish(self) -> None:
        """Wait for pending copies and check them. Raises Diverged."""
        self._check(wait=True)

    def _check(self, wait: bool) -> None:
        while self.pending:
            step, names, values, event = self.pending[0]
            if event is not None and wait:
                event.synchronize()
            if event is not None and not event.query():
                return
            self.pending.popleft()
            numbers = dict(zip(names, values.tolist(), strict=True))
            broken = {name: value for name, value in numbers.items() if not math.isfinite(value)}
            if broken:
                terms = ", ".join(
                    f"{name}={value}" for name, value in broken.items() if name != "loss" or len(broken) == 1
                )
                raise Diverged(f"the loss is not finite at step {step}: {terms}; {ADVICE}")
            self.latest = {"loss": f"{numbers['loss']:.4g}"}
