"""An adapter to and from a folder of PEFT's: adapter_config.json and adapter_model.safetensors.

    save_adapter(adapter, weights, "out/full_sft_512")     PeftModel.from_pretrained(base, folder) opens it
    base_folder("out/full_sft_512")                        Path("out/pretrain_512")
    load_adapter("out/full_sft_512", config)               LoRA(rank=16, ...), {"model.layers.0...lora_A": ..., ...}

What PEFT saves is read the same way, where it is of a kind in PEFT_TYPES. What we save knows its base by a hash of the
weights (model/folder.py looks), and PEFT's does not.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.adapters import PEFT_TYPES, SCORING, Adapter, Settings
from model.config import GPTConfig
from model.files import compare, open_file, write_json
from model.gpt import GPT

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WITHIN = "base_model.model."  # what PEFT puts before the name of every parameter
BASE_HASH = "base_hash"  # of the base's weights, among the metadata of the file, which PEFT does not look at


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter in place of a model."""
    return (Path(folder) / CONFIG).is_file() and not (Path(folder) / "config.json").is_file()


def save_adapter(adapter: Adapter, weights: Mapping[str, Tensor], folder: str | Path) -> None:
    """`weights` are the adapter's parameters by name. Each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, adapter.to_peft())
    stored = adapter.packed({name: tensor.detach().cpu() for name, tensor in weights.items()})
    named = {peft_name(name, adapter.theirs): tensor.contiguous() for name, tensor in stored.items()}
    part = folder / f"{WEIGHTS}.part"
    save_file(named, part, metadata={"format": "pt", BASE_HASH: adapter.base_hash})
    os.replace(part, folder / WEIGHTS)


def peft_name(name: str, theirs: Mapping[str, str]) -> str:
    """model.layers.0.self_attn.q_proj.lora_A -> base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"""
    path, _, last = name.rpartition(".")
    return f"{WITHIN}{path}.{theirs.get(last, last)}" if path else name  # one of no module has no path there either


def settings_of(folder: str | Path) -> Settings:
    """The contents of adapter_config.json."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG} here, so this is no adapter")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if settings.get("peft_type") not in PEFT_TYPES:
        raise ValueError(f"{path}: peft_type is {settings.get('peft_type')!r}; expected one of {', '.join(PEFT_TYPES)}")
    return settings


def scores(settings: Settings) -> bool:
    """Whether an adapter makes a network that scores of its base."""
    return settings.get("task_type") == SCORING


def check_saved(settings: Settings) -> None:
    """Raise ValueError for modules that were learnt whole, but for the head of a network that scores."""
    found = settings.get("modules_to_save") or []
    heads = ["score", "classifier"] if scores(settings) else []  # PEFT names both, for networks of any family
    if not set(found) <= set(heads):
        raise ValueError(f"found modules_to_save {found!r}, expected {heads[:1] or None!r}: no other can be opened")


def base_folder(folder: str | Path) -> Path:
    """The model that an adapter stands on: where its config says, or beside it under the same name, as in a tree of
    runs that was moved. Raises FileNotFoundError where it is in neither place."""
    folder = Path(folder)
    name = str(settings_of(folder).get("base_model_name_or_path") or "")
    beside = [parent / Path(name).name for parent in list(folder.absolute().parents)[:2]]
    for place in (Path(name), *beside) if name else ():
        if (place / "config.json").is_file():
            return place
    raise FileNotFoundError(
        f"{folder / CONFIG} says that it stands on {name!r}, which is no model folder here; put it there, or give its "
        "folder as base_model_name_or_path in that file"
    )


def tokenizer_folder(folder: str | Path, adapters: Sequence[str | Path] = ()) -> Path:
    """Where the tokenizer is of a model with these adapters: what was trained last says how it chats, but PEFT saves no
    tokenizer."""
    base = [base_folder(folder)] if is_adapter(folder) else []
    stacked = [*base, Path(folder), *map(Path, adapters)]
    return next((each for each in reversed(stacked) if any(each.glob("tokenizer*"))), Path(folder))


def load_adapter(folder: str | Path, config: GPTConfig) -> tuple[Adapter, dict[str, Tensor]]:
    """Settings and float32 parameters, by our names. `config` is the base's, whichever head that has.

    Raises FileNotFoundError where a file is missing, and ValueError for what cannot be opened or does not fit the base.
    """
    folder, settings = Path(folder), settings_of(folder)
    kind = PEFT_TYPES[settings["peft_type"]]
    file: safe_open = open_file(folder / WEIGHTS)
    ours = {their: our for our, their in kind.theirs.items()}
    names = file.keys()
    found = kind.unpacked({our_name(name, ours): file.get_tensor(name).float() for name in names}, config.n_layers)
    try:
        check_saved(settings)
        adapter = replace(kind.from_peft(settings, found, config.n_layers), scores=scores(settings))
        adapted = replace(config, scores=adapter.scores)
        with torch.device("meta"):
            learnt = [(name, p.shape) for name, p in GPT(adapted, adapter).named_parameters() if p.requires_grad]
    except KeyError as missing:
        raise ValueError(f"{folder / CONFIG}: the key {missing} is missing") from None
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wanted = {name: tuple(shape) for name, shape in learnt}
    compare(shapes, wanted, f"{folder / WEIGHTS}: the weights do not fit {CONFIG} and the base")
    return replace(adapter, base_hash=(file.metadata() or {}).get(BASE_HASH, "")), found


def our_name(name: str, ours: Mapping[str, str]) -> str:
    """The inverse of `peft_name`."""
    name = name.removeprefix(WITHIN)
    end = next((their for their in ours if name.endswith(f".{their}")), None)
    return name if end is None else name.removesuffix(end) + ours[end]
