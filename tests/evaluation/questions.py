"""A small benchmark made here: questions of every kind, in two languages, with examples beside them."""

import random
from pathlib import Path
from typing import Any

from tests.helpers import sentence, write_jsonl

Rows = list[dict[str, Any]]


def choices(rng: random.Random, number: int) -> list[str]:
    return [f"{sentence(rng, 1, 9)} {i}" for i in range(number)]


def question_rows(count: int = 6, seed: int = 0) -> dict[str, Rows]:
    """Rows by the name of their file."""
    rng = random.Random(seed)
    found: dict[str, Rows] = {"pick": [], "zh_pick": [], "copa": [], "fill": [], "last": [], "sum": []}
    for i in range(count):
        number = rng.choice([2, 3, 4])
        answer = rng.randrange(number)
        known = {"id": f"q{i}", "subject": ("plants", "stars")[i % 2], "lang": "en"}
        picked = known | {"kind": "choice", "choices": choices(rng, number), "answer": answer}
        passage = f"{sentence(rng, 9, 30)}.\nQuestion: " if i % 3 == 0 else ""
        found["pick"].append(picked | {"task": "pick", "question": f"{passage}{sentence(rng, 3, 20)}?"})
        found["zh_pick"].append(picked | {"task": "zh_pick", "lang": "zh", "question": f"房子{i}在哪里？"})
        found["copa"].append(picked | {"task": "copa", "question": sentence(rng, 3, 9)})
        found["last"].append(
            known | {"task": "last", "kind": "cloze", "question": sentence(rng, 5, 30), "answer": "cat"}
        )
        found["sum"].append(known | {"task": "sum", "kind": "generate", "question": f"{i} + 2 ?", "answer": f"{i + 2}"})
        end = sentence(rng, 3, 6)
        both = [f"{sentence(rng, 2, 5)} {each} {end}" for each in ("cat", "dog")]
        filled = known | {"task": "fill", "kind": "choice", "question": "", "choices": both, "answer": i % 2}
        found["fill"].append(filled | {"suffix": end})
    return found


def write_questions(folder: Path, count: int = 6, examples: int = 0) -> dict[str, Path]:
    """The files, and `examples` of each subject in pick.fewshot.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in question_rows(count).items()}
    if examples:
        write_jsonl(folder / "pick.fewshot.jsonl", question_rows(2 * examples, seed=1)["pick"])
    return paths
