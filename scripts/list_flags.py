"""Write docs/flags.md: every flag of the training scripts with its defaults, from the flags themselves.

python scripts/list_flags.py            after a flag was added or changed; a test asks for it
python scripts/list_flags.py --check    change nothing; exit with 1 where the file is out of date
"""

import argparse
import sys
import typing
from dataclasses import Field, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import GPTConfig
from model.config import default_shape
from training import STAGES
from training.config import Config, plain, relative, rules
from training.names import ELSEWHERE, answer

FILE = Path(__file__).parent.parent / "docs" / "flags.md"
KINDS = {str: "text", int: "whole number", float: "number", bool: "switch"}
CHANGED = {"refuse": "refused", "note": "noted", "free": ""}  # what a resume does about another value, as listed

SCRIPTS = [f"`{stage.script}`" for stage in STAGES.values()]
HEAD = f"""\
# Flags

<!-- Written by `python scripts/list_flags.py` from training/config.py and training/stages.py; change it there. -->

Of {", ".join(SCRIPTS[:-1])} and {SCRIPTS[-1]}:
the same on the command line and, without dashes, in a YAML file given with `--config`; the command line wins. Switches
take `true` or `false`, and alone mean `true`; `none` means not given. `--help` lists the flags of every other script,
`eval_model.py` included.

A network's shape is that of the folder it starts from; the defaults of shape flags are those of random weights. "At a
resume": another value than the checkpoint's is refused, noted, or (where nothing stands) does not matter.
"""

THEIRS = """\
## Names from elsewhere

What MiniMind, nanochat, LitGPT, Megatron-LM, torchtitan and the Hugging Face Trainer call things. A flag of
theirs ends with the same answer.

| theirs | here |
|---|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether docs/flags.md is up to date")
    check = parser.parse_args().check
    fresh = FILE.is_file() and FILE.read_text(encoding="utf-8") == text()
    if not check:
        FILE.write_text(text(), encoding="utf-8")
    if check and not fresh:
        print("docs/flags.md is out of date: run `python scripts/list_flags.py`", file=sys.stderr)
    return int(check and not fresh)


def text() -> str:
    """All of docs/flags.md."""
    return HEAD + "".join(table(group, names) for group, names in groups().items()) + "\n" + THEIRS + elsewhere()


def groups() -> dict[str, list[str]]:
    """{title: flags in the order they are declared}, of all stages."""
    found: dict[str, dict[str, None]] = {}
    for stage in STAGES.values():
        for name, rule in rules(stage.config).items():
            found.setdefault(rule.group, {})[name] = None
    return {group: list(names) for group, names in found.items()}


def table(group: str, names: list[str]) -> str:
    head = f"\n## {group.capitalize()}\n\n| flag | value | default | at a resume | meaning |\n|---|---|---|---|---|\n"
    return head + "".join(line(name) for name in names)


def line(name: str) -> str:
    stages = [stage.config for stage in STAGES.values() if name in rules(stage.config)]
    found = [rules(stage)[name] for stage in stages]
    cells = (
        {stage: value(stage, name) for stage in stages},
        {stage: default(stage, name) for stage in stages},
        {stage: CHANGED[rule.resume] for stage, rule in zip(stages, found, strict=True)},
        {stage: rule.help.replace("%%", "%").replace("|", "\\|") for stage, rule in zip(stages, found, strict=True)},
    )
    return f"| `--{name}` | {' | '.join(map(by_stage, cells))} |\n"


def by_stage(found: dict[type[Config], str]) -> str:
    """What all say alike, or else what each says."""
    stages: dict[str, list[str]] = {}
    for stage, said in found.items():
        stages.setdefault(said, []).append(stage.stage)
    if len(stages) == 1:
        return next(iter(stages))
    return "; ".join(f"{', '.join(names)}: {said}" for said, names in stages.items())


def value(config: type[Config], name: str) -> str:
    """What may be given, in a word or as the choices."""
    kind = plain(typing.get_type_hints(config)[name])
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return "files" if rules(config)[name].group == "files" else f"{KINDS[typing.get_args(kind)[0]]}, several"
    return KINDS[kind]


def default(config: type[Config], name: str) -> str:
    """As typed, in backquotes; nothing where the meaning says what holds."""
    if name == "init_from":
        return f"`{{out_dir}}/{config.previous}_{{dim}}`" if config.previous else "`none`"
    declared: Field[object] = next(f for f in fields(config) if f.name == name)
    found = declared.default_factory() if callable(declared.default_factory) else declared.default
    if found is None and hasattr(GPTConfig, name):  # shapes are left to the network's own defaults
        found = getattr(GPTConfig, name) if name not in ("vocab_size", *default_shape(GPTConfig.dim)) else None
    if found is None or found == []:
        return ""
    return f"`{relative(str(found).lower() if isinstance(found, bool) else found)}`"


def elsewhere() -> str:
    """Lines of names from elsewhere, those with one answer together."""
    names = sorted({name for group in groups().values() for name in group})
    found: dict[str, list[str]] = {}
    for theirs in ELSEWHERE:
        if theirs not in names:
            found.setdefault(answer(theirs, names).removeprefix("here it is "), []).append(f"`{theirs}`")
    return "".join(f"| {', '.join(theirs)} | {ours} |\n" for ours, theirs in found.items())


if __name__ == "__main__":
    sys.exit(main())
