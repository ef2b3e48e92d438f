"""Flags in, the adapter that a run learns out; and back, for what a folder decides.

    adapter = adapter_of(config, "out/pretrain_512", tokenizer, shape)    LoRA(rank=16, ..., base="out/pretrain_512")
    flags_of(adapter)                                                     {"lora_rank": 16, "lora_targets": "all", ...}

A setting `rank` of the kind `lora` is the flag --lora_rank. Where a run starts from an adapter's folder it goes on with
that adapter, on the same base.
"""

from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from dataset.tokenizer import TextTokenizer
from model import GPT
from model.adapter_folder import base_folder, is_adapter, load_adapter
from model.adapters import ADAPTERS, ATTENTION, LINEAR, SCORE, Adapter, Named, begun, body
from model.config import GPTConfig
from model.folder import base_weights, folder_weights, weights_hash
from model.gpt import with_score
from training.config import Config, rules, stage_of
from training.engines.contract import Weights

TARGETS = {"all": LINEAR, "attention": ATTENTION}


def adapter_of(asked: Config, init: str, tokenizer: TextTokenizer, shape: GPTConfig) -> Adapter | None:
    """Raises ValueError where there is nothing to adapt, and for a flag that contradicts the adapter's folder."""
    if asked.adapter is None:
        return None
    if init == "none":
        raise ValueError(
            f"--adapter {asked.adapter} leaves the model's own weights as they are, and random ones are worth nothing; "
            "give the model to start from with --init_from FOLDER_OR_RUN"
        )
    adapter = found_adapter(asked, init, shape) if is_adapter(init) else new_adapter(asked, init, tokenizer)
    # what PEFT has made does not know its base
    known = adapter.base_hash or weights_hash(partial(folder_weights, adapter.base))
    return replace(adapter, base_hash=known, scores=asked.scores)


def new_adapter(asked: Config, init: str, tokenizer: TextTokenizer) -> Adapter:
    kind = ADAPTERS[asked.adapter or ""]
    wanted = asked.train_control_tokens
    if wanted is None:  # a pretrained model has never seen them, any other has
        wanted = kind.chats and asked.chats and stage_of(Path(init)) == "pretrain"
    return kind(**settings_of(asked), tokens=tuple(sorted(tokenizer.control_ids)) if wanted else (), base=init)


def found_adapter(asked: Config, init: str, shape: GPTConfig) -> Adapter:
    """The adapter of a folder, to go on with."""
    adapter, _ = load_adapter(init, shape)
    flags = flags_of(adapter)
    for name in flags:
        wanted, found = getattr(asked, name), flags[name]
        if not name.endswith("_dropout") and wanted is not None and wanted != found:
            merge = ", or make a model of it to adapt anew: python scripts/convert.py --to adapter_merged"
            anew = merge if adapter.merges else ""
            raise ValueError(
                f"--{name} {wanted} contradicts the adapter in {init}, which has {found}; leave the flag out to go on "
                f"with that one{anew}"
            )
    own: dict[str, Any] = (
        {"dropout": asked.lora_dropout} if "lora_dropout" in flags else {}
    )  # it belongs to training alone
    return replace(adapter, base=str(base_folder(init)), **own)


def newly_adapted(model: GPT, init: str | None) -> bool:
    """Whether a run begins with an adapter that has learnt nothing yet, so that it starts from the base alone."""
    return model.adapter is not None and not is_adapter(init or "none")


def settings_of(asked: Config) -> dict[str, Any]:
    """Of an adapter, what flags say."""
    names = {field.name: f"{asked.adapter}_{field.name}" for field in fields(ADAPTERS[asked.adapter or ""])}
    given = {name: getattr(asked, flag, None) for name, flag in names.items()}
    if isinstance(targets := given.get("targets"), str):
        given["targets"] = TARGETS.get(targets) or tuple(name.strip() for name in targets.split(","))
    return {name: value for name, value in given.items() if value is not None}


def flags_of(adapter: Adapter | None) -> dict[str, Any]:
    """The flags that make this adapter."""
    if adapter is None:
        return {}
    flags = {f"{adapter.kind}_{field.name}": getattr(adapter, field.name) for field in fields(adapter)}
    flags |= {"adapter": adapter.kind, "train_control_tokens": bool(adapter.tokens)}
    if targets := flags.get("lora_targets"):
        named = (word for word, names in TARGETS.items() if set(names) == set(targets))
        flags["lora_targets"] = next(named, ",".join(targets))
    return {name: value for name, value in flags.items() if name in rules(Config)}


def adapted_weights(adapter: Adapter, init: str, shape: GPTConfig, found: Weights, seed: int) -> Weights:
    """Weights of the base, and the adapter's: those of its folder, or first ones, beside what was found."""
    return partial(beside_base, init, shape, seed) if is_adapter(init) else lambda: begun(found(), adapter, seed)


def beside_base(init: str, shape: GPTConfig, seed: int) -> Iterator[Named]:
    """Of an adapter's folder, with a new head where one that wrote is to score."""
    _, learnt = load_adapter(init, shape)
    weights: Iterable[Named] = base_weights(init, init)
    if SCORE in learnt:
        weights = body(weights)
    weights = chain(weights, learnt.items())
    yield from with_score(weights, shape, seed) if shape.scores and SCORE not in learnt else weights
