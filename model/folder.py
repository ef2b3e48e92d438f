"""A network to and from a Hugging Face model folder: config.json, model.safetensors, generation_config.json.

    save_pretrained(model, "out/pretrain_512")            AutoModelForCausalLM.from_pretrained opens it, no custom code
    load_pretrained("out/pretrain_512")                   a GPT in eval mode; also opens Llama and Qwen3 folders
    load_pretrained("out/reward_512")                     one that scores; AutoModelForSequenceClassification opens it

Weights are read from safetensors only (a pickle can run code), and every key must be there in its shape. A folder of an
adapter opens as the plain model that it makes of its base.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.adapter_folder import base_folder, is_adapter, load_adapter, scores, settings_of
from model.adapters import Adapter, Named, body, merged
from model.config import GPTConfig
from model.files import compare, open_file, write_json
from model.gpt import GPT


def save_pretrained(
    model: GPT,
    folder: str | Path,
    *,
    weights: dict[str, Tensor] | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | None = None,
) -> None:
    """Write config, weights (float32 as they are trained, or another `dtype`) and generation settings.

    Each file appears whole or not at all. `weights` are full tensors by parameter name, for a model that does not hold
    them itself (a sharded one). `max_shard_size` ("2GB") spreads them over several files, with an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    tokens = {key: value for key, value in tokens.items() if value is not None}
    named = dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    write_json(folder / "config.json", model.config.to_hf() | named | tokens)
    sampling: dict[str, object] = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    if not model.config.scores:
        write_json(folder / "generation_config.json", sampling | tokens)
    weights = model.state_dict() if weights is None else weights
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()}
    if max_shard_size is not None:
        from huggingface_hub import save_torch_state_dict  # only for folders that are given away

        save_torch_state_dict(weights, folder, max_shard_size=max_shard_size)
        return
    part = folder / "model.safetensors.part"
    save_file(weights, part, metadata={"format": "pt"})
    os.replace(part, folder / "model.safetensors")


def load_config(folder: str | Path) -> GPTConfig:
    """Read config.json, an adapter's base's, whose head gives way where the adapter scores. Raises FileNotFoundError
    where there is none, ValueError where it is not ours to open."""
    if is_adapter(folder):
        base = load_config(base_folder(folder))
        return replace(base, scores=base.scores or scores(settings_of(folder)))
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json here, so this is not a model folder")
    try:
        return GPTConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))
    except KeyError as missing:
        raise ValueError(f"{path}: the key {missing} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_pretrained(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    adapters: Sequence[str | Path] = (),
) -> GPT:
    """Open a model folder, in eval mode, with the adapters of other folders merged into it one after another. One of a
    kind that does not merge stays beside the weights, and must be the last.

    Raises FileNotFoundError where a file is missing and ValueError, listing the keys, where the weights are not
    exactly those of config.json, and where the first adapter was learnt on other weights. Those after it change what it
    has made of the base, and nobody can say whether that is what they were learnt on.
    """
    config = load_config(folder)
    stacked = [*([folder] if is_adapter(folder) else []), *adapters]
    weights: Iterable[Named] = base_weights(folder, stacked[0]) if stacked else folder_weights(folder)
    beside: Adapter | None = None
    for each in stacked:
        if beside is not None:
            raise ValueError(f"{each}: a {beside.kind} adapter does not merge, so none can come after it; give it last")
        adapter, learnt = load_adapter(each, config)
        if adapter.scores:
            config, weights = replace(config, scores=True), body(weights)
        if adapter.merges:
            weights = merged(weights, adapter, learnt)
        else:
            beside, weights = adapter, itertools.chain(weights, learnt.items())
    return assemble(config, weights, device, dtype, beside)


def assemble(
    config: GPTConfig,
    weights: Iterable[Named],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    adapter: Adapter | None = None,
) -> GPT:
    """A model of these full tensors, by parameter name, in eval mode."""
    with torch.device("meta"):
        model = GPT(config, adapter)
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in weights}, assign=True)
    return model.eval()


def folder_weights(folder: str | Path) -> Iterator[Named]:
    """Name and full tensor of every parameter, read one at a time from model.safetensors, or from the shards that
    model.safetensors.index.json names; of an adapter, merged with its base's. Raises as `load_pretrained` does, before
    the first tensor is read."""
    config = load_config(folder)
    if is_adapter(folder):
        adapter, learnt = load_adapter(folder, config)
        base = base_weights(folder, folder)
        yield from merged(body(base) if adapter.scores else base, adapter, learnt)
        return
    with torch.device("meta"):
        wanted = {name: tuple(parameter.shape) for name, parameter in GPT(config).named_parameters()}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_file(path)) for path in weight_files(Path(folder))]
        holder = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # not a dict
        check_weights(holder, wanted, config.tie_embeddings, folder)
        for name in wanted:
            yield name, holder[name].get_tensor(name).float()


def base_weights(folder: str | Path, adapter: str | Path) -> Iterator[Named]:
    """Weights of a model folder, or of an adapter's base, for the adapter of the second folder to stand on.

    Raises ValueError, behind the last of them, where that was learnt on others.
    """
    base = base_folder(folder) if is_adapter(folder) else folder
    expected, digest = load_adapter(adapter, load_config(base))[0].base_hash, xxhash.xxh3_128()
    for name, weight in folder_weights(base):
        absorb(digest, name, weight)
        yield name, weight
    if expected and digest.hexdigest() != expected:
        raise ValueError(
            f"{adapter} was learnt on other weights than {base} has: their hash is {digest.hexdigest()}, expected "
            f"{expected}. Put back the model that it was learnt on, or say where it is (base_model_name_or_path in "
            "adapter_config.json, or --model), or learn the adapter anew on this one"
        )


def weights_hash(weights: Callable[[], Iterable[Named]]) -> str:
    """Hash of all weights, by name."""
    digest = xxhash.xxh3_128()
    for name, weight in weights():
        absorb(digest, name, weight)
    return digest.hexdigest()


def absorb(digest: xxhash.xxh3_128, name: str, weight: Tensor) -> None:
    digest.update(name.encode())
    digest.update(weight.contiguous().numpy().tobytes())


def weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


def check_weights(
    holder: dict[str, safe_open], wanted: dict[str, tuple[int, ...]], tied: bool, folder: str | Path
) -> None:
    """Raise ValueError unless the files hold exactly the wanted weights. What older exports add is let pass: the rotary
    table, which is computed here, and a tied head stored twice (equal)."""
    found = {
        name: tuple(file.get_slice(name).get_shape())
        for name, file in holder.items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    twice = tied and head in found and embedding in found
    if twice and torch.equal(holder[head].get_tensor(head), holder[embedding].get_tensor(embedding)):
        del found[head]
    compare(found, wanted, f"{folder}: the weights do not fit config.json")
