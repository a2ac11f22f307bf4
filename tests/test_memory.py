"""Reuse of freed CPU memory, measured by page faults."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from ssl_runner import memory

if sys.argv[1] == "kept":
    memory.keep_freed()
def step():
    torch.ones(24, 2**20)  # 96 MiB
for _ in range(30):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif("sys.platform != 'linux' or __import__('platform').libc_ver()[0] != 'glibc'")
def test_keep_freed_avoids_page_faults() -> None:
    """Four steps cause few page faults with keep_freed, but many by default."""
    kept, default = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS, mode], text=True))
        for mode in ("kept", "default")
    )
    assert kept < 100
    assert default > 4 * 24  # pages may be 2 MiB large
