"""Several nodes on one Linux machine: network namespaces, joined by a bridge, each with an address of its own.

    with Nodes(2) as nodes:
        process = nodes.start(1, ["torchrun", ...], tmp_path / "node1.log")
        nodes.cut(1)     # the cable is pulled: its processes live on and reach nobody
        nodes.kill(1)    # the power is off: everything there ends with SIGKILL

A node has its own interfaces, ports and mounts; the disk, the clock and the hostname are the machine's. The bridge
stands in a namespace too, so nothing of this shows in the machine's own network, and two harnesses never meet.
"""

import itertools
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Self

import pytest

INTERFACE = "node0"  # the name of every node's one interface beside lo
NAMESPACES = Path("/run/netns")  # where ip keeps them
COUNTER = itertools.count()


def ip(*words: object) -> str:
    """Run ip(8). Raises CalledProcessError, and prints what ip said."""
    return subprocess.run(["ip", *map(str, words)], check=True, stdout=subprocess.PIPE, text=True).stdout


class Nodes:
    """`count` nodes while the context lasts; all of them, and what runs in them, are gone after it."""

    def __init__(self, count: int):
        self.count = count
        # unique on the machine as long as this process lives, so that tests can run side by side
        self.name = f"seedling-{os.getpid()}-{next(COUNTER)}"
        self.switch = f"{self.name}-switch"
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        remove_leftovers()
        try:
            ip("netns", "add", self.switch)
            ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", self.switch, "link", "set", "bridge", "up")
            for node in range(self.count):
                self.add(node)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def add(self, node: int) -> None:
        name, port = self.namespace(node), f"port{node}"
        ip("netns", "add", name)
        ip("-n", name, "link", "add", INTERFACE, "type", "veth", "peer", "name", port, "netns", self.switch)
        ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
        ip("-n", name, "address", "add", f"{self.address(node)}/24", "dev", INTERFACE)
        ip("-n", name, "link", "set", INTERFACE, "up")
        ip("-n", name, "link", "set", "lo", "up")

    def namespace(self, node: int) -> str:
        return f"{self.name}-{node}"

    def address(self, node: int) -> str:
        return f"10.77.0.{node + 1}"

    def start(
        self, node: int, command: list[str], log: Path, env: dict[str, str], own_disk: Path | None = None
    ) -> subprocess.Popen:
        """Run a command in a node; what it says is appended to `log`. Under `own_disk` the node sees an empty disk of
        its own, where the other nodes see the shared one."""
        if own_disk is not None:  # `ip netns exec` gives every command its own mounts
            command = ["sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(own_disk), *command]
        with open(log, "ab") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace(node), *command],
                # the hostname is the machine's and may resolve to lo, where the other nodes cannot be reached
                env=env | {"GLOO_SOCKET_IFNAME": INTERFACE},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)
        return process

    def cut(self, node: int) -> None:
        """Pull the cable: no packet comes or goes, and no connection is closed."""
        ip("-n", self.switch, "link", "set", f"port{node}", "down")

    def mend(self, node: int) -> None:
        ip("-n", self.switch, "link", "set", f"port{node}", "up")

    def kill(self, node: int) -> None:
        """SIGKILL to everything in a node, until nothing is left."""
        kill_all(self.namespace(node))

    def close(self) -> None:
        remove(f"{self.name}-*")
        for process in self.processes:
            process.wait()


def remove(pattern: str) -> None:
    """Namespaces by name, and what runs in them."""
    for path in NAMESPACES.glob(pattern):
        kill_all(path.name)
        ip("netns", "del", path.name)


def remove_leftovers() -> None:
    """Those of processes that were killed before they could clean up."""
    for owner in {path.name.split("-")[1] for path in NAMESPACES.glob("seedling-*-*-*")}:
        if not Path("/proc", owner).exists():
            remove(f"seedling-{owner}-*")


def kill_all(namespace: str) -> None:
    """SIGKILL until `ip netns pids` lists nobody: a process may start another one in between."""
    while pids := ip("netns", "pids", namespace).split():
        subprocess.run(["kill", "-9", *pids], stderr=subprocess.DEVNULL)  # one may be gone already
        time.sleep(0.01)


def can_make_nodes() -> bool:
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    try:
        with Nodes(1):
            return True
    except subprocess.CalledProcessError:
        return False


needs_namespaces = pytest.mark.skipif(
    not can_make_nodes(), reason="needs root, ip (iproute2) and the permission to create network namespaces"
)
