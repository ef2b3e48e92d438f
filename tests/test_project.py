"""What the repository says about itself is true: recipes load, the README has every flag, defaults find their files."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from tests.helpers import ROOT
from training import STAGES, load_config
from training.config import Config

CONFIGS = {stage.script: stage.config for stage in STAGES.values()}


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


def test_the_readme_lists_every_flag_and_no_other() -> None:
    table = (ROOT / "README.md").read_text().split("## Flags")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", table, re.M))
    assert listed == {f.name for cls in CONFIGS.values() for f in fields(cls)}
