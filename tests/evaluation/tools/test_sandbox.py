"""A user's tool in its process: what it gives back, and what it cannot do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.tools import build_tools, tool_turns
from evaluation.tools.sandbox import Limits, Sandbox, ToolError
from tests.helpers import ROOT

TOOLS = '''
import os, sys, time
from pathlib import Path

def forecast(city: str, days: int = 1, *, exact: "bool" = False):
    """The weather of the next days."""
    print("a line that is no result")
    return {"city": city, "days": days, "weather": "晴"}

def anything(**values): return str(sorted(values))
def positions(*values): return 1
def loop():
    while True: pass
def wait(): time.sleep(60)
def memory(): return len(b"x" * (1 << 33))
def grow():
    kept = []
    while True: kept.append(bytearray(1 << 22))
def long(): return "x" * 1_000_000
def flood():
    pipe = int(sys.argv[1])
    while True: os.write(pipe, b"x" * 65536)
def fork(): return os.fork()
def start():
    import subprocess
    return subprocess.run(["true"]).returncode
def network():
    import socket
    return socket.create_connection(("127.0.0.1", 9), timeout=1)
def write(path): return Path(path).write_text("harm")
def remove(path): os.remove(path)
def rename(path): os.rename(path, path + ".old")
def own_file():
    Path("notes").write_text("mine")
    return Path("notes").read_text()
def own_files():
    for number in range(40): Path(str(number)).write_bytes(b"x" * 500_000)
def large_file(): Path("large").write_bytes(b"x" * 5_000_000)
def fail(): raise KeyError("no such city")
def leave(): sys.exit(0)
def die(): os._exit(3)
def a_set(): return {1}
def words(): return str(set("abcdefgh"))
def not_a_number(): return float("nan")
def surrogate(): return "\\ud800"
def secrets(): return [key for key in os.environ if "KEY" in key]
def raw_write(path):
    import ctypes
    return ctypes.CDLL(None).open(path.encode(), os.O_WRONLY | os.O_CREAT, 0o600)
def raw_network():
    import ctypes, socket
    c = ctypes.CDLL(None)
    there = (2).to_bytes(2, sys.byteorder) + (53).to_bytes(2, "big") + bytes([127, 0, 0, 1]) + bytes(8)
    return c.sendto(c.socket(socket.AF_INET, socket.SOCK_DGRAM, 0), b"x", 1, 0, there, 16)
def leave_a_process(path):
    import ctypes
    c = ctypes.CDLL(None)
    if c.fork() == 0:
        c.setsid()
        c.execl(b"/bin/sleep", b"sleep", path.encode(), None)
    return "left"
'''
PATIENT = Limits(seconds=60)  # what ends by itself does so on a busy machine too
SHORT = Limits(seconds=0.5)
SMALL = Limits(seconds=60, memory=1 << 27)
LIMITS = {"loop": SHORT, "wait": SHORT, "grow": SMALL}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tools") / "tools.py"
    path.write_text(TOOLS, encoding="utf-8")
    return path


def call(file: Path, function: str, limits: Limits = PATIENT, **arguments: object) -> str:
    try:
        return Sandbox(str(file), function, limits).call(arguments)
    except ToolError as error:
        return f"error: {error}"


def test_a_tool_is_described_by_its_function_and_called(file: Path) -> None:
    tools = build_tools([f"{file}:forecast", f"any={file}:anything"])
    schema = tools["forecast"].parameters
    assert schema == {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    assert tools["forecast"].description == "The weather of the next days."
    named = '<tool_call>{"name": "%s", "arguments": %s}</tool_call>'
    said = named % ("forecast", '{"city": "奥斯陆"}') + named % ("any", '{"b": 1, "a": 2}') + named % ("forecast", "{}")
    turns = [turn["content"] for turn in tool_turns(said, tools)]
    assert turns[:2] == ['{"city": "奥斯陆", "days": 1, "weather": "晴"}', "['a', 'b']"]
    assert turns[2] == "error: found the arguments (none), expected city, days, exact"


@pytest.mark.parametrize(
    ("function", "found"),
    [
        ("loop", "took longer than 0.5 seconds"),
        ("wait", "took longer than 0.5 seconds"),
        ("memory", "MemoryError"),
        ("grow", "MemoryError"),
        ("long", "the result has 1000000 bytes, at most 65536 are read"),
        ("flood", "the result is longer than 65536 bytes"),
        ("fork", "a tool may not use os.fork"),
        ("start", "a tool may not use "),
        ("network", "a tool may not use socket."),
        ("large_file", "OSError"),
        ("fail", "KeyError: 'no such city'"),
        ("leave", "SystemExit: 0"),
        ("die", "the tool ended without a result"),
        ("a_set", "TypeError: Object of type set is not JSON"),
        ("not_a_number", "ValueError: Out of range float"),
        ("forecast", "TypeError: forecast() missing 1 required"),
        ("missing", "found no function 'missing', expected one of forecast, anything"),
    ],
)
def test_what_a_tool_cannot_do(file: Path, function: str, found: str) -> None:
    result = call(file, function, LIMITS.get(function, PATIENT))
    assert result.startswith("error: ") and found in result


def test_files_elsewhere_stay_as_they_are(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    for function in ("write", "remove", "rename"):
        assert f"a tool may not change {kept}" in call(file, function, path=str(kept))
    assert kept.read_text() == "mine" and os.listdir(tmp_path) == ["kept"]
    assert call(file, "own_file") == "mine" and not Path("notes").exists()
    monkeypatch.setenv("SOME_API_KEY", "secret")
    assert call(file, "secrets") == "[]"
    assert call(file, "words") == call(file, "words")  # the same every time, whatever sets are hashed with
    assert call(file, "surrogate") == "\ud800"  # mended where results become turns


def test_a_file_that_cannot_be_run_or_described_is_told_at_the_start(tmp_path: Path, file: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_like_this")
    with pytest.raises(ValueError, match="broken.py: ModuleNotFoundError: No module named 'nothing_like_this'"):
        build_tools([f"{broken}:f"])
    with pytest.raises(ValueError, match="found the parameter values, which has no name in a call"):
        build_tools([f"{file}:positions"])


def kept_by(file: Path) -> list[str]:
    return Sandbox(str(file), "forecast").describe().kept


def test_where_the_kernel_gives_namespaces_nothing_gets_around_them(file: Path, tmp_path: Path) -> None:
    """Calls past Python's hooks: to the file system, the network, and to outlive the caller."""
    if kept_by(file) != ["namespaces", "read_only"]:
        pytest.skip("this system gives no namespaces to this user")
    assert call(file, "raw_write", path=str(tmp_path / "harm")) == "-1" and os.listdir(tmp_path) == []
    assert call(file, "raw_network") == "-1"
    assert "No space left" in call(file, "own_files")
    mark = "3917.25"  # seconds that no other process sleeps
    assert call(file, "leave_a_process", path=mark) == "left"
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in read(path)]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def test_without_namespaces_limits_and_hooks_still_hold(file: Path, tmp_path: Path) -> None:
    """In a user namespace that allows no further ones, as many containers are."""
    outer = ["unshare", "-r", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*outer, "true"], capture_output=True).returncode:
        pytest.skip("this system gives no namespaces to this user")
    program = f"""
import json
from evaluation.tools.sandbox import Limits, Sandbox, ToolError
patient, limits = Limits(60), {{"loop": Limits(0.5), "grow": Limits(60, 1 << 27)}}
found = {{"kept": Sandbox({str(file)!r}, "forecast").describe().kept}}
for function in ("own_file", "loop", "grow", "fork", "network", "large_file", "write"):
    arguments = {{"path": {str(tmp_path / "harm")!r}}} if function == "write" else {{}}
    try:
        found[function] = Sandbox({str(file)!r}, function, limits.get(function, patient)).call(arguments)
    except ToolError as error:
        found[function] = str(error)
print(json.dumps(found))
"""
    done = subprocess.run([*outer, sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    found = json.loads(done.stdout)
    assert found["kept"] == [] and found["own_file"] == "mine"
    assert "took longer" in found["loop"] and "MemoryError" in found["grow"] and "large" in found["large_file"]
    assert all("a tool may not" in found[function] for function in ("fork", "network", "write"))
    assert os.listdir(tmp_path) == []
