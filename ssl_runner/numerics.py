"""Process-wide switches of torch's arithmetic: TF32, deterministic algorithms, cuDNN's benchmark."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from warnings import catch_warnings, filterwarnings

import torch

from ssl_runner.errors import UsageError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_CUBLAS = (":4096:8", ":16:8")


def apply(device: torch.device, precision: str, deterministic: bool) -> dict[str, bool]:
    """Set the switches for a run. Must precede the first operation on CUDA in this process.

    Every switch is set in every run, so that an earlier run in this process has no influence:

    tf32             products and convolutions of float32 matrices on CUDA round their factors to 10 bits of
                     mantissa. Only with precision=tf32; otherwise float32 is computed in float32.
    deterministic    torch and cuDNN use deterministic algorithms, or raise RuntimeError if there is none
    cudnn_benchmark  cuDNN times its algorithms for each new shape. On CUDA, unless deterministic.

    Returns the switches, for run.json. Raises UsageError if cuBLAS cannot be deterministic in this process.
    """
    tf32 = precision == "tf32"
    if device.type == "cuda":
        set_cublas_workspace(deterministic)
    benchmark = device.type == "cuda" and not deterministic
    set_tf32(convolutions=tf32, products=tf32)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark
    return {"deterministic": deterministic, "tf32": tf32, "cudnn_benchmark": benchmark}


@contextmanager
def preserved() -> Iterator[None]:
    """Context manager that restores the switches at its end. Within it, `usual_defaults` holds."""
    convolutions, products = tf32_allowed()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        with usual_defaults():
            yield
    finally:
        set_tf32(convolutions, products)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


@contextmanager
def usual_defaults() -> Iterator[None]:
    """Context manager and decorator: torch's default dtype is float32, its default device the CPU.

    For code that a caller with other defaults may call, in any thread. The default dtype is one of the whole
    process: the first context sets it, and the last one restores it. A mode for the device, which every call
    of torch passes, is only set if it is needed.
    """
    on_cpu = torch.get_default_device().type == "cpu"
    with _DEFAULTS.lock:
        if _DEFAULTS.contexts == 0:
            _DEFAULTS.dtype = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _DEFAULTS.contexts += 1
    try:
        with nullcontext() if on_cpu else torch.device("cpu"):
            yield
    finally:
        with _DEFAULTS.lock:
            _DEFAULTS.contexts -= 1
            if _DEFAULTS.contexts == 0:
                torch.set_default_dtype(_DEFAULTS.dtype)


class _Defaults:
    """The open contexts of `usual_defaults`, and the default dtype outside of them."""

    def __init__(self) -> None:
        self.lock, self.contexts, self.dtype = threading.Lock(), 0, torch.float32


_DEFAULTS = _Defaults()


@contextmanager
def fp32_products() -> Iterator[None]:
    """Context manager within which matrix products of float32 are computed in float32, also in a tf32 run.

    For use in every step of a run, after `apply`. It does not include what runs later, in backward.
    """
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def set_cublas_workspace(deterministic: bool) -> None:
    """Set cuBLAS's workspace to a deterministic one, unless the environment sets it.

    Also without `deterministic`: torch reads the variable once, at the first product on CUDA, and a later run
    in this process may be deterministic. Raises UsageError if `deterministic` cannot be had.
    """
    given = os.environ.get(CUBLAS)
    if deterministic and given is None and torch.cuda.is_initialized():
        raise UsageError(
            f"deterministic=true: expected {CUBLAS}=:4096:8 in the environment, since this process has used"
            " CUDA before the run; set it and start a new process"
        )
    if deterministic and given is not None and given not in DETERMINISTIC_CUBLAS:
        raise UsageError(
            f"deterministic=true: expected {CUBLAS} to be one of {', '.join(DETERMINISTIC_CUBLAS)}, found"
            f" {given}; unset it"
        )
    if not torch.cuda.is_initialized():  # later it has no effect
        os.environ.setdefault(CUBLAS, DETERMINISTIC_CUBLAS[0])


def set_tf32(convolutions: bool, products: bool) -> None:
    """Allow or forbid TF32 in cuDNN's convolutions and in matrix products.

    These are the switches that exist in every supported version of torch. Setting them also sets
    `fp32_precision` of torch >= 2.9. The reverse would leave the two in conflict: reading the older one, as
    torch.compile does, would raise RuntimeError.
    """
    with catch_warnings():
        filterwarnings("ignore", "Please use the new API settings to control TF32", UserWarning)
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.backends.cuda.matmul.allow_tf32 = products


def tf32_allowed() -> tuple[bool, bool]:
    """Whether TF32 is allowed in convolutions and in matrix products.

    Returns torch's defaults where `fp32_precision` was set as well, in conflict with these switches.
    """
    with catch_warnings():
        filterwarnings("ignore", "Please use the new API settings to control TF32", UserWarning)
        try:
            return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        except RuntimeError:
            return True, False
