"""Pretraining: batch -> views -> X -> backbone -> projector -> Z -> loss(Z, G) -> step, one metrics row an epoch."""

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

from ssl_runner.dataset import DataSet
from ssl_runner.errors import Refused
from ssl_runner.loss import Loss
from ssl_runner.relate import Batch, BatchRelation
from ssl_runner.views import Augment

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


ADVICE = "lower optimizer.lr, set optimizer.clip or use precision=fp32"


class Diverged(RuntimeError):
    """The loss is not finite any more."""


class Pretraining:
    """The state of one pretraining run and its loop.

    `epochs()` yields a metrics row after every epoch; `state_dict()` then holds all that going on exactly needs: weights,
    optimiser, gradient scaler, the random states (of the data order, of the views, and the global ones) and the counters.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        learning_rate: Callable[[int], float],
        data: DataSet,
        augment: Augment,
        relation: BatchRelation,
        *,
        V: int,
        epochs: int,
        batch_size: int,
        precision: str,
        clip: float | None,
        channels_last: bool,
        separate: bool,
        seed: int,
    ):
        self.backbone, self.projector, self.loss, self.optimizer = backbone, projector, loss, optimizer
        self.learning_rate, self.data, self.augment, self.relation = learning_rate, data, augment, relation
        self.V, self.total_epochs, self.batch_size, self.clip = V, epochs, batch_size, clip
        self.device = data.mean.device
        self.dtype = PRECISIONS[precision]
        self.computed = f"{self.device.type} in {precision}"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.chunks = V if separate else 1
        self.order_generator = torch.Generator().manual_seed(seed)
        self.view_generator = torch.Generator(self.device).manual_seed(seed)
        self.steps_per_epoch = len(data.pretrain) // batch_size
        self.epoch = self.step = 0
        self.seconds = 0.0
        self.last_row: dict[str, Any] = {}

    def epochs(self) -> Iterator[dict[str, Any]]:
        """Trains the epochs that are left; yields epoch, step, images_seen, seconds, images_per_s, lr, loss and the loss's terms
        (the last ones means over the epoch's steps). Raises Diverged when a term is not finite."""
        images_an_epoch = self.steps_per_epoch * self.batch_size
        with tqdm(
            total=self.total_epochs * images_an_epoch,
            initial=self.epoch * images_an_epoch,
            desc="pretrain",
            unit="images",
            unit_scale=True,
            disable=None,
        ) as bar:
            while self.epoch < self.total_epochs:
                yield self._epoch(bar)

    def _epoch(self, bar: tqdm) -> dict[str, Any]:
        start = time.perf_counter()
        self.backbone.train()
        self.projector.train()
        order = torch.randperm(len(self.data.pretrain), generator=self.order_generator)
        order = order[: self.steps_per_epoch * self.batch_size]
        watch = Watch(self.device)
        sums: dict[str, Tensor] = {}
        rows = self.data.pretrain.rows[order].split(self.batch_size)
        batches = self.data.pretrain.batches(order, self.batch_size, self.device)
        for rows_of_batch, (images, labels) in zip(rows, batches, strict=True):
            lr = self.learning_rate(self.step)
            values = self._step(images, Batch(rows_of_batch, labels, self.V, len(self.data.classes)), lr, watch)
            sums = {name: value + sums.get(name, 0) for name, value in values.items()}
            self.step += 1
            bar.set_postfix(watch.latest, refresh=False)
            bar.update(self.batch_size)
        watch.finish()
        if not nn.utils.get_total_norm(self.parameters()).isfinite():
            raise Diverged(f"the weights are not finite after step {self.step - 1}, though the loss was; {ADVICE}")
        means = dict(zip(sums, (torch.stack(list(sums.values())) / self.steps_per_epoch).tolist(), strict=True))
        seconds = time.perf_counter() - start
        self.epoch += 1
        self.seconds += seconds
        self.last_row = {
            "epoch": self.epoch,
            "step": self.step,
            "images_seen": self.step * self.batch_size,
            "seconds": round(self.seconds, 3),
            "images_per_s": round(self.steps_per_epoch * self.batch_size / seconds, 1),
            "lr": lr,
            **means,
        }
        return self.last_row

    def _step(self, images: Tensor, batch: Batch, lr: float, watch: "Watch") -> dict[str, Tensor]:
        """One step on a batch; returns the loss and its terms, on the device. Nothing in here waits for the device,
        but for fp16's scaler, which must know whether the gradients overflowed."""
        X = self.augment(images, self.V, self.data.mean, self.data.std, self.view_generator)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            forwarded = [
                self.projector(self.backbone(x.contiguous(memory_format=self.memory_format))) for x in X.chunk(self.chunks)
            ]
            Z = torch.cat(forwarded)
        G = self.relation(batch, Z.detach())
        if G.support is not None:
            Z = torch.cat([Z, G.support.to(Z.dtype)])
        terms = self.loss.terms(Z, G)
        loss = self.loss.total(terms)
        values = {name: value.detach() for name, value in {"loss": loss, **terms}.items()}
        watch.put(self.step, values)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return values

    def parameters(self) -> list[Tensor]:
        """All parameters that the optimiser moves."""
        return list(itertools.chain.from_iterable(group["params"] for group in self.optimizer.param_groups))

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "last_row": self.last_row,
            "backbone": self.backbone.state_dict(),
            "projector": self.projector.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "relation": self.relation.state_dict(),
            "order_generator": self.order_generator.get_state(),
            "view_generator": self.view_generator.get_state(),
            "rng": torch.get_rng_state(),
            "device_rng": None if self.device.type == "cpu" else torch.get_device_module(self.device).get_rng_state(),
            "computed": self.computed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["computed"] != self.computed:
            raise Refused(
                f"resume: the run computed on {state['computed']} and would go on on {self.computed}, to other numbers:"
                " go on where it began, or start a new run"
            )
        self.epoch, self.step, self.seconds, self.last_row = (state[name] for name in ("epoch", "step", "seconds", "last_row"))
        for name in ("backbone", "projector", "loss", "optimizer", "scaler", "relation"):
            getattr(self, name).load_state_dict(state[name])
        self.order_generator.set_state(state["order_generator"])
        self.view_generator.set_state(state["view_generator"])
        torch.set_rng_state(state["rng"])
        if state["device_rng"] is not None:
            torch.get_device_module(self.device).set_rng_state(state["device_rng"])


class Watch:
    """Stops a run whose loss is not finite, without making the host wait: on CUDA a step's terms are copied beside the compute
    and looked at once they have arrived, a step or two later; elsewhere at once, before the weights are touched."""

    def __init__(self, device: torch.device):
        self.device = device
        self.flying: deque[tuple[int, list[str], Tensor, torch.cuda.Event | None]] = deque()
        self.latest: dict[str, str] = {}

    def put(self, step: int, values: dict[str, Tensor]) -> None:
        stacked = torch.stack(list(values.values()))
        event = None
        if self.device.type == "cuda":
            host = torch.empty(len(values), dtype=stacked.dtype, pin_memory=True)
            stacked = host.copy_(stacked, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        self.flying.append((step, list(values), stacked, event))
        self._look(wait=False)

    def finish(self) -> None:
        """Waits for what is still on its way."""
        self._look(wait=True)

    def _look(self, wait: bool) -> None:
        while self.flying:
            step, names, values, event = self.flying[0]
            if event is not None and wait:
                event.synchronize()
            if event is not None and not event.query():
                return
            self.flying.popleft()
            numbers = dict(zip(names, values.tolist(), strict=True))
            broken = {name: value for name, value in numbers.items() if not math.isfinite(value)}
            if broken:
                terms = ", ".join(f"{name}={value}" for name, value in broken.items() if name != "loss" or len(broken) == 1)
                raise Diverged(f"the loss is not finite at step {step}: {terms}; {ADVICE}")
            self.latest = {"loss": f"{numbers['loss']:.4g}"}


def choose_device(device: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu. Refused when the device is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if int(index or 0) >= count:
            found = f"{count} CUDA devices, numbered from 0" if count else "no CUDA device"
            raise Refused(f"device={device}: this machine has {found}; device=auto takes what is there")
        return torch.device("cuda", int(index or 0))
    if kind == "mps" and not torch.backends.mps.is_available():
        raise Refused(f"device={device}: this machine has no MPS device; device=auto takes what is there")
    return torch.device(kind)


def choose_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU that has it, else fp16 on CUDA, else fp32. Refused when the device cannot compute in it."""
    bf16 = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    if precision == "auto":
        return "fp32" if device.type != "cuda" else "bf16" if bf16 else "fp16"
    if (precision == "bf16" and not bf16) or (precision == "fp16" and device.type == "mps"):
        raise Refused(f"precision={precision}: {device} does not support it; precision=auto takes what does")
    return precision
