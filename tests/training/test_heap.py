"""The heap of a training process on Linux: on large pages, not given back, and not in pieces."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"

HEAP = """
import re, torch
from pathlib import Path
from training.heap import prepare_heap

def megabytes(name):  # of all parts of the heap
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)
    heap = [part for part in parts if "[heap]" in part.split("\\n")[0]]
    return sum(int(re.search(name + r":\\s+(\\d+)", part)[1]) for part in heap) >> 10

prepare_heap()
"""

TENSORS = """
before = megabytes("Rss")
tensors = [torch.ones(10 << 20) for _ in range(5)]  # 200 MB
during = megabytes("Rss"), megabytes("AnonHugePages")
tensors.clear()
print(before, *during, megabytes("Rss"))
"""

SHAPES = """
torch.set_num_threads(1)
weight = torch.ones(256, 512, dtype=torch.bfloat16)
for rows in range(100, 500):
    torch.ones(rows, 512, dtype=torch.bfloat16) @ weight.T
print(megabytes("Rss"))
"""


def measured(script: str, **environment: str) -> list[int]:
    """What a process of its own prints: megabytes of its heap."""
    usual = {name: value for name, value in os.environ.items() if name != CAPACITY}
    command = [sys.executable, "-c", HEAP + script]
    return [int(each) for each in subprocess.check_output(command, cwd=ROOT, env=usual | environment).split()]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="this kernel gives no large pages")
def test_tensors_lie_in_a_heap_of_large_pages_that_is_kept() -> None:
    before, during, large, after = measured(TENSORS)
    assert before < 150  # a long heap takes no memory by itself
    assert large >= 190 and during >= before + 190
    assert after >= during - 10


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no oneDNN in bfloat16 on this CPU")
def test_shapes_that_were_multiplied_once_leave_no_memory_behind() -> None:
    [few], [usual] = measured(SHAPES), measured(SHAPES, **{CAPACITY: "1024"})  # which a user may ask for
    assert few < usual - 40
