"""A run's state by parameter name, from a checkpoint of any engine and any number of ranks, one parameter at a time.

    with named_state(Path(".../step_000200/state"), engine) as state:
        state.step                                     200.0, optimizer updates so far
        state.read("model.norm.weight", (512,))        {"fp32": (512,), "exp_avg": (512,), "exp_avg_sq": (512,)}

It is how an engine takes over from another kind of engine: PyTorch's engines write torch.distributed.checkpoint files,
DeepSpeed writes its own, which its universal checkpoint tool turns into a folder a parameter.
"""

import contextlib
import io
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from training.engines import torch_files
from training.engines.contract import Peers

MOMENTS = ("exp_avg", "exp_avg_sq")
TAG = "deepspeed"  # the folder DeepSpeed writes inside a checkpoint's state


class NamedState:
    """Reads torch.distributed.checkpoint files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.keys = torch_files.keys(folder)
        name = next((key for key in self.keys if key.startswith("optimizer.state.") and key.endswith(".step")), None)
        if name is None:
            raise ValueError(f"{folder}: no AdamW state here, so no other engine can take over from this checkpoint")
        self.step = float(self.load({name: torch.zeros(())})[name])

    def load(self, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
        torch_files.load(wanted, self.folder, alone=True)
        return wanted

    def read(self, name: str, shape: torch.Size) -> dict[str, Tensor]:
        """Full tensors on the CPU. Raises ValueError where the optimizer kept something else than AdamW's moments."""
        keys = {"fp32": f"model.{name}"} | {moment: f"optimizer.state.{name}.{moment}" for moment in MOMENTS}
        if missing := [key for key in keys.values() if key not in self.keys]:
            raise ValueError(f"{self.folder}: {missing[0]} is not there; only AdamW's state can change its engine")
        loaded = self.load({key: torch.empty(shape) for key in keys.values()})
        return {slot: loaded[key] for slot, key in keys.items()}


class UniversalState(NamedState):
    """Reads what DeepSpeed's ds_to_universal has written: full tensors from stages 1 and 2, flat ones from stage 3."""

    def __init__(self, folder: Path):
        self.folder = folder / "zero"
        count = next(self.folder.glob("*/step.pt"), None)
        if count is not None:  # stages 1 and 2
            self.step = float(torch.load(count, weights_only=True, map_location="cpu"))
        else:
            common = torch.load(self.folder / "optimizer_state.pt", weights_only=False, map_location="cpu")
            self.step = float(next(iter(common["optimizer_state_dict"]["state"].values()))["step"])

    def read(self, name: str, shape: torch.Size) -> dict[str, Tensor]:
        found = {}
        for slot in ("fp32", *MOMENTS):
            content = torch.load(self.folder / name / f"{slot}.pt", weights_only=True, map_location="cpu")
            tensor = content["param"] if isinstance(content, dict) else content
            found[slot] = tensor.flatten()[: shape.numel()].view(shape).float()
        return found


@contextlib.contextmanager
def named_state(folder: Path, peers: Peers) -> Iterator[NamedState]:
    """The state in a checkpoint, whichever engine wrote it. All ranks enter; DeepSpeed's is turned into its universal
    form, which is removed at the end. Raises ValueError on every rank where that fails."""
    if not is_deepspeed(folder):
        yield NamedState(folder)
        return
    if is_universal(folder):
        yield UniversalState(folder)
        return
    problem = None
    if peers.world.rank == 0:
        try:
            make_universal(folder)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
    if problem := peers.gather(problem)[0]:
        raise ValueError(f"{folder} could not be turned into DeepSpeed's universal form ({problem})")
    yield UniversalState(scratch_folder(folder) / TAG)
    peers.barrier()
    if peers.world.rank == 0:
        shutil.rmtree(scratch_folder(folder))


def write_universal(folder: Path, name: str, slots: dict[str, Tensor], step: float) -> None:
    """One parameter's full tensors, in the same form."""
    place = folder / "zero" / name
    place.mkdir(parents=True)
    for slot, tensor in slots.items():
        torch.save({"param": tensor}, place / f"{slot}.pt")
    torch.save(torch.tensor(step), place / "step.pt")


def is_deepspeed(folder: Path) -> bool:
    return (folder / TAG).is_dir() or is_universal(folder)


def is_universal(folder: Path) -> bool:
    return (folder / "zero").is_dir()


def scratch_folder(folder: Path) -> Path:
    """Where a DeepSpeed checkpoint's universal form is kept while it is read."""
    return folder.parent.parent / f".{folder.parent.name}.universal"


def make_universal(folder: Path) -> None:
    """Turn a DeepSpeed checkpoint into folders by parameter name; for one process.

    Raises ValueError where DeepSpeed is not installed.
    """
    try:
        from deepspeed.checkpoint.ds_to_universal import main
    except ImportError:
        raise ValueError(
            f"{folder} was written by DeepSpeed, which is needed to read it: pip install 'seedling[deepspeed]', "
            "or start over with --resume none"
        ) from None
    scratch = scratch_folder(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(
            Namespace(
                input_folder=str(folder / TAG),
                output_folder=str(scratch / TAG),
                num_extract_workers=workers,
                num_merge_workers=workers,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=False,
            )
        )
