"""The benchmark's other side: transformers' own model of the same shape, trained by the loop one writes first.

    Padded(input_ids, attention_mask, labels, real_tokens, items)     documents padded to the longest of them
    Theirs(start, data, machine)                                      its updates, in turn with ours
    TheirGeneration(start, machine, prompts, ...)                     its `generate`

The documents are those of the same encoded columns, one a row of a batch, cut to the same max_seq_len. A batch takes as
many as fit into the places of our micro-batch when padded, which is kinder to it than a fixed number of documents. Same
dtype by autocast, same AdamW (fused), same clipping; its own attention mask and its own shift of the labels. It is not
compiled. DPO asks a frozen copy for the reference in every update; ours has asked once, before training.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dataset.batch import IGNORE
from model import GPTConfig
from scripts.benchmark_clock import Work
from training import DPO, NextToken
from training.config import Config
from training.engines import Machine, Weights
from training.objectives import Objective
from training.preference import Sigmoid
from training.setup import Data, Start

Sequence = tuple[Tensor, Tensor]  # int64 ids and labels of a document, each (length,); labels are not shifted


@dataclass
class Padded:
    """A batch. Tensors are int64 (sequences, longest)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    real_tokens: int  # that have a next one to be predicted, which is what a packed row holds of a document
    items: int  # documents, or pairs

    def to(self, device: torch.device) -> "Padded":
        ids, mask, labels = (each.to(device) for each in (self.input_ids, self.attention_mask, self.labels))
        return Padded(ids, mask, labels, self.real_tokens, self.items)


def sequences(row: dict[str, Any], max_seq_len: int) -> list[Sequence]:
    """A row of the encoded columns -> its document; of a pair both, chosen first."""
    if "chosen" in row:
        spans = [[row["prompt"], max_seq_len + 1]]
        documents = [row["chosen"], row["rejected"]]
    else:
        spans = torch.tensor(row.get("spans", [0, max_seq_len + 1])).view(-1, 2).tolist()
        documents = [row["ids"]]
    found = []
    for document in documents:
        ids = torch.tensor(document[: max_seq_len + 1])
        labels = torch.full_like(ids, IGNORE)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        found.append((ids, labels))
    return found


def pad(items: list[list[Sequence]]) -> Padded:
    """Documents, or pairs of them, in one batch, padded to the longest."""
    ids, labels = zip(*(sequence for item in items for sequence in item), strict=True)
    lengths = torch.tensor([len(each) for each in ids])
    padded = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    real = int((lengths - 1).sum())
    return Padded(padded(list(ids)), mask, padded(list(labels), padding_value=IGNORE), real, len(items))


def padded_batches(columns: pa.Table, max_seq_len: int, places: int, seed: int) -> Iterator[Padded]:
    """Without end, in a random order: as many documents (or pairs) a batch as fit into `places` when padded."""
    generator = torch.Generator().manual_seed(seed)
    batch: list[list[Sequence]] = []
    longest = 0
    while True:
        for i in torch.randperm(len(columns), generator=generator).tolist():
            (row,) = columns.slice(i, 1).to_pylist()
            item = sequences(row, max_seq_len)
            width = max(longest, *(len(ids) for ids, _ in item))
            if batch and width * len(item) * (len(batch) + 1) > places:
                yield pad(batch)
                batch, width = [], max(len(ids) for ids, _ in item)
            batch, longest = [*batch, item], width


def their_batches(start: Start[Any], data: Data) -> Iterator[Padded]:
    """From the columns that training reads, as large as our micro-batches."""
    rows = data.train.rows
    places = data.train.batch_size * data.train.capacity
    return padded_batches(rows.encoded.columns, start.max_seq_len, places, start.config.seed)


def their_model(shape: GPTConfig, weights: Weights) -> Any:
    """transformers' Llama (Qwen3 where shape.qk_norm) with the same weights, on the CPU."""
    hf = shape.to_hf()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(hf.pop("model_type"), **hf), dtype=torch.float32)
    model.load_state_dict(dict(weights()), strict=False)  # a tied head has no name of its own in ours
    model.tie_weights()
    return model


