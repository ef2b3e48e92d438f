"""The process that runs a user's tool for one call: a request as JSON on stdin, one line of JSON to a pipe.

Run by sandbox.py as `python -s -P -S child.py FD`, and by itself: nothing of ours is imported here. In order: the
kernel's namespaces where it gives them to this user (no network, its own processes, all file systems read-only but a
small one of its own), no capabilities, setrlimit, and hooks within Python that refuse what the kernel may not. The
hooks are a hurdle and no wall: code that means harm gets around them.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FunctionType, ModuleType

NEW_NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x00020000 | 0x08000000  # user, network, processes, mounts, IPC
MOUNT_SETATTR, EVERYWHERE, READ_ONLY, PRIVATE = 442, 0x8000, 1, 1 << 18  # linux/mount.h; one number on all machines
SET_DEATH_SIGNAL, NO_NEW_PRIVILEGES = 1, 38  # linux/prctl.h
CAPABILITIES_3 = 0x20080522  # linux/capability.h
JSON_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "dict": "object",
}
STARTS = ("os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "subprocess.Popen", "pty.spawn", "socket.",
          "resource.setrlimit", "resource.prlimit", "signal.", "os.kill")  # fmt: skip
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
           "os.chown", "os.utime", "os.setxattr", "shutil.")  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    request, pipe = json.loads(sys.stdin.buffer.read()), int(sys.argv[1])
    kept = enter_namespaces(request["folder"], request["limits"]["files"])
    if kept and (worker := os.fork()):  # the first process in there: when it ends, so do all others
        os.waitpid(worker, 0)
        os._exit(0)
    give_up_capabilities()
    set_limits(**request["limits"])
    forbid(request["folder"])
    try:
        reply = answer(request, kept)
    except BaseException as error:
        reply = {"error": f"{type(error).__name__}: {error}"[:500]}
    line = json.dumps(reply).encode() + b"\n"
    while line:
        line = line[os.write(pipe, line) :]
    os._exit(0)  # whatever threads or exit handlers there are


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def enter_namespaces(folder: str, size: int) -> list[str]:
    """What the kernel gave: [] where it gives nothing to this user, or is no Linux."""
    if not sys.platform.startswith("linux"):
        return []
    user, group, system = os.getuid(), os.getgid(), libc()
    if system.unshare(NEW_NAMESPACES) != 0:
        return []
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    # struct mount_attr: set, clear, propagation, userns_fd; from here on no file anywhere can be changed
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY, 0, PRIVATE, 0)
    if system.syscall(MOUNT_SETATTR, -100, b"/", EVERYWHERE, attributes, ctypes.sizeof(attributes)) != 0:
        return ["namespaces"]
    system.mount(b"tmpfs", folder.encode(), b"tmpfs", 2 | 4, f"size={size}".encode())  # nosuid, nodev
    os.chdir(folder)
    return ["namespaces", "read_only"]


def give_up_capabilities() -> None:
    """Of root, in its namespace or without one: limits and mounts cannot be undone."""
    if sys.platform.startswith("linux"):
        system = libc()
        system.capset((ctypes.c_uint32 * 2)(CAPABILITIES_3, 0), (ctypes.c_uint32 * 6)())
        system.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        system.prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)  # when the process before this one is killed


def set_limits(seconds: float, memory: int, files: int, result: int) -> None:
    bounds = {"AS": memory, "CPU": int(seconds) + 1, "FSIZE": files, "NPROC": 0, "NOFILE": 64, "CORE": 0}
    for name, bound in bounds.items():
        with suppress(ValueError, OSError):  # macOS bounds no address space
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (bound, bound))


def forbid(folder: str) -> None:
    """Refuse to start processes, to use the network and to change files outside `folder`; the error says what."""
    inside = os.path.realpath(folder) + os.sep

    def elsewhere(path: object) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        real = os.path.realpath(os.fsdecode(path))
        return not (real + os.sep).startswith(inside) and real != os.devnull

    def hook(event: str, values: tuple) -> None:
        if event.startswith(STARTS):
            raise PermissionError(f"a tool may not use {event}")
        writes = event == "open" and isinstance(values[2], int) and values[2] & WRITES
        if writes or event.startswith(CHANGES):
            for value in values[: 1 if writes else 2]:
                if elsewhere(value):
                    raise PermissionError(f"a tool may not change {os.fsdecode(value)}; it may write in its own folder")

    sys.addaudithook(hook)


def answer(request: dict, kept: list[str]) -> dict:
    function = load(request["file"], request["function"], request["path"])
    if request["what"] == "describe":
        return describe(function) | {"kept": kept}
    result = function(**request["arguments"])
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, allow_nan=False)
    if (size := len(text.encode("utf-8", "replace"))) > (most := request["limits"]["result"]):
        raise ValueError(f"the result has {size} bytes, at most {most} are read")
    return {"result": text}


def load(file: str, name: str, path: list[str]) -> Callable:
    sys.path[:] = [os.path.dirname(file), *path]
    sys.dont_write_bytecode = True
    module = sys.modules["tool"] = ModuleType("tool")
    module.__file__ = file
    with open(file, "rb") as source:  # importlib.util is another 8 ms of every call
        exec(compile(source.read(), file, "exec"), vars(module))
    found = getattr(module, name, None)
    if not callable(found):
        there = ", ".join(key for key, value in vars(module).items() if isinstance(value, FunctionType))
        raise LookupError(f"found no function {name!r}, expected one of {there or '(none there)'}")
    return found


def describe(function: Callable) -> dict:
    """{"description": docstring, "parameters": JSON schema}."""
    import inspect  # a third of the time that a call takes, and no call needs it

    properties, needed, more = {}, [], False
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            more = True
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise TypeError(f"found the parameter {name}, which has no name in a call; a tool's arguments are named")
        annotation = parameter.annotation
        hint = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
        properties[name] = {"type": JSON_TYPES[hint]} if hint in JSON_TYPES else {}
        if parameter.default is parameter.empty:
            needed.append(name)
    schema = {"type": "object", "properties": properties, "required": needed, "additionalProperties": more}
    return {"description": inspect.getdoc(function) or "", "parameters": schema}


if __name__ == "__main__":
    main()
