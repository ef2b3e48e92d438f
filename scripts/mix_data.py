"""Choose files and weigh them: a recipe in, one training file out, for --data_path.

python scripts/mix_data.py recipe.yaml --stage pretrain --output mix/pretrain.jsonl

    data/stories.jsonl: 3                        # recipe.yaml: each row three times
    data/books.jsonl: 0.5                        # every second row, by its hash
    data/chats.jsonl: {weight: 2, as: text}      # pretraining on conversations: what was said, a turn a paragraph
    data/identity.jsonl: {weight: 5, fill: {name: Seedling}}     # {{name}} in the rows becomes Seedling

Paths (globs too) are looked for beside the recipe. The copies of a row are alike, so --val_fraction holds out all or
none of them; of conversations taken as text those are left out that fine-tuning with --val_fraction holds out. A row
is read as the stage reads it, and one that cannot be used is an error. A table tells what was taken.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import xxhash
import yaml
from rich.console import Console
from rich.table import Table

from dataset.encode import Rules, is_held_out
from dataset.forms import Form
from dataset.records import expand_paths, one_line, read_rows
from training import STAGES


@dataclass
class Part:
    """One line of a recipe."""

    paths: list[str]
    weight: float
    form: Form
    text: bool = False  # conversations that become text
    fill: dict[str, str] = field(default_factory=dict)


def read_recipe(path: Path, stage: str) -> list[Part]:
    """Raises ValueError for what a recipe cannot say, and FileNotFoundError for files that are not there."""
    lines = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(lines, dict) or not lines:
        raise ValueError(f"{path}: it must have lines of FILE: WEIGHT")
    return [part_of(path, stage, name, given) for name, given in lines.items()]


def part_of(recipe: Path, stage: str, name: str, given: Any) -> Part:
    settings = given if isinstance(given, dict) else {"weight": given}
    if unknown := settings.keys() - {"weight", "as", "fill"}:
        raise ValueError(f"{recipe}: {name} has {', '.join(sorted(unknown))}; there are weight, as and fill")
    weight, kind, fill = settings.get("weight", 1), settings.get("as"), settings.get("fill", {})
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
        raise ValueError(f"{recipe}: the weight of {name} is {weight!r}; it must be a number above 0")
    if kind not in (None, "text") or (kind and stage != "pretrain"):
        raise ValueError(f"{recipe}: {name} as {kind!r}; conversations can be taken as text, by --stage pretrain")
    if not isinstance(fill, dict):
        raise ValueError(f"{recipe}: fill of {name} is {fill!r}; it must be names and what stands for them")
    form = STAGES["full_sft" if kind else stage].form
    return Part(expand_paths(str(recipe.parent / name)), float(weight), form, bool(kind), fill)


def copies(line: str, weight: float) -> int:
    """Of a row: the weight's whole part, and one more for its rest's share of all rows, chosen by their hash."""
    whole = int(weight)
    return whole + (xxhash.xxh3_64_intdigest(line.encode(), seed=1) < (weight - whole) * 2**64)


def as_text(value: dict[str, Any]) -> dict[str, str]:
    """What user and assistant say in turn; calls of tools and what they answer are none of it."""
    said = [turn["content"] for turn in value["conversations"] if turn["role"] in ("user", "assistant")]
    return {"text": "\n".join(content for content in said if content)}


def rows_of(part: Part, val_fraction: float) -> Iterator[tuple[str, int]]:
    """Each row's line, and how often it is taken."""
    rules = Rules(part.form, max_seq_len=0, val_fraction=val_fraction)
    for row in read_rows(part.paths, part.form):
        value = as_text(row.value) if part.text else row.value
        line = json.dumps(value, ensure_ascii=False)
        for name, text in part.fill.items():
            line = line.replace(f"{{{{{name}}}}}", json.dumps(text, ensure_ascii=False)[1:-1])
        kept_apart = part.text and (is_held_out(row, rules) or not value["text"])
        yield line, 0 if kept_apart else copies(line, part.weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, metavar="FILE.yaml", help="files and weights")
    parser.add_argument("--stage", choices=tuple(STAGES), default="pretrain", help="whose rows they are [pretrain]")
    parser.add_argument("--val_fraction", type=float, default=0.01, help="of the fine-tuning to come [0.01]")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    args = parser.parse_args()
    parts = read_recipe(args.recipe, args.stage)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    table = Table("files", "weight", "rows", "rows written", "MB written")
    with open(args.output, "w", encoding="utf-8", newline="\n") as output:
        for part in parts:
            read = written = size = 0
            for line, times in rows_of(part, args.val_fraction):
                output.write(f"{line}\n" * times)
                read, written, size = read + 1, written + times, size + times * len(line.encode())
            names = ", ".join(Path(path).name for path in part.paths) + (" (as text)" if part.text else "")
            table.add_row(names, f"{part.weight:g}", f"{read:,}", f"{written:,}", f"{size / 1e6:.2f}")
    Console(stderr=True).print(table)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, yaml.YAMLError) as error:
        sys.exit(f"error: {one_line(error)}")
