"""A checkpoint of any split of the model is read by any other, by one process and by what splits nothing, and back.

Every layout writes a checkpoint after three updates and reads what the others wrote, twice:

again    without an update: the model folder is the writer's, byte for byte, and the state the same numbers
on       for two updates: losses and places in the data of a run that was never interrupted

pytest -m slow -s tests/resume/test_split_checkpoints.py       all layouts; prints how far losses were off
"""

import json
import shutil
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from model import load_pretrained
from tests.helpers import LORA, losses, make_data, metrics, no_pictures, stage_flags, train_here, train_many
from training import PretrainConfig, build_engine, checkpoint
from training.distributed import World
from training.engines import Machine, torch_files

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
WRITTEN, ENDED = 3, 5  # updates
ROWS = 8  # of an update, whatever the layout
# a flat learning rate, so that stopping early changes nothing but where the run stands
FLAT = ["--lr_schedule", "wsd", "--decay_fraction", 0, "--warmup_steps", 1, "--learning_rate", 1e-3, "--min_lr", 1e-3]
NOT_MODEL = {".lock", "checkpoints", "config.yaml", "metrics.jsonl", "loss.png"}  # of a run's folder


class Layout(NamedTuple):
    """How many ranks, how many of these hold the model between them, and their flags."""

    ranks: int
    tp: int = 1
    pp: int = 1
    flags: str = ""

    @property
    def all_flags(self) -> list[Any]:
        """With micro-batches as large as may be: one an update, for a pipeline two."""
        count = self.ranks // (self.tp * self.pp) * (2 if self.pp > 1 else 1)
        rows = ["--global_batch_size", ROWS, "--batch_size", ROWS // count]
        return [*rows, "--tp", self.tp, "--pp", self.pp, *self.flags.split()]


LAYOUTS = {
    "single": Layout(1),
    "ddp2": Layout(2, flags="--engine ddp"),
    "fsdp2": Layout(2, flags="--engine fsdp"),
    "ZeRO-2 x 2": Layout(2, flags="--engine deepspeed --zero_stage 2"),
    "ZeRO-3 x 2": Layout(2, flags="--engine deepspeed --zero_stage 3"),
    "tp2": Layout(2, tp=2),
    "pp2 1f1b": Layout(2, pp=2),
    "pp2 zb": Layout(2, pp=2, flags="--pp_schedule zb"),
    "pp2 zbv": Layout(2, pp=2, flags="--pp_schedule zbv"),
    "pp2 interleaved, fsdp": Layout(2, pp=2, flags="--pp_schedule interleaved --engine fsdp"),
    "pp2 x ddp2": Layout(4, pp=2),
    "pp2 x fsdp2": Layout(4, pp=2, flags="--engine fsdp"),
    "tp2 x fsdp2": Layout(4, tp=2),
    "pp2 x tp2": Layout(4, tp=2, pp=2),
    "pp2 x tp2 x fsdp2": Layout(8, tp=2, pp=2),
}
SPLIT = [name for name, layout in LAYOUTS.items() if layout.tp * layout.pp > 1]
FILES_OF_ITS_OWN = [name for name in LAYOUTS if name.startswith("ZeRO")]
IN_THE_BACKGROUND = ("pp2 zbv", "pp2 x tp2", "pp2 x tp2 x fsdp2")
CUT = ("single", "tp2", "pp2 zbv")  # what every run of the tests has
OLDER = "single, as once"  # with the optimizer's settings in its state
ROBBED = "single, robbed"  # of what the optimizer knew of one matrix
PAIRS = [("single", "tp2"), ("tp2", "pp2 zbv"), ("pp2 zbv", "single"), ("single", OLDER)]
ADAPTED = "tp2"


# Runs -----------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One command: a layout, in which folder, up to which update, from which writer's checkpoint."""

    layout: str
    out: Path
    step: int
    source: Path | None = None
    stage: str = "pretrain"
    more: tuple[Any, ...] = ()

    def flags(self, base: Path) -> list[Any]:
        own = {"pretrain": ["--n_layers", 4], "full_sft": ["--init_from", written(base, "single"), *LORA]}[self.stage]
        flags = [*stage_flags(base, self.stage, self.out), *own, *FLAT, *LAYOUTS[self.layout].all_flags]
        resume = [] if self.source is None else ["--resume", checkpoint_of(self.source)]
        return [*flags, "--max_steps", self.step, *resume, *self.more]


def train(base: Path, runs: Iterable[Run]) -> None:
    """One process does its own here; of the others, those of as many ranks are one launch, or a few."""
    by_ranks = sorted(runs, key=lambda run: LAYOUTS[run.layout].ranks)
    for ranks, group in groupby(by_ranks, key=lambda run: LAYOUTS[run.layout].ranks):
        commands = [(run.stage, run.flags(base)) for run in group]
        if ranks == 1:
            with no_pictures():
                for stage, flags in commands:
                    train_here(stage, *flags)
            continue
        most = 96 // ranks  # of a launch, which must end in ten minutes
        for first in range(0, len(commands), most):
            train_many(base, commands[first : first + most], ranks=ranks)


def written(base: Path, writer: str, stage: str = "pretrain") -> Path:
    return base / "written" / writer / f"{stage}_32"


def read(base: Path, kind: str, reader: str, writer: str, stage: str = "pretrain") -> Path:
    return base / kind / reader / writer / f"{stage}_32"


def checkpoint_of(run: Path, step: int = WRITTEN) -> Path:
    return run / "checkpoints" / f"step_{step:06d}"


def writing(base: Path, writer: str, stage: str = "pretrain") -> Run:
    return Run(writer, written(base, writer).parent, WRITTEN, stage=stage)


def reading(base: Path, reader: str, writer: str, stage: str = "pretrain") -> list[Run]:
    source = written(base, writer, stage)
    kinds = (("again", WRITTEN), ("on", ENDED))
    return [Run(reader, read(base, kind, reader, writer).parent, step, source, stage) for kind, step in kinds]


def uninterrupted(base: Path, layout: str) -> Run:
    """With dropout, and a checkpoint on the way, in the background where the layout says so."""
    how = ("--async_save",) if layout in IN_THE_BACKGROUND else ()
    return Run(layout, base / "dropout" / layout, ENDED, more=("--dropout", 0.1, "--save_interval", WRITTEN, *how))


def interrupted(base: Path, layout: str) -> Run:
    whole = uninterrupted(base, layout)
    return whole._replace(out=base / "dropout, on" / layout, source=whole.out / "pretrain_32")


def begin(base: Path) -> None:
    """Data, one process that is not interrupted, and one that is."""
    make_data(base)
    train(base, [Run("single", base / "whole", ENDED), writing(base, "single")])


# What comes of them ---------------------------------------------------------------------------------------------------


def model_files(run: Path) -> dict[str, bytes]:
    return {path.name: content(path) for path in run.iterdir() if path.name not in NOT_MODEL and path.is_file()}


def content(path: Path) -> bytes:
    """Of an adapter's weights without the header, whose two entries of metadata are in no order."""
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little") if path.name == "adapter_model.safetensors" else 0
    return path.read_bytes()[header:]


def weights(run: Path) -> dict[str, Tensor]:
    (file,) = run.glob("*model.safetensors")
    return load_file(file)


def state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint in torch's files, whole."""
    entries = torch_files.Reader(folder).read_metadata().state_dict_metadata
    tensors = {name: each for name, each in entries.items() if isinstance(each, TensorStorageMetadata)}
    found = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in tensors.items()}
    torch_files.load(found, folder, alone=True)
    return found


