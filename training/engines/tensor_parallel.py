"""Every matrix of a model cut over the ranks of a mesh (tensor parallel: Shoeybi et al. 2019, arXiv:1909.08053).

    split_tensors(model, mesh)        in place, on the meta device; its parameters are DTensors then

A block of two tensor ranks, `x` a rank's half of every row (sequence parallel: Korthikanti et al. 2022,
arXiv:2205.05198):

    norm                   of its own half                              weight whole
    q, k, v / gate, up     gather the row; half of the heads / columns  weight cut by rows, (out / 2, in)
    attention, silu        of its own heads / columns
    o / down               a part of every number; summed and scattered weight cut by columns, (out, in / 2)

So a block gathers twice and scatters twice, forwards and backwards, and what lies between blocks is in parts too. The
vocabulary is cut likewise: a rank looks up the tokens that it has, makes the logits of its own, and the loss is put
together from maximum, sum and target of all (`CrossEntropy`). No rank ever has whole logits.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, _random, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from model import GPT
from model.adapters import LearntRows
from model.gpt import Criterion, Losses, computed_in, cross_entropy

# a norm over a mesh of two dimensions is summed along one after the other, of which torch warns at every step
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
SEQUENCE, HEADS = 1, 2  # dimensions of (rows, sequence, heads, head_dim)


def split_tensors(model: GPT, mesh: DeviceMesh) -> None:
    """Cut a model, or a pipeline's part of one, over a mesh of one dimension. It stands on the meta device."""
    model.__class__ = SplitGPT
    split, decoder, ranks = cast(SplitGPT, model), model.model, mesh.size()
    split.tensors = mesh
    shape = decoder.config
    # what attention plans for are the heads of this rank
    decoder.config = replace(shape, n_heads=shape.n_heads // ranks, n_kv_heads=shape.n_kv_heads // ranks)
    learnt = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for block in model.blocks():
        parallelize_module(block, mesh, styles(block))
        for name in ("self_attn", "mlp"):
            block.get_submodule(name).register_forward_pre_hook(gather_input)
    if isinstance(decoder.norm, nn.Module):
        parallelize_module(decoder.norm, mesh, SequenceParallel(sequence_dim=SEQUENCE))
    if isinstance(decoder.embed_tokens, nn.Module):
        decoder.embed_tokens.forward = partial(look_up, decoder.embed_tokens, mesh)  # type: ignore[method-assign]
    place_parameters(model, mesh, learnt)
    if mesh.device_type == "cuda":
        # else in the first dropout of a part all ranks there are would meet, whatever stage they have, and go on with
        # the first one's random numbers; which ones these are is settled later
        _random.manual_seed(torch.initial_seed(), mesh)
    model.compiled = partial(in_parts, CrossEntropy(mesh, shape.vocab_size))


def styles(block: nn.Module) -> dict[str, ParallelStyle]:
    """How each module of a block is cut, those that it has."""
    columns = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ColwiseParallel())
    columns |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), ColwiseParallel())
    rows = dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), RowwiseParallel(output_layouts=Shard(SEQUENCE)))
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), SequenceParallel(sequence_dim=SEQUENCE))
    # of a rank's own heads: a gradient of theirs alone would be wrong, and nothing would say so
    of_heads = SequenceParallel(sequence_dim=HEADS, use_local_output=True)
    heads = dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), of_heads)
    there = {name for name, _ in block.named_modules()}
    return {name: style for name, style in (columns | rows | norms | heads).items() if name in there}


def place_parameters(model: GPT, mesh: DeviceMesh, learnt: dict[str, bool]) -> None:
    """Every parameter a DTensor, so that optimizer, clipping and files meet one kind. Those of adapters are whole, as
    they are small; styles know nothing of them, nor of what is learnt."""
    vocabulary = (model.model.embed_tokens, model.lm_head)
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if module in vocabulary and name == "weight":
                placement: Any = Shard(0)
            elif isinstance(parameter, DTensor) and name == "weight":
                continue
            else:
                placement = Replicate()
            whole = torch.empty(parameter.shape, device="meta")
            module.register_parameter(name, nn.Parameter(distribute_tensor(whole, mesh, [placement])))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learnt[name])


