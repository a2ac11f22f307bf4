"""Pretraining: batch -> views -> X -> backbone -> projector -> Z -> loss(Z, G) -> step, one metrics row an epoch."""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from ssl_runner import distributed, replica
from ssl_runner.dataset import DataSet
from ssl_runner.errors import Refused
from ssl_runner.loss import Loss
from ssl_runner.preemption import Preempted, Preemption
from ssl_runner.relate import Batch, BatchRelation
from ssl_runner.relation import copied
from ssl_runner.views import Augment

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SAVE_AFTER = 600.0  # seconds within an epoch, of which a crash loses no more
SAVE, STOP = 1, 2  # what may be asked for after a step

ADVICE = "lower optimizer.lr, set optimizer.clip or use precision=fp32"


class Diverged(RuntimeError):
    """The loss is not finite any more."""


class Pretraining:
    """The state of one pretraining run and its loop.

    `epochs()` yields a metrics row after every epoch. `state_dict()` holds all that going on exactly needs, after any step:
    weights, optimiser, gradient scaler, the random states (of the data order, of the views, and the global ones), the counters
    and the sums that the epoch's row will be made of. It is saved at the end of every epoch's steps, before the row is made,
    every ten minutes, and where `preemption` asks the run to end: that is then Preempted.

    `sizes` are the pixels a side of the views, each for an equal part of the steps (None: the images' own). Small ones first make
    most steps cheap (progressive resolution).

    Several processes hold equal parts of each batch and the same weights; what is said here of a batch is said of all its parts.
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
        sizes: Sequence[int | None] = (None,),
        preemption: Preemption | None = None,
        save: Callable[[dict[str, Any]], None] = lambda state: None,
    ):
        self.backbone, self.projector, self.loss, self.optimizer = backbone, projector, loss, optimizer
        self.learning_rate, self.data, self.augment, self.relation = learning_rate, data, augment, relation
        self.V, self.total_epochs, self.batch_size, self.clip = V, epochs, batch_size, clip
        self.preemption, self.save, self.seed = preemption or Preemption(), save, seed
        self.device = data.mean.device
        self.network = replica.averaging(nn.Sequential(backbone, projector))
        self.divided = distributed.size() == 1 or (loss.reduces and relation.divides)
        self.vote = distributed.Vote()
        self.dtype = PRECISIONS[precision]
        self.computed = f"{self.device.type} in {precision}"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.chunks = V if separate else 1
        self.sizes = sizes
        self.order_generator = torch.Generator().manual_seed(seed)
        self.view_generator = torch.Generator(self.device).manual_seed(seed)
        self.steps_per_epoch = len(data.pretrain) // batch_size
        self.epoch = self.step = 0
        self.seconds = self.seconds_before = 0.0  # of all training, and of the epochs that are over
        self.sums: dict[str, Tensor] = {}  # of this epoch's losses and terms
        self.order_state = self.order_generator.get_state()  # from which this epoch's order is drawn
        self.last_row: dict[str, Any] = {}
        if distributed.rank():
            torch.manual_seed(
                seed + distributed.rank()
            )  # what is dropped from one process's rows is not from another's

    def epochs(self) -> Iterator[dict[str, Any]]:
        """Trains the epochs that are left; yields epoch, step, images_seen, seconds, images_per_s, lr, loss and the loss's terms
        (the last ones means over the epoch's steps). Raises Diverged when a term is not finite."""
        with tqdm(
            total=self.total_epochs * self.steps_per_epoch * self.batch_size,
            initial=self.step * self.batch_size,
            desc="pretrain",
            unit="images",
            unit_scale=True,
            disable=None if distributed.leads() else True,
        ) as bar:
            while self.epoch < self.total_epochs:
                yield self._epoch(bar)

    def _epoch(self, bar: tqdm) -> dict[str, Any]:
        with self.preemption.held():
            stopped = self._steps(bar)
            if not nn.utils.get_total_norm(self.parameters()).isfinite():
                raise Diverged(
                    f"the weights are not finite after step {self.step - 1}, though the loss was; {ADVICE}"
                )
            self._save()
            if stopped:
                raise Preempted(f"preempted after step {self.step}, from which the run can go on")
        means = dict(
            zip(
                self.sums,
                (torch.stack(list(self.sums.values())) / self.steps_per_epoch).tolist(),
                strict=True,
            )
        )
        seconds = self.seconds - self.seconds_before
        self.epoch += 1
        self.sums, self.seconds_before, self.order_state = {}, self.seconds, self.order_generator.get_state()
        self.last_row = {
            "epoch": self.epoch,
            "step": self.step,
            "images_seen": self.step * self.batch_size,
            "seconds": round(self.seconds, 3),
            "images_per_s": round(self.steps_per_epoch * self.batch_size / seconds, 1),
            "lr": self.learning_rate(self.step - 1),
            **means,
        }
        return self.last_row

    def _steps(self, bar: tqdm) -> bool:
        """The steps that are left of this epoch; whether the run has been asked to end after one of them."""
        start = saved = time.perf_counter()
        self.backbone.train()
        self.projector.train()
        self.order_generator.set_state(self.order_state)
        order = torch.randperm(len(self.data.pretrain), generator=self.order_generator)
        order = order[: self.steps_per_epoch * self.batch_size].view(self.steps_per_epoch, self.batch_size)
        watch = Watch(self.device)
        for images, batch in self._batches(order[self.step - self.epoch * self.steps_per_epoch :]):
            values = self._step(images, batch, self.learning_rate(self.step), watch)
            self.sums = {name: value + self.sums.get(name, 0) for name, value in values.items()}
            self.step += 1
            bar.set_postfix(watch.latest, refresh=False)
            bar.update(self.batch_size)
            asked = self.vote(
                STOP if self.preemption.asked else SAVE if time.perf_counter() - saved > SAVE_AFTER else 0
            )
            if asked:
                watch.finish()
                self.seconds += time.perf_counter() - start
                if asked == STOP:
                    return True
                self._save()
                start = saved = time.perf_counter()
        watch.finish()
        self.seconds += time.perf_counter() - start
        return False

    def _save(self) -> None:
        self.save(self.state_dict())
        distributed.share(None)  # no process goes on, or ends, before the checkpoint is on disk

    def _batches(self, order: Tensor) -> Iterator[tuple[Tensor, Batch]]:
        """For each batch of `order` (steps, batch_size), positions among the pretraining images: this process's part of its
        images, and what the relation is made of: that part, or the whole batch."""
        if not len(order):
            return
        data, W = self.data.pretrain, distributed.size()
        own = order.chunk(W, dim=1)[distributed.rank()]
        which = own if self.divided else order
        batches = data.batches(own.flatten(), own.shape[1], self.device)
        for positions, (images, labels) in zip(which, batches, strict=True):
            rows = data.rows[positions]
            if len(rows) > len(labels):
                labels = data.labels[copied(rows, self.device)]
            yield images, Batch(rows, labels, self.V, len(self.data.classes))

    def _step(self, images: Tensor, batch: Batch, lr: float, watch: "Watch") -> dict[str, Tensor]:
        """One step on a batch; returns the loss and its terms, on the device. Nothing in here waits for the device,
        but for fp16's scaler where the optimiser is not a fused one, which looks itself whether the gradients overflowed."""
        part, parts = distributed.rank(), distributed.size()
        size = self.sizes[self.step * len(self.sizes) // (self.total_epochs * self.steps_per_epoch)]
        X = self.augment(
            images, self.V, self.data.mean, self.data.std, self.view_generator, part, parts, size=size
        )
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            Z = torch.cat(
                [self.network(x.contiguous(memory_format=self.memory_format)) for x in X.chunk(self.chunks)]
            )
        if self.divided:
            terms = self._terms(Z, batch)
        else:  # every process computes all of the loss, from all rows
            rows = distributed.gather(Z.float()).unflatten(0, (parts, self.V, -1))
            with (
                distributed.alone(),
                torch.random.fork_rng([self.device] if self.device.type == "cuda" else []),
            ):
                torch.manual_seed(self.seed + self.step)  # what a loss may draw is the same in all
                terms = self._terms(rows.transpose(0, 1).flatten(0, 2), batch)
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

    def _terms(self, Z: Tensor, batch: Batch) -> dict[str, Tensor]:
        G = self.relation(batch, Z.detach())
        if G.support is not None:
            Z = torch.cat([Z, G.support.to(Z.dtype)])
        return self.loss.terms(Z, G)

    def parameters(self) -> list[Tensor]:
        """All parameters that the optimiser moves."""
        return list(itertools.chain.from_iterable(group["params"] for group in self.optimizer.param_groups))

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "seconds_before": self.seconds_before,
            "sums": self.sums,
            "backbone": self.backbone.state_dict(),
            "projector": self.projector.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "relation": self.relation.state_dict(),
            "order_generator": self.order_state,
            "view_generator": self.view_generator.get_state(),
            "rng": distributed.collect(self._random_states()),
            "computed": self.computed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["computed"] != self.computed:
            raise Refused(
                f"resume: the run computed on {state['computed']} and would go on on {self.computed}, to other numbers:"
                " go on where it began, or start a new run"
            )
        for name in ("epoch", "step", "seconds", "seconds_before"):
            setattr(self, name, state[name])
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        for name in ("backbone", "projector", "loss", "optimizer", "scaler", "relation"):
            getattr(self, name).load_state_dict(state[name])
        self.order_state = state["order_generator"]
        self.view_generator.set_state(state["view_generator"])
        if distributed.rank() < len(state["rng"]):  # a process more than there were keeps its own
            host, device = state["rng"][distributed.rank()]
            torch.set_rng_state(host)
            if device is not None:
                torch.get_device_module(self.device).set_rng_state(device)

    def _random_states(self) -> tuple[Tensor, Tensor | None]:
        """Those of this process's global generators, on the host and on the device."""
        device = None if self.device.type == "cpu" else torch.get_device_module(self.device).get_rng_state()
        return torch.get_rng_state(), device


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
                terms = ", ".join(
                    f"{name}={value}" for name, value in broken.items() if name != "loss" or len(broken) == 1
                )
                raise Diverged(f"the loss is not finite at step {step}: {terms}; {ADVICE}")
            self.latest = {"loss": f"{numbers['loss']:.4g}"}


def choose_device(device: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu; of several processes on one machine each takes a GPU of its own. Refused when the
    device is not there."""
    here = distributed.place()
    if device == "auto":
        device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available() and not here
            else "cpu"
        )
    kind, _, index = device.partition(":")
    if here and (index or kind == "mps"):
        raise Refused(
            f"device={device} is one device, and {here.size} processes train: give device=auto, cuda or cpu"
        )
    if (
        here and kind == "cuda" and torch.cuda.device_count() > 1
    ):  # else Slurm has bound the one that is this task's
        index = str(here.local_rank)
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
    """`auto` is bf16 on a GPU or a CPU that has instructions for it, else fp16 on CUDA, else fp32. Refused when the device cannot
    compute in it. A CPU without such instructions emulates bf16, an order of magnitude slower than it computes in fp32."""
    bf16 = device.type == "cpu" or (
        device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    if precision == "auto":
        native = bf16_instructions() if device.type == "cpu" else bf16
        return "bf16" if native else "fp16" if device.type == "cuda" else "fp32"
    if (precision == "bf16" and not bf16) or (precision == "fp16" and device.type == "mps"):
        raise Refused(f"precision={precision}: {device} does not support it; precision=auto takes what does")
    return precision


def bf16_instructions() -> bool:
    """Whether this CPU multiplies in bf16 (AVX-512 BF16 or AMX, as torch >= 2.11 tells; False where it does not)."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