def comes_out_the_same(base: Path, reader: str, writer: str, stage: str = "pretrain") -> None:
    """What was read and written again, without an update between, is what was there."""
    before, after = written(base, writer, stage), read(base, "again", reader, writer, stage)
    expected, found = model_files(before), model_files(after)
    assert found.keys() == expected.keys() and len(found) > 3
    assert [name for name in found if found[name] != expected[name]] == []
    if {reader, writer} & set(FILES_OF_ITS_OWN):
        return
    expected, found = (state(checkpoint_of(run) / "state") for run in (before, after))
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def goes_on(base: Path, reader: str, writer: str, stage: str = "pretrain") -> float:
    """As if it had never stopped; the largest relative difference of the losses."""
    whole, run = base / "whole" / f"{stage}_32", read(base, "on", reader, writer, stage)
    expected, found = losses(whole.parent, stage), losses(run.parent, stage)
    assert list(found) == list(range(WRITTEN + 1, ENDED + 1))
    off = max(abs(found[step] / expected[step] - 1) for step in found)
    assert off < 1e-6
    tokens = [[record["tokens"] for record in metrics(out.parent, stage)] for out in (run, whole)]
    assert tokens[0] == tokens[1][WRITTEN:]
    ends = [checkpoint.read_run(checkpoint_of(out, ENDED))["progress"] for out in (run, whole)]
    assert ends[0]["position"] == ends[1]["position"] == ENDED * ROWS and ends[0]["tokens"] == ends[1]["tokens"]
    is_the_same_model(run, whole)
    return off


def is_the_same_model(run: Path, whole: Path) -> None:
    """But for rounding, of which Adam makes more where a gradient is nearly nothing."""
    found, expected = weights(run), weights(whole)
    assert [(n, t.shape, t.dtype) for n, t in found.items()] == [(n, t.shape, t.dtype) for n, t in expected.items()]
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-4


# Some of them, always -------------------------------------------------------------------------------------------------


def rewrite(base: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """What one process has written, with another state."""
    run = shutil.copytree(written(base, "single"), written(base, name))
    folder = checkpoint_of(run)
    machine = Machine(World(), torch.device("cpu"), torch.float32)
    engine = build_engine(load_pretrained(run), PretrainConfig(engine="single", optimizer="adamw"), machine)
    engine.load(folder / "state")
    found = engine.state()  # type: ignore[attr-defined]
    change(found)
    shutil.rmtree(folder / "state")
    dcp.save(found, checkpoint_id=folder / "state", no_dist=True)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != checkpoint.COMPLETE]
    hashes = {str(path.relative_to(folder)): checkpoint.file_hash(path) for path in files}
    (folder / checkpoint.COMPLETE).write_text(json.dumps(hashes))


