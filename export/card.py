"""A model card, the README.md of a model's page, made of what its run left behind.

    out/full_sft_512/config.yaml    the stage, the data files, every flag
    out/full_sft_512/metrics.jsonl  {"step": 600, "loss": 1.52, "val_loss": 1.61, ...}: the last of each number
    out/full_sft_512/benchmark.json scores, where the model was judged
    out/full_sft_512/loss.png       its curve, copied beside the card

What is not there is left out; a folder that no run made gets a card of its shape alone.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from dataset.records import DataError, read_lines
from model import GPT

MEASURED = re.compile(r"^(loss|val_.+|reward.*|pass_at_1|tokens|seconds)$")  # of metrics.jsonl, what says how it ended


@dataclass
class About:
    """What only who gives a model away can say."""

    name: str
    license: str | None = None
    languages: tuple[str, ...] = ()


def write_card(model: GPT, run: Path, folder: Path, about: About) -> None:
    """README.md in `folder`, of the run whose folder is `run`; its plot goes with it."""
    if (run / "loss.png").is_file():
        shutil.copyfile(run / "loss.png", folder / "loss.png")
    (folder / "README.md").write_text(card(model, run, about), encoding="utf-8")


def card(model: GPT, run: Path, about: About) -> str:
    settings, stage = read_settings(run / "config.yaml")
    sections = [
        f"# {about.name}",
        shape(model),
        usage(about.name, stage),
        training(settings, stage, run),
        numbers("Measured at the end of training", last_values(run / "metrics.jsonl")),
        numbers("Benchmarks", dict(flat(read_json(run / "benchmark.json")))),
        "## Loss\n\n![loss](loss.png)" if (run / "loss.png").is_file() else "",
    ]
    return f"---\n{front_matter(about, stage)}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def front_matter(about: About, stage: str | None) -> str:
    tags = ["seedling", *([stage.replace("_", "-")] if stage else [])]
    return ModelCardData(
        license=about.license,
        language=list(about.languages) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
    ).to_yaml()


def shape(model: GPT) -> str:
    config = model.config
    family = "Qwen3" if config.qk_norm else "Llama"
    return (
        f"A {family}-style model of {model.num_parameters() / 1e6:.1f} M parameters: {config.n_layers} layers of width "
        f"{config.dim}, {config.n_heads} query heads and {config.n_kv_heads} key and value heads, a vocabulary of "
        f"{config.vocab_size:,}, a context of {config.max_seq_len:,} tokens."
    )


def usage(name: str, stage: str | None) -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
    ]
    if stage == "pretrain":
        lines.append('inputs = tokenizer("Once upon a time", return_tensors="pt")')
    else:
        lines.append('messages = [{"role": "user", "content": "Who are you?"}]')
        asked = "add_generation_prompt=True, return_dict=True, return_tensors='pt'"
        lines.append(f"inputs = tokenizer.apply_chat_template(messages, {asked})")
    lines.append("print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))")
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def training(settings: dict[str, Any], stage: str | None, run: Path) -> str:
    """The stage, what it started from and learnt from, and every flag."""
    if not settings:
        return ""
    shown = {name: without_folders(value) for name, value in settings.items()}
    lines = [f"Stage: {stage or 'unknown'}. Started from: {shown.get('init_from', 'random weights')}.", ""]
    lines += ["| data file | rows |", "|---|---|"]
    lines += [f"| {without_folders(path)} | {rows_of(path)} |" for path in settings.get("data_path", [])]
    flags = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).strip()
    lines += ["", "<details><summary>All flags</summary>", "", f"```yaml\n{flags}\n```", "", "</details>"]
    return "## Training\n\n" + "\n".join(lines)


def without_folders(value: Any) -> Any:
    """Paths shortened to what they end in: where they lie is nobody else's business. A hub's file by its name there."""
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    hub = re.search(r"(?:models|datasets)--(.+?)--(.+?)/snapshots/[^/]+/?(.*)", value)
    return "/".join(filter(None, hub.groups())) if hub else Path(value).name


def rows_of(path: str) -> str:
    """Lines of a data file that are not blank, where it still lies where the run read it."""
    try:
        with open(path, "rb") as file:
            return f"{sum(bool(line.strip()) for _, line in read_lines(path, file)):,}"
    except (OSError, DataError):
        return "no longer there"


def read_settings(path: Path) -> tuple[dict[str, Any], str | None]:
    """Flags by name, and the stage that the first line tells."""
    if not path.is_file():
        return {}, None
    text = path.read_text(encoding="utf-8")
    found = re.match(r"# python train_(\w+)\.py ", text)
    return yaml.safe_load(text) or {}, found[1] if found else None


def last_values(path: Path) -> dict[str, float]:
    """The last value of each number of a metrics.jsonl."""
    values: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:  # the torn line of a run that was killed
            continue
        values |= {k: v for k, v in record.items() if MEASURED.match(k) and isinstance(v, (int, float))}
    return values


def read_json(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def flat(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    """{"tasks": {"arc": {"accuracy": 0.27}}} -> ("tasks arc accuracy", 0.27): the numbers in it."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from flat(each, f"{name} {key}".strip())
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value


def numbers(title: str, values: dict[str, float]) -> str:
    if not values:
        return ""
    rows = [f"| {name.replace('_', ' ')} | {value:,.4g} |" for name, value in values.items()]
    return f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(rows)
