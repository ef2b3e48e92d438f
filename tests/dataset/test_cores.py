"""How many cores may be used: by the system's word, and by a container's quota."""

import math
import os

import pytest

from dataset.cores import cpu_quota, usable_cores


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        (None, {}, math.inf),
        ("0::/", {}, math.inf),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),  # a container sees itself as the top
        ("0::/", {"cpu.max": "max 100000"}, math.inf),
        ("0::/pod/app", {"pod/cpu.max": "200000 100000", "pod/app/cpu.max": "max 100000"}, 2),
        ("0::/pod/app", {"pod/cpu.max": "400000 100000", "pod/app/cpu.max": "50000 100000"}, 0.5),
        (
            "4:cpu,cpuacct:/docker/1a\n3:memory:/docker/1a",  # the host's path, and only the top to be seen
            {"cpu,cpuacct/cpu.cfs_quota_us": "300000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "no number", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
    ],
)
def test_the_quota_of_a_container_is_read_in_both_versions(tmp_path, groups, files, cores):
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert cpu_quota(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [(math.inf, 8), (4.7, 4), (0.5, 1), (64, 8)])
def test_as_many_cores_as_both_allow(monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr("dataset.cores.cpu_quota", lambda: quota)
    assert usable_cores() == cores
