"""What the repository says about itself is true: recipes load, flags are listed, what the READMEs tell
to type is understood, defaults find their files."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import eval_model
from scripts import list_flags
from tests.helpers import ROOT
from training import STAGES, load_config
from training.config import Config

CONFIGS = {stage.script: stage.config for stage in STAGES.values()}
TRAINING = {f.name for cls in CONFIGS.values() for f in fields(cls)}
READMES = ("README.md", "README.zh.md")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_a_recipe_loads_by_the_launch_lines_in_its_header(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    header = [line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("#")]
    launches = [line for line in header if line.startswith(("python ", "torchrun "))]
    assert launches and all(f"configs/{path.name}" in line for line in launches)
    for line in launches:
        words = shlex.split(line)
        script = next(word for word in words if word in CONFIGS)
        config = load_config(CONFIGS[script], words[words.index(script) + 1 :])
        assert config.stage in path.name
        assert all(Path(data).is_file() for data in config.data_path)


@pytest.mark.parametrize("cls", CONFIGS.values())
def test_the_defaults_find_the_sample_data(cls: type[Config]) -> None:
    assert all(Path(data).is_file() for data in load_config(cls, []).data_path)


def test_flags_md_is_what_the_script_writes_and_lists_every_flag_and_no_other() -> None:
    written = list_flags.FILE.read_text(encoding="utf-8")
    assert written == list_flags.text(), "run `python scripts/list_flags.py`"
    assert set(re.findall(r"^\| `--(\w+)` \|", written, re.M)) == TRAINING
    assert str(ROOT) not in written


def code_blocks(name: str) -> list[str]:
    return re.findall(r"^```\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.M | re.S)


def commands(name: str) -> list[str]:
    """Lines of the code blocks that begin with a program, without their comments."""
    found = [line.split("  #")[0].strip() for block in code_blocks(name) for line in block.splitlines()]
    return [line for line in found if re.match(r"(python|bash|torchrun|deepspeed|pytest) ", line)]


@pytest.mark.parametrize("name", READMES)
def test_a_readme_begins_with_the_two_commands(name: str) -> None:
    assert commands(name)[:2] == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]
    assert [line.split("  #")[0].rstrip() for line in code_blocks(name)[0].splitlines()] == commands(name)[:2]


@pytest.mark.parametrize("name", READMES)
def test_what_a_readme_tells_to_type_parses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags of training and of eval_model.py; their values too. Files that the reader has are not asked for."""
    monkeypatch.chdir(ROOT)
    checked = 0
    for line in commands(name):
        words = shlex.split(line)
        script = next((i for i, word in enumerate(words) if word.endswith(".py")), 0)
        assert not script or (ROOT / words[script]).is_file(), line
        if words[script] in CONFIGS:
            load_config(CONFIGS[words[script]], words[script + 1 :])
        elif words[script] == "eval_model.py":
            eval_model.parse_arguments(words[script + 1 :])
        else:
            continue
        checked += 1
    assert checked >= 10


@pytest.mark.parametrize("name", READMES)
def test_a_readme_names_flags_and_files_that_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    sources = [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]
    theirs = {flag for path in sources for flag in re.findall(r"\"--(\w+)\"", path.read_text(encoding="utf-8"))}
    launchers = {"nproc_per_node", "nnodes", "max_restarts", "master_port", "num_gpus", "help", "config"}
    assert set(re.findall(r"(?<![\w-])--(\w+)", text)) <= TRAINING | theirs | launchers
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert "://" in link or (ROOT / link).exists(), link


def test_the_readmes_say_the_same_in_two_languages() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in READMES]
    assert commands(READMES[0]) == commands(READMES[1])
    for marks in (r"^## ", r"^\|", r"^- ", r"^!\[", r"^```"):
        counts = [len(re.findall(marks, text, re.M)) for text in texts]
        assert counts[0] == counts[1], marks
    links = [sorted(set(re.findall(r"\]\(([^)]+)\)", text)) - set(READMES)) for text in texts]
    assert links[0] == links[1]