def next_token_loss(model: nn.Module, reference: nn.Module | None, batch: Padded, config: Config) -> Tensor:
    return model(**inputs(batch), labels=batch.labels).loss


def pair_loss(model: nn.Module, reference: nn.Module | None, batch: Padded, config: Any) -> Tensor:
    """Mean of -log sigmoid(beta * margin) over pairs (arXiv:2305.18290, equation 7)."""
    assert reference is not None
    with torch.no_grad():
        before = answer_logps(reference, batch)
    rewards = config.beta * (answer_logps(model, batch) - before)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()


def answer_logps(model: nn.Module, batch: Padded) -> Tensor:
    """Summed log-probability of every answer, nats: (pairs, 2), chosen first."""
    logits = model(**inputs(batch)).logits[:, :-1].float()
    nll = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="none")
    return -nll.view(batch.items, 2, -1).sum(-1)


def inputs(batch: Padded) -> dict[str, Any]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}


LOSSES: dict[type, Callable[[nn.Module, nn.Module | None, Padded, Any], Tensor]] = {
    NextToken: next_token_loss,
    DPO: pair_loss,
}
"""By the objective that ours has; one that is not here is measured without another side."""


def has_baseline(objective: Objective[Any]) -> bool:
    """Of the losses of preferences only DPO's own has one."""
    return type(objective) in LOSSES and isinstance(getattr(objective, "loss", Sigmoid()), Sigmoid)


class Theirs:
    """Its updates. Weights are those that ours begins with."""

    def __init__(self, start: Start[Any], data: Data, machine: Machine, objective: Objective[Any]):
        self.config, self.device, self.dtype = start.config, machine.device, machine.dtype
        self.loss = LOSSES[type(objective)]
        self.batches, self.accumulation_steps = their_batches(start, data), data.train.accumulation_steps
        self.model = their_model(start.model.config, start.weights).to(self.device).train()
        if self.config.grad_checkpointing:
            self.model.gradient_checkpointing_enable()
        needs_reference = isinstance(objective, DPO)
        self.reference = copy.deepcopy(self.model).eval().requires_grad_(False) if needs_reference else None
        betas = (self.config.beta1, self.config.beta2)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), self.config.learning_rate, betas,
            weight_decay=self.config.weight_decay, fused=self.device.type != "mps",
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def prepare(self, step: int) -> Callable[[], Work]:
        return partial(self.update, [next(self.batches) for _ in range(self.accumulation_steps)])

    def update(self, batches: list[Padded]) -> Work:
        for batch in batches:
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                loss = self.loss(self.model, self.reference, batch.to(self.device), self.config)
            self.scaler.scale(loss / len(batches)).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or float("inf"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Work(sum(batch.real_tokens for batch in batches), sum(batch.items for batch in batches))

    def kept(self) -> Iterator[object]:
        yield from self.model.parameters()
        yield from self.reference.parameters() if self.reference is not None else ()
        yield from (value for state in self.optimizer.state.values() for value in state.values())


class TheirGeneration:
    """`generate` of a batch of prompts of one length; temperature 0 is greedy. Nothing ends before max_new_tokens."""

    def __init__(self, start: Start[Any], machine: Machine, prompts: list[list[int]], **settings: Any):
        self.model = their_model(start.model.config, start.weights).to(machine.device, machine.dtype).eval()
        self.model.generation_config.eos_token_id = None
        self.ids = torch.tensor(prompts, device=machine.device)
        self.new = settings["max_new_tokens"]
        temperature, top_p = settings["temperature"], settings["top_p"]
        drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        self.settings = drawn if temperature else {"do_sample": False}

    def prepare(self, step: int) -> Callable[[], Work]:
        return self.update

    def update(self) -> Work:
        mask = torch.ones_like(self.ids)
        whole = self.model.generate(
            self.ids, attention_mask=mask, max_new_tokens=self.new, pad_token_id=0, **self.settings
        )
        return Work(whole[:, self.ids.shape[1] :].numel())

    def kept(self) -> Iterator[object]:
        yield from self.model.parameters()
