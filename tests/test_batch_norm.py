"""SyncBatchNorm on W ranks equals nn.BatchNorm on the whole batch, on CPU and with the kernels for CUDA.

The kernels exist on CUDA only. Tests without a GPU replace them by tensor operations of the same meaning.
"""

import itertools
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ssl_runner import distributed
from ssl_runner.distributed import batch_norm
from ssl_runner.distributed.batch_norm import SyncBatchNorm
from tests.device import OnDevice, moved, pretended
from tests.processes import in_processes

F, EPS = 5, 1e-5  # features


def broadcast(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.ndim - 2))


def other_dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def is_dense(*tensors: Tensor) -> bool:
    """Return True if all tensors are channels-last, or all are contiguous: the CUDA kernels require it."""
    return any(
        all(x.is_contiguous(memory_format=format) for x in tensors)
        for format in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    )


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    assert is_dense(x)
    wide = x.float() if x.dtype.itemsize == 2 else x
    variance, mean = torch.var_mean(wide, other_dims(x), correction=0)
    return mean, (variance + eps).rsqrt()


def elemt(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse: Tensor, eps: float):
    y = (x.to(mean.dtype) - broadcast(mean, x)) * broadcast(inverse, x)
    if weight is not None and bias is not None:
        y = y * broadcast(weight.to(mean.dtype), x) + broadcast(bias.to(mean.dtype), x)
    return y.to(x.dtype).contiguous(memory_format=batch_norm.memory_format(x))


def backward_reduce(g, x, mean, inverse, weight, of_x: bool, of_weight: bool, of_bias: bool):
    assert is_dense(g, x)
    assert g.dtype == x.dtype
    wide = g.to(mean.dtype)
    of_y = wide.sum(other_dims(x))
    of_y_xmu = (wide * (x.to(mean.dtype) - broadcast(mean, x))).sum(other_dims(x))
    like = mean if weight is None else weight
    return (
        of_y,
        of_y_xmu,
        (of_y_xmu * inverse).to(like) if of_weight else None,
        of_y.to(like) if of_bias else None,
    )


def backward_elemt(g, x, mean, inverse, weight, of_y, of_y_xmu, count):
    assert is_dense(g, x)
    assert count.dtype == torch.int32
    assert weight is None or weight.dtype == mean.dtype
    rows = count.sum()
    slope = inverse**2 * of_y_xmu / rows
    scale = inverse if weight is None else inverse * weight
    centred = g.to(mean.dtype) - broadcast(of_y / rows, x)
    of_x = (centred - (x.to(mean.dtype) - broadcast(mean, x)) * broadcast(slope, x)) * broadcast(scale, x)
    return of_x.to(x.dtype).contiguous(memory_format=batch_norm.memory_format(x))


KERNELS = {
    "batch_norm_stats": stats,
    "batch_norm_elemt": elemt,
    "batch_norm_backward_reduce": backward_reduce,
    "batch_norm_backward_elemt": backward_elemt,
}
SHAPES = {"rows": (24, F), "sequence": (24, F, 3), "image": (24, F, 4, 3), "volume": (8, F, 2, 3, 2)}


