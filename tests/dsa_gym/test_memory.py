"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource
import torch
from dsa_gym.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)  # 64 MiB: more than glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
keep_freed_memory()
keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.slow  # a busy system may merge pages or take them back
@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_no_page_faults_for_memory_that_was_freed() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert before > 10_000 and after < 1000
