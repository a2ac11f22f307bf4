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
def test_what_is_freed_is_not_paged_in_again() -> None:
    """Beside a process that does not say so, which shows that it matters."""
    kept, given_back = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS, way], text=True))
        for way in ("kept", "given back")
    )
    assert kept < 100
    assert given_back > 4 * 24  # pages may be of 2 MiB
