"""Rooms know only the rooms below them, and importing a module does no work."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dataset
import evaluation
import training
from tests.helpers import ROOT

STAGES = ("pretrain", "full_sft", "dpo", "distill", "reward", "grpo", "ppo")
ENTRIES = {*(f"train_{stage}" for stage in STAGES), "eval_model"}
OURS = {"model", "dataset", "evaluation", "export", "serving", "training", "scripts", "tests"} | ENTRIES
MAY_IMPORT = {
    "model": {"model"},
    "dataset": {"dataset"},
    "evaluation": {"evaluation", "model", "dataset"},
    "export": {"export", "model", "dataset"},
    "serving": {"serving", "evaluation", "model", "dataset"},
    "training": {"training", "evaluation", "model", "dataset"},
    "scripts": {"scripts", "training", "serving", "export", "evaluation", "model", "dataset"},
    "entry": {"training", "serving", "evaluation", "model", "dataset"},
}
SPREADING = ("torch.distributed", "deepspeed")  # how it is spread is done from outside


def sources(room: str) -> list[Path]:
    if room == "entry":
        return [path for name in sorted(ENTRIES) if (path := ROOT / f"{name}.py").is_file()]
    return sorted((ROOT / room).rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """Full names of everything imported anywhere in a module, functions included, and dotted uses of torch."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
            names.add(ast.unparse(node))
    return names


def test_the_reader_of_imports_sees_all_forms():
    code = "import a.b\nfrom c import d\ndef f():\n    import e\n    return torch.distributed.get_rank()\n"
    assert imported(ast.parse(code)) >= {"a.b", "c.d", "e", "torch.distributed.get_rank"}


@pytest.mark.parametrize("room", list(MAY_IMPORT))
def test_imports_point_one_way(room):
    assert sources(room)
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(room)
        for name in imported(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] in OURS - MAY_IMPORT[room]
    }
    assert wrong == set()


@pytest.mark.parametrize("room", ["model", "dataset"])
def test_model_and_data_know_nothing_of_spreading(room):
    wrong = {
        f"{path.relative_to(ROOT)} uses {name}"
        for path in sources(room)
        for name in imported(ast.parse(path.read_text(encoding="utf-8")))
        if name.startswith(SPREADING)
    }
    assert wrong == set()


def test_importing_every_module_does_no_work(tmp_path):
    """No output, no files, no argument read, no process group: for modules of all rooms, in one fresh process."""
    paths = [path for room in MAY_IMPORT for path in sources(room)]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    before = {path for path in ROOT.glob("*") if path.name != ".pytest_cache"}
    program = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
import torch
assert not torch.distributed.is_initialized()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", program, *modules]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
    assert {path for path in ROOT.glob("*") if path.name != ".pytest_cache"} == before


SLOW = ("torch", "transformers", "datasets", "pandas", "matplotlib", "deepspeed", "wandb")


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_help_and_a_wrong_flag_wait_for_no_slow_import(name, tmp_path):
    """In one fresh process for each script: the status of both, and what was imported by then."""
    program = f"""
import runpy, sys
script = sys.argv[1]
for flags in (["--help"], ["--batch_sise", "4"]):
    sys.argv = [script, *flags]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print(end.code, [name for name in {SLOW} if name in sys.modules])
"""
    command = [sys.executable, "-c", program, str(ROOT / f"{name}.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    ends = [line for line in done.stdout.splitlines() if line.endswith("]") and line[0] in "02"]
    assert ends == ["0 []", "2 []"], done.stderr
    assert "usage: " in done.stdout and "did you mean --batch_size?" in done.stderr


@pytest.mark.parametrize("package", [dataset, evaluation, training], ids=lambda package: package.__name__)
def test_names_that_are_imported_later_are_there(package):
    assert [name for name in package.__all__ if not hasattr(package, name)] == []
    with pytest.raises(ImportError, match="no_such_thing"):
        exec(f"from {package.__name__} import no_such_thing")


def test_the_collector_looks_again_after_slow_imports_but_not_at_what_they_made():
    program = """
import gc
from training.command import slow_imports
try:
    with slow_imports():
        assert not gc.isenabled()
        raise ImportError
except ImportError:
    print(gc.isenabled(), gc.get_freeze_count() > 1000)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("True True\n", "")
