"""What the files of a model folder have in common: JSON that is whole or not there, and safetensors."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

Shape = tuple[int, ...]


def write_json(path: Path, content: Mapping[str, object]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def open_file(path: Path) -> safe_open:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; weights are read from safetensors files only")
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises its own class for a file that is cut or no safetensors
        raise ValueError(f"{path} cannot be read: {error}") from None


def compare(found: Mapping[str, Shape], wanted: Mapping[str, Shape], what: str) -> None:
    """Raise ValueError, which begins with `what`, unless the same names are there in the same shapes."""
    problems = [f"missing: {name} {wanted[name]}" for name in wanted if name not in found]
    problems += [f"not in this model: {name} {found[name]}" for name in found if name not in wanted]
    problems += [
        f"shape of {name}: found {found[name]}, expected {wanted[name]}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    if problems:
        shown = "\n  ".join(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise ValueError(f"{what} ({len(problems)} keys):\n  {shown}")