def rob(found: dict[str, Any]) -> None:
    found["optimizer"]["state"]["model.layers.3.mlp.up_proj.weight"]["exp_avg"].zero_()


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("cut")
    begin(base)
    rewrite(base, OLDER, lambda found: None)
    rewrite(base, ROBBED, rob)
    train(base, [Run("single", base / "whole", ENDED, stage="full_sft"), writing(base, "single", "full_sft")])
    runs = [*(writing(base, name) for name in CUT[1:]), writing(base, ADAPTED, "full_sft")]
    runs += [run for reader, writer in PAIRS if reader != "single" for run in reading(base, reader, writer)]
    runs += reading(base, ADAPTED, "single", "full_sft")
    runs += [run(base, name) for name in CUT[1:] for run in (uninterrupted, interrupted)]
    train(base, runs)
    train(base, [run for reader, writer in PAIRS if reader == "single" for run in reading(base, reader, writer)])
    train(base, [*reading(base, "single", ROBBED)[1:], *reading(base, "single", ADAPTED, "full_sft")])
    return base


@pytest.mark.parametrize(("reader", "writer"), PAIRS)
def test_a_checkpoint_of_one_split_is_gone_on_from_by_another(cut: Path, reader: str, writer: str) -> None:
    comes_out_the_same(cut, reader, writer)
    goes_on(cut, reader, writer)


def test_so_is_an_adapters(cut: Path) -> None:
    for reader, writer in ((ADAPTED, "single"), ("single", ADAPTED)):
        comes_out_the_same(cut, reader, writer, "full_sft")
        goes_on(cut, reader, writer, "full_sft")


@pytest.mark.parametrize("split", CUT[1:])
def test_where_the_split_stays_no_bit_changes_with_dropout_either(cut: Path, split: str) -> None:
    no_bit_changes(cut, split)


def no_bit_changes(base: Path, layout: str) -> None:
    whole, on = (run(base, layout).out for run in (uninterrupted, interrupted))
    expected, found = losses(whole, "pretrain"), losses(on, "pretrain")
    assert found == {step: expected[step] for step in range(WRITTEN + 1, ENDED + 1)}
    assert expected != losses(base / "whole", "pretrain")  # something was dropped
    assert model_files(on / "pretrain_32") == model_files(whole / "pretrain_32")


def test_what_an_optimizer_forgets_of_one_matrix_is_seen(cut: Path) -> None:
    with pytest.raises(AssertionError):
        goes_on(cut, "single", ROBBED)


# All of them ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("matrix")
    begin(base)
    train(base, [writing(base, name) for name in LAYOUTS if name != "single"])
    return base


@pytest.mark.slow
@pytest.mark.parametrize("writer", [name for name in LAYOUTS if name != "single"])
def test_every_layout_writes_the_same_model_folder(matrix: Path, writer: str) -> None:
    is_the_same_model(written(matrix, writer), written(matrix, "single"))
    found, expected = (model_files(written(matrix, name)) for name in (writer, "single"))
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == ["model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("reader", LAYOUTS)
def test_every_layout_goes_on_from_every_other(matrix: Path, reader: str) -> None:
    writers = [name for name in LAYOUTS if {reader, name} & set(SPLIT)]
    train(matrix, [run for writer in writers for run in reading(matrix, reader, writer)])
    off = {}
    for writer in writers:
        comes_out_the_same(matrix, reader, writer)
        off[writer] = goes_on(matrix, reader, writer)
    print("\n|", " | ".join([reader, *(f"{off[name]:.1e}" if name in off else "-" for name in LAYOUTS)]), "|")


@pytest.mark.slow
def test_muons_state_goes_through_splits_too(tmp_path: Path) -> None:
    """It multiplies in bfloat16, so that what is trained on differs by more; what is read does not."""
    make_data(tmp_path)
    muon = ("--optimizer", "muon")
    split = ("fsdp2", "pp2 zbv", "tp2", "tp2 x fsdp2")
    pairs = [(reader, writer) for reader in ("single", *split) for writer in ("single", *split) if reader != writer]
    written = [Run("single", tmp_path / "whole", ENDED), *(writing(tmp_path, name) for name in ("single", *split))]
    for runs in (written, [run for pair in pairs for run in reading(tmp_path, *pair)]):
        train(tmp_path, [run._replace(more=muon) for run in runs])
    whole = losses(tmp_path / "whole", "pretrain")
    for reader, writer in pairs:
        comes_out_the_same(tmp_path, reader, writer)
        found = losses(read(tmp_path, "on", reader, writer).parent, "pretrain")
        assert found == pytest.approx({step: whole[step] for step in found}, rel=1e-5)


@pytest.fixture(scope="module")
def dropping(matrix: Path) -> Path:
    train(matrix, [run(matrix, split) for split in SPLIT for run in (uninterrupted, interrupted)])
    return matrix


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLIT)
def test_no_split_that_stays_changes_a_bit(dropping: Path, split: str) -> None:
    no_bit_changes(dropping, split)