class SplitGPT(GPT):
    """A GPT whose tensors are cut. Hidden states are DTensors in it, each rank's of its part of the rows."""

    tensors: DeviceMesh

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the vocabulary; a score's one row is everywhere."""
        if self.score is not None:
            return cast(DTensor, self.score.weight).to_local()
        return rows_here(self.lm_head or self.model.embed_tokens, self.tensors)

    def compile_parts(self, backend: Any = "inductor") -> None:
        """The blocks; the loss of a chunk stays what its ranks make of it together."""
        together = self.compiled
        super().compile_parts(backend)
        self.compiled = together

    def said(
        self, hidden: Tensor, labels: Tensor, learnt: Tensor | None = None, criterion: Criterion | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        # each rank's logits give a part of the gradient; a score's is the same on all
        of_gradient = Partial() if self.score is None else Replicate()
        whole = cast(DTensor, gathered(hidden)).to_local(grad_placements=[of_gradient])
        return super().said(whole, labels, learnt, criterion)


def gather_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return gathered(inputs[0]), *inputs[1:]


def gathered(x: Tensor) -> Tensor:
    """Whole rows on every rank, in the type that they are multiplied in: under autocast half the bytes."""
    return cast(DTensor, x.to(computed_in(x))).redistribute(placements=[Replicate()])


# The vocabulary -------------------------------------------------------------------------------------------------------


def share_of(rows: int, mesh: DeviceMesh) -> tuple[int, int]:
    """The first of this rank's rows, and how many a rank has at most: the last ones may have fewer."""
    most = math.ceil(rows / mesh.size())
    return most * mesh.get_local_rank(), most


def rows_here(module: nn.Module, mesh: DeviceMesh) -> Tensor:
    """This rank's rows of an embedding or a head, (most, dim): zeros where it has fewer, so that all ranks cut their
    work into equal chunks."""
    weight = cast(DTensor, module.weight)
    first, most = share_of(len(weight), mesh)
    rows = weight.to_local()
    if isinstance(module, LearntRows):
        learnt = cast(DTensor, module.trainable_tokens_delta).to_local(grad_placements=[Partial()])
        places, which = learnt_here(module, first, rows)
        rows = rows.index_copy(0, places, learnt.index_select(0, which))
    return F.pad(rows, (0, 0, 0, most - len(rows))) if len(rows) < most else rows


def learnt_here(module: LearntRows, first: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Places in this rank's rows of those that are learnt there, and which of all these they are; int64. Found once, on
    the host: how many there are is a question that a GPU would be waited for."""
    found = vars(module).get("here")
    if found is None or found[0].device != rows.device:
        places = module.index.cpu() - first
        which = ((places >= 0) & (places < len(rows))).nonzero()[:, 0]
        found = vars(module)["here"] = places[which].to(rows.device), which.to(rows.device)
    return found


def look_up(module: nn.Module, mesh: DeviceMesh, ids: Tensor) -> Tensor:
    """ids (rows, sequence) -> this rank's part of every row's embeddings, (rows, sequence / ranks, dim)."""
    rows = rows_here(module, mesh)
    first, most = share_of(len(cast(Tensor, module.weight)), mesh)
    here = (ids >= first) & (ids < first + most)
    x = F.embedding(torch.where(here, ids - first, 0), rows) * here[..., None]
    found = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    return found.redistribute(placements=[Shard(SEQUENCE)]).to_local()


class CrossEntropy:
    """model.gpt.cross_entropy of logits whose columns are cut over ranks: the same losses on each of them, and the
    gradient of its own columns."""

    def __init__(self, mesh: DeviceMesh, vocabulary: int):
        self.group = mesh.get_group()
        self.first, most = share_of(vocabulary, mesh)
        self.own = max(0, min(most, vocabulary - self.first))  # columns that are tokens

    def __call__(self, logits: Tensor, targets: Tensor) -> Losses:
        """logits: (tokens, columns of this rank); targets: int64 (tokens,), of the whole vocabulary."""
        own = logits[:, : self.own].float()
        highest = own.amax(-1)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        own = own - highest[:, None]
        here = (targets >= self.first) & (targets < self.first + self.own)
        column = torch.where(here, targets - self.first, 0)[:, None]
        target = own.gather(1, column)[:, 0] * here
        softmax = own.exp_()
        both = torch.stack((softmax.sum(-1), target))
        dist.all_reduce(both, group=self.group)
        total, target = both
        softmax = softmax.div_(total[:, None]).scatter_add_(1, column, -here[:, None].float())
        gradient = F.pad(softmax, (0, logits.shape[1] - self.own)).to(logits.dtype)
        return Losses(total.log() - target, gradient)


def in_parts(parts: CrossEntropy, function: Callable[..., Losses]) -> Callable[..., Losses]:
    """What the function of a chunk's losses becomes. Others than cross-entropy are of stages that are not split."""
    assert function is cross_entropy, function
    return parts
