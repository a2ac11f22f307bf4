"""What gpu-check's server imports once, for all sections. None of it uses CUDA."""

import torch._dynamo

from benchmarks import gpu_runs, gpu_timed
from ssl_runner.views.augment import numba_works

__all__ = ["gpu_runs", "gpu_timed", "torch"]

numba_works()  # imports numba, if it can be imported