def batch(shape: str, dtype: torch.dtype, offset: float = 0.0, last: bool = False) -> tuple[Tensor, Tensor]:
    """A batch and the gradient of its output, with another mean and scale for each feature and each row."""
    generator = torch.Generator().manual_seed(len(shape))
    x, g = (torch.randn(SHAPES[shape], generator=generator, dtype=torch.float64) for _ in range(2))
    x = x * broadcast(torch.arange(1.0, F + 1), x) + offset
    x += torch.arange(len(x)).view(-1, *[1] * (x.ndim - 1)) / 20  # the ranks' means and variances differ
    x[: len(x) // 2] *= 1 + 1 / (1 + offset)
    format = torch.channels_last if last else torch.contiguous_format
    return x.to(dtype).contiguous(memory_format=format), g.to(dtype)


def results(layer: nn.Module, apply, x: Tensor, g: Tensor) -> list[Tensor | None]:
    """Output, gradient of the input, gradients of weight and bias, and buffers, for this rank's rows."""
    W, rank = distributed.world_size(), distributed.rank()
    format = batch_norm.memory_format(x)
    part = x.chunk(W)[rank].clone(memory_format=format).requires_grad_()
    y = apply(part)
    y.backward(g.chunk(W)[rank])
    assert part.grad is not None
    parameters = [p.grad for p in layer.parameters()]
    kept = is_dense(part, y) and is_dense(part, part.grad)
    assert kept
    return [y.detach(), part.grad, *parameters, *[b.clone() for b in layer.buffers()]]


def layer(affine: bool = True, momentum: float | None = 0.1, running: bool = True) -> SyncBatchNorm:
    new = SyncBatchNorm(F, EPS, momentum, affine, running)
    if affine:
        nn.init.normal_(new.weight, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(new.bias, generator=torch.Generator().manual_seed(2))
    return new


CASES = list(itertools.product(SHAPES, (torch.float32, torch.float64), (True, False)))


def compare_paths() -> list[tuple[list, list]]:
    """Results of the kernels and of the tensor operations for every case, on this rank."""
    found = []
    with mock.patch.multiple(torch, **KERNELS):
        for shape, dtype, affine in CASES:
            x, g = batch(shape, dtype, last=shape == "image")
            pair = []
            for path in ("fused", "normalized"):
                one = layer(affine).to(dtype)
                pair.append(results(one, getattr(one, path), x, g))
            found.append(tuple(pair))
    return found


def whole_batch(one: SyncBatchNorm, x: Tensor, g: Tensor) -> list[Tensor | None]:
    """The same results from torch's batch norm of the whole batch in one process."""
    return results(one, one, x, g)


@pytest.mark.parametrize("W", [2, 4])
def test_fused_batch_norm_matches_whole_batch_and_tensor_operations(W: int) -> None:
    ranks = in_processes(W, compare_paths)
    for number, (shape, dtype, affine) in enumerate(CASES):
        x, g = batch(shape, dtype, last=shape == "image")
        expected = whole_batch(layer(affine).to(dtype), x, g)
        tolerance = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-5}
        for path in (0, 1):
            theirs = [rank[number][path] for rank in ranks]
            rows = [torch.cat([values[i] for values in theirs]) for i in (0, 1)]
            parameters = [sum(values[i] for values in theirs) for i in range(2, 4 if affine else 2)]
            assert_close([*rows, *parameters], expected[: 4 if affine else 2], **tolerance)
            for values in theirs:
                assert_close(values[len(rows) + len(parameters) :], expected[-3:], **tolerance)


def fused_only(offset: float, dtype: torch.dtype) -> list[Tensor | None]:
    x, g = batch("image", dtype, offset, last=True)
    with mock.patch.multiple(torch, **KERNELS), torch.autocast("cpu", torch.bfloat16):
        one = layer()
        return results(one, one.fused, x, g)


def float64_reference(offset: float, dtype: torch.dtype) -> list[Tensor | None]:
    """Results in float64 for the values of a batch in another dtype."""
    x, g = batch("image", dtype, offset, last=True)
    return whole_batch(layer().double(), x.double(), g.double())


@pytest.mark.parametrize("offset", [100.0, 3000.0])
def test_fused_batch_norm_keeps_precision_for_large_means(offset: float) -> None:
    """Mean / standard deviation is up to 3,000. No running mean is there to shift by: it is zero at first.

    float32 has 3000 * 6e-8 = 2e-4 standard deviations of rounding in x itself.
    """
    expected = float64_reference(offset, torch.float32)
    theirs = in_processes(2, fused_only, offset, torch.float32)
    tolerance = 4 * offset * 6e-8 * 5
    for i in (0, 1):
        assert_close(torch.cat([v[i] for v in theirs]).double(), expected[i], rtol=1e-3, atol=tolerance)
    for values in theirs:
        assert_close(values[-2].double(), expected[-2], rtol=1e-4, atol=0)  # running variance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_batch_norm_keeps_half_precision_input_and_float32_statistics(dtype: torch.dtype) -> None:
    expected = float64_reference(0.0, dtype)
    theirs = in_processes(2, fused_only, 0.0, dtype)
    eps = torch.finfo(dtype).eps
    for i in (0, 1):
        rows = torch.cat([v[i] for v in theirs])
        assert rows.dtype == dtype
        assert_close(rows.double(), expected[i], rtol=eps, atol=2 * eps)
    for values in theirs:
        assert values[2].dtype == values[-3].dtype == torch.float32
        assert_close([v.double() for v in values[-3:-1]], expected[-3:-1], rtol=1e-5, atol=1e-5)


def communicated() -> list[tuple[int, ...]]:
    """Shapes of all tensors passed to all_reduce in one forward and backward pass."""
    shapes, all_reduce = [], torch.distributed.all_reduce

    def counted(tensor: Tensor) -> None:
        shapes.append(tuple(tensor.shape))
        all_reduce(tensor)

    with mock.patch.object(torch.distributed, "all_reduce", counted):
        fused_only(0.0, torch.float32)
    return shapes


def test_fused_batch_norm_all_reduces_two_numbers_per_feature_in_each_direction() -> None:
    assert in_processes(2, communicated)[0] == [(2, F), (2 * F,)]


class SizesOutsideKernels(TorchDispatchMode):
    """Number of entries of the outputs of every operation that does not run within one of the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.within = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.within and not func.is_view and func.overloadpacket.__name__ not in ("detach", "empty"):
            self.sizes += [leaf.numel() for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        return result

    def kernel(self, function):
        def run(*args):
            self.within = True
            result = function(*args)
            self.within = False
            return result

        return run


def sizes_of_operations() -> list[int]:
    x, g = (part.contiguous(memory_format=torch.channels_last) for part in batch("image", torch.bfloat16))
    one, x = layer(), x.chunk(2)[distributed.rank()].requires_grad_()
    operations = SizesOutsideKernels()
    kernels = {name: operations.kernel(function) for name, function in KERNELS.items()}
    with mock.patch.multiple(torch, **kernels), operations:
        one.fused(x).backward(g.chunk(2)[distributed.rank()])
    return operations.sizes


def test_fused_batch_norm_touches_activations_in_the_four_kernels_only() -> None:
    """The other operations, at most 19, have one or two numbers per feature."""
    sizes = in_processes(2, sizes_of_operations)[0]
    assert max(sizes) <= 2 * F
    assert len(sizes) <= 19


def test_batch_norm_on_device_uses_kernels_without_host_device_sync() -> None:
    """On the emulated device, where a sync raises. Two ranks with the same rows: the sums are doubled."""
    x, g = batch("image", torch.float32, last=True)
    expected = whole_batch(layer(), x, g)
    one = moved(layer())
    with (
        pretended(),
        mock.patch.multiple(torch, **KERNELS),
        mock.patch.object(batch_norm, "world_size", return_value=2),
        mock.patch.object(torch.distributed, "all_reduce", lambda total: total.mul_(2)),
    ):
        part = OnDevice(x).requires_grad_()
        y = one(part)
        y.backward(OnDevice(g))
    assert_close([y.values, part.grad.values, one.weight.grad.values], expected[:3], rtol=1e-5, atol=1e-5)
    assert_close(one.running_mean.values, expected[-3])


def special_layers() -> tuple[list[Tensor | None], ...]:
    """No running statistics; the cumulative average; frozen parameters; an input without gradient."""
    x, g = batch("image", torch.float64)
    with mock.patch.multiple(torch, **KERNELS):
        without = layer(running=False).double()
        average = layer(momentum=None).double()
        frozen = layer().double().requires_grad_(False)
        found = [results(one, one.fused, x, g) for one in (without, average, average, frozen)]
        leaf = layer().double()
        leaf.fused(x.chunk(2)[distributed.rank()]).backward(g.chunk(2)[distributed.rank()])
        constant = layer().fused(torch.full((4, F), 1e4))  # no variance at all
    return *found, [p.grad for p in leaf.parameters()], [constant.detach()]


def test_fused_batch_norm_supports_all_options_of_batch_norm() -> None:
    x, g = batch("image", torch.float64)
    average = layer(momentum=None).double()
    layers = [layer(running=False).double(), average, average, layer().double().requires_grad_(False)]
    expected = [whole_batch(one, x, g) for one in layers]
    ranks = in_processes(2, special_layers)
    for number, one in enumerate(layers):
        theirs = [rank[number] for rank in ranks]
        for i in (0, 1):
            assert_close(torch.cat([v[i] for v in theirs]), expected[number][i], rtol=1e-11, atol=1e-11)
        for values in theirs:
            count = len(list(one.buffers()))
            assert len(values) == len(expected[number])
            assert values[2] is None or number < 3
            if count:
                assert_close(values[-count:], expected[number][-count:])
    plain = expected[0][2:4]
    assert_close([a + b for a, b in zip(*(rank[4] for rank in ranks), strict=True)], plain)
    assert torch.equal(ranks[0][5][0], layer().bias.detach().expand(4, F))


def train_compiled() -> list[Tensor]:
    """Parameters and buffers after two steps, without the compiler and with it."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(3, F), nn.BatchNorm1d(F), nn.ReLU(inplace=True), nn.Linear(F, 2))
        network = distributed.data_parallel(distributed.sync_batchnorm(body))
        if compiled:
            network.compile(dynamic=False, backend="aot_eager")
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for seed in (1, 2):
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)).chunk(2)[distributed.rank()]
            optimizer.zero_grad(set_to_none=True)
            (network(x) ** 3).sum().backward()
            nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            optimizer.step()
        found.append(torch.cat([value.flatten() for value in network.state_dict().values()]))
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile's own warnings
def test_compiled_network_with_synchronized_batch_norm_matches_eager() -> None:
    for plain, compiled in in_processes(2, train_compiled):
        assert_close(compiled, plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_batch_norm_on_cuda_matches_batch_norm(shape: str, dtype: torch.dtype, affine: bool) -> None:
    """One rank, without all-reduce: the kernels against torch's batch norm in float64 on the CPU."""
    for last in {False, shape == "image"}:
        x, g = batch(shape, dtype, last=last)
        expected = whole_batch(layer(affine).double(), x.double(), g.double())
        one = layer(affine).cuda()
        with mock.patch.object(torch.distributed, "all_reduce"):
            values = results(one, one.fused, x.cuda(), g.cuda())
        eps = torch.finfo(dtype).eps
        for ours, theirs in zip(values, expected, strict=True):
            assert ours.is_cuda
            scale = theirs.double().abs().max().item()
            assert_close(ours.cpu().double(), theirs.double(), rtol=4 * eps, atol=4 * eps * max(scale, 1))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fused_batch_norm_on_cuda_causes_no_host_device_sync() -> None:
    one = layer().cuda()
    x = torch.randn(8, F, 4, 4, device="cuda", requires_grad=True)
    with mock.patch.object(torch.distributed, "all_reduce"):
        one.fused(x).sum().backward()  # loads the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            one.fused(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
