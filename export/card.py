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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from dataset.hub import SCHEME
from dataset.records import expand_paths, read_lines
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
        usage(model, about.name, stage),
        training(settings, stage, run),
        numbers("Measured at the end of training", last_values(run / "metrics.jsonl")),
        benchmarks(run / "benchmark.json"),
        "## Loss\n\n![loss](loss.png)" if (run / "loss.png").is_file() else "",
    ]
    return f"---\n{front_matter(model, about, stage)}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def front_matter(model: GPT, about: About, stage: str | None) -> str:
    return ModelCardData(
        license=about.license,
        language=list(about.languages) or None,
        library_name="transformers",
        pipeline_tag="text-classification" if model.config.scores else "text-generation",
        tags=["seedling", *([stage.replace("_", "-")] if stage else [])],
    ).to_yaml()


def shape(model: GPT) -> str:
    config = model.config
    family = "Qwen3" if config.qk_norm else "Llama"
    return (
        f"A {family}-style model of {model.num_parameters() / 1e6:.1f} M parameters: {config.n_layers} layers of width "
        f"{config.dim}, {config.n_heads} query heads and {config.n_kv_heads} key and value heads, a vocabulary of "
        f"{config.vocab_size:,}, a context of {config.max_seq_len:,} tokens."
    )


def usage(model: GPT, name: str, stage: str | None) -> str:
    """How transformers opens it: a model that writes on, one that chats, or one that scores a chat."""
    opened = "AutoModelForSequenceClassification" if model.config.scores else "AutoModelForCausalLM"
    chat = '{"role": "user", "content": "Who are you?"}'
    if model.config.scores:
        chat += ', {"role": "assistant", "content": "A small model."}'
    asked = "" if model.config.scores else "add_generation_prompt=True, "
    inputs = f"tokenizer.apply_chat_template([{chat}], {asked}return_dict=True, return_tensors='pt')"
    lines = [
        f"from transformers import {opened}, AutoTokenizer",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = {opened}.from_pretrained("{name}")',
        f"inputs = {inputs if stage != 'pretrain' else PLAIN}",
        f"print({'model(**inputs).logits' if model.config.scores else WRITTEN})",
    ]
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


PLAIN = "tokenizer('Once upon a time', return_tensors='pt')"
WRITTEN = "tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0])"


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
    if not isinstance(value, str) or "/" not in value or value.startswith(SCHEME):
        return value
    hub = re.search(r"(?:models|datasets)--(.+?)--(.+?)/snapshots/[^/]+/?(.*)", value)
    return "/".join(filter(None, hub.groups())) if hub else Path(value).name


def rows_of(path: str) -> str:
    """Lines of a file (or of all that a glob means) that are not blank, where it still lies where the run read it."""
    rows = 0
    try:
        for each in expand_paths(path):
            with open(each, "rb") as file:
                rows += sum(bool(line.strip()) for _, line in read_lines(each, file))
    except (OSError, ValueError) as error:
        return f"not read again: {type(error).__name__}"
    return f"{rows:,}"


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


def benchmarks(path: Path) -> str:
    """A line a task, each beside what guessing would get. Raises ValueError for a file that eval_model.py did not
    write."""
    if not path.is_file():
        return ""
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
        lines = [
            f"| {each['name']} | {each['items']:,} | {each['accuracy']:.1%} ({each['low']:.1%} to {each['high']:.1%}) "
            f"| {each['chance']:.1%} |"
            for each in scores
            if each["group"] == "task"
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: found no scores of eval_model.py ({error}); make it again") from None
    heads = "| task | items | accuracy, 95 % interval | guessing |\n|---|---|---|---|"
    return "\n".join(["## Benchmarks", "", heads, *lines])


def numbers(title: str, values: dict[str, float]) -> str:
    if not values:
        return ""
    rows = [f"| {name.replace('_', ' ')} | {value:,.4g} |" for name, value in values.items()]
    return f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(rows)
