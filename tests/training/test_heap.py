"""The heap of a training process on Linux: on large pages, and not given back."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")

LOOK = """
import re, torch
from pathlib import Path
from training.heap import keep_freed_memory

def megabytes(name):  # of all parts of the heap
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)
    heap = [part for part in parts if "[heap]" in part.split("\\n")[0]]
    return sum(int(re.search(name + r":\\s+(\\d+)", part)[1]) for part in heap) >> 10

keep_freed_memory()
before = megabytes("Rss")
tensors = [torch.ones(10 << 20) for _ in range(5)]  # 200 MB
during = megabytes("Rss"), megabytes("AnonHugePages")
tensors.clear()
print(before, *during, megabytes("Rss"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="this kernel gives no large pages")
def test_tensors_lie_in_a_heap_of_large_pages_that_is_kept() -> None:
    ran = subprocess.run([sys.executable, "-c", LOOK], cwd=ROOT, capture_output=True, text=True, check=True)
    before, during, large, after = map(int, ran.stdout.split())
    assert before < 150  # a long heap takes no memory by itself
    assert large >= 190 and during >= before + 190
    assert after >= during - 10
