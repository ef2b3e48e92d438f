"""How many cores this process may use: what the system lets it run on, and what its container's quota allows."""

import contextlib
import math
import os
from pathlib import Path


def usable_cores() -> int:
    """Cores that may all be kept busy at once, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # rounded down: threads wait for each other, and all would wait for one that the quota holds back
    return max(1, int(min(cores, cpu_quota())))


def cpu_quota(root: Path = Path("/")) -> float:
    """Cores that the control groups of this process (a container's) let it use; infinite where they set no limit."""
    quota = math.inf
    memberships = root / "proc/self/cgroup"
    for line in memberships.read_text().splitlines() if memberships.is_file() else []:
        _, controllers, group = line.split(":", 2)  # version 2 names no controllers
        top = root / "sys/fs/cgroup" / controllers
        folder = top / group.lstrip("/")
        # a limit above holds as well; within a container the path may be the host's, and only the top be there
        for level in (folder, *folder.parents):
            quota = min(quota, group_quota(level))
            if level == top:
                break
    return quota


def group_quota(folder: Path) -> float:
    """Cores one control group may use: `cpu.max` holds "200000 100000" in version 2, two files in version 1."""
    with contextlib.suppress(OSError, ValueError):  # "max 100000" and -1 are no limit
        if (folder / "cpu.max").is_file():
            used, period = map(int, (folder / "cpu.max").read_text().split())
        else:
            used, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        if used > 0:
            return used / period
    return math.inf
