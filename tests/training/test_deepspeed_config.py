"""What our flags and a DeepSpeed file make together, and that they never say two things."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import ROOT
from training import DPOConfig, PretrainConfig
from training.config import Config
from training.distributed import World
from training.engines import Machine, build_engine, engine_name
from training.engines.deepspeed_config import deepspeed_settings

SHIPPED = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


def settings(tmp_path: Path, file: Any = None, dtype: torch.dtype = torch.float32, **flags: Any) -> dict[str, Any]:
    path = None
    if file is not None:
        path = tmp_path / "ds.json"
        path.write_text(file if isinstance(file, str) else json.dumps(file))
    config = PretrainConfig(dim=32, out_dir=str(tmp_path), deepspeed_config=str(path) if path else None, **flags)
    return deepspeed_settings(config, dtype, world_size=2)


def test_flags_become_deepspeeds_keys(tmp_path: Path) -> None:
    found = settings(
        tmp_path, dtype=torch.bfloat16, batch_size=3, accumulation_steps=4, grad_clip=0.5, zero_stage=3, offload="cpu"
    )
    assert found["train_micro_batch_size_per_gpu"] == 3 and found["gradient_accumulation_steps"] == 4
    assert found["train_batch_size"] == 24 and found["gradient_clipping"] == 0.5
    assert found["bf16"] == {"enabled": True} and found["fp16"] == {"enabled": False}
    zero = found["zero_optimization"]
    assert zero["stage"] == 3 and zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"


def test_the_stage_is_the_flags_else_the_files_else_two(tmp_path: Path) -> None:
    def stage(*arguments: Any, **flags: Any) -> int:
        return settings(tmp_path, *arguments, **flags)["zero_optimization"]["stage"]

    file = {"zero_optimization": {"stage": 1}}
    assert [stage(), stage(file), stage(file, zero_stage=1), stage(zero_stage=0)] == [2, 1, 1, 0]


def test_what_only_deepspeed_knows_is_kept(tmp_path: Path) -> None:
    file = {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 7}, "dump_state": True}
    found = settings(tmp_path, file)
    assert found["zero_optimization"]["overlap_comm"] and found["zero_optimization"]["reduce_bucket_size"] == 7
    assert found["dump_state"]


def test_the_accumulation_that_a_global_batch_size_sets(tmp_path: Path) -> None:
    found = settings(tmp_path, batch_size=3, global_batch_size=16)
    assert found["gradient_accumulation_steps"] == 3 and found["train_batch_size"] == 18


CONFLICTS = {
    "batch": (
        {"train_micro_batch_size_per_gpu": 4},
        {"batch_size": 8},
        r"--batch_size is 8, but .*ds.json says train_micro_batch_size_per_gpu 4",
    ),
    "accumulation": (
        {"gradient_accumulation_steps": 2},
        {},
        r"--accumulation_steps is 1, but .* says gradient_accumulation_steps 2",
    ),
    "whole batch": (
        {"train_batch_size": 64},
        {"batch_size": 8},
        r"--batch_size x --accumulation_steps x processes is 16, but .* train_batch_size 64",
    ),
    "clipping": ({"gradient_clipping": 0.3}, {}, r"--grad_clip is 1.0, but .* says gradient_clipping 0.3"),
    "precision": ({"bf16": {"enabled": True}}, {}, r"--dtype is torch.float32, but .* says bf16.enabled true"),
    "stage": (
        {"zero_optimization": {"stage": 2}},
        {"zero_stage": 3},
        r"--zero_stage is 3, but .* says zero_optimization.stage 2",
    ),
    "offload": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        {"offload": "none"},
        r"--offload is none, but .*offload_optimizer.device \"cpu\"",
    ),
    "optimizer": ({"optimizer": {"type": "Adam"}}, {}, r"ds.json has 'optimizer', which our flags decide"),
    "schedule": ({"scheduler": {"type": "WarmupLR"}}, {}, r"ds.json has 'scheduler', which our flags decide"),
    "layers split": (
        {"tensor_parallel": {"autotp_size": 2, "preset_model": "llama"}},
        {},
        r"ds.json has 'tensor_parallel', whose ranks see the same data, .*--engine fsdp --tp N",
    ),
    "not JSON": ("{zero", {}, r"ds.json: not JSON"),
    "a list": ([], {}, r"ds.json: found list, expected an object"),
    "offload without parts": (
        None,
        {"zero_stage": 0, "offload": "cpu"},
        r"--offload cpu needs --zero_stage 1, 2 or 3, and the stage is 0",
    ),
    "disk": (None, {"zero_stage": 2, "offload": "nvme"}, r"--offload nvme needs --zero_stage 3, and the stage is 2"),
    "no such stage": (None, {"zero_stage": 4}, r"--zero_stage is 4; it must be 0, 1, 2 or 3"),
    "muon": (None, {"optimizer": "muon"}, r"--optimizer muon needs whole matrices"),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_a_contradiction_names_both_sides(tmp_path: Path, name: str) -> None:
    file, flags, message = CONFLICTS[name]
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, file, **flags)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--deepspeed_config .*gone.json: no such file; configs/deepspeed"):
        deepspeed_settings(PretrainConfig(deepspeed_config=str(tmp_path / "gone.json")), torch.float32, 2)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_shipped_files_fit_any_flags(path: Path, dtype: torch.dtype) -> None:
    config = DPOConfig(dim=32, batch_size=5, accumulation_steps=2, deepspeed_config=str(path))
    found = deepspeed_settings(config, dtype, world_size=2)
    assert "auto" not in json.dumps(found)
    assert found["zero_optimization"]["stage"] == int(path.stem[4])
    device = found["zero_optimization"].get("offload_optimizer", {}).get("device")
    assert device == {"zero3_nvme": "nvme"}.get(path.stem, "cpu" if "offload" in path.stem else None)
    if device == "nvme":
        assert found["zero_optimization"]["offload_param"]["nvme_path"] == str(config.run_dir / "offload")


def test_the_shipped_files_are_those_the_documents_name() -> None:
    names = [path.stem for path in SHIPPED]
    assert names == ["zero1", "zero1_offload", "zero2", "zero2_offload", "zero3", "zero3_nvme", "zero3_offload"]


# --- which engine ---


@pytest.mark.parametrize(
    ("launcher", "name"),
    [(None, "single"), ("torchrun", "ddp"), ("deepspeed", "deepspeed"), ("horovodrun", "horovod")],
    ids=["none", "torchrun", "ds", "horovod"],
)
def test_the_launcher_decides_unless_a_flag_does(launcher: str | None, name: str) -> None:
    world = World(size=2 if launcher else 1, launcher=launcher)
    assert engine_name(Config(), world) == name
    assert engine_name(Config(engine="fsdp"), world) == "fsdp"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "single": ({"engine": "single"}, r"--engine single, but a launcher started 2 processes"),
    "horovod": ({"engine": "horovod"}, r"--engine horovod under torchrun: start it with horovodrun --gloo -np 2"),
    "fsdp_reshard": ({"fsdp_reshard": False}, r"--fsdp_reshard is for --engine fsdp, and the engine is ddp"),
    "hsdp": ({"hsdp": True}, r"--hsdp is for --engine fsdp, and the engine is ddp"),
    "zero_stage": ({"zero_stage": 1}, r"--zero_stage 1 is for --engine deepspeed, and the engine is ddp"),
    "file": ({"deepspeed_config": "x.json"}, r"--deepspeed_config x.json is for --engine deepspeed"),
    "offload": ({"offload": "cpu"}, r"--offload cpu is for --engine fsdp or deepspeed, and the engine is ddp"),
    "nvme": (
        {"offload": "nvme", "engine": "fsdp"},
        r"--offload nvme is for --engine deepspeed, and the engine is fsdp",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_flag_of_another_engine_is_refused(make_model: Any, name: str) -> None:
    flags, message = WRONG[name]
    world = World(size=2, local_size=2, launcher="torchrun")
    with pytest.raises(ValueError, match=message):
        build_engine(make_model(), Config(**flags), Machine(world, torch.device("cpu"), torch.float32))


@pytest.mark.skipif(importlib.util.find_spec("horovod") is not None, reason="Horovod is here")
def test_horovod_that_is_not_there_is_said(make_model: Any) -> None:
    with pytest.raises(ValueError, match=r"--engine horovod needs Horovod, built for this PyTorch \(No module named"):
        build_engine(make_model(), Config(engine="horovod"), Machine(World(), torch.device("cpu"), torch.float32))


@pytest.mark.parametrize(
    ("launcher", "device", "told"), [(None, "cuda:1", "1"), ("0", "cuda:1", "1"), (None, "cpu", "0")]
)
def test_deepspeed_is_told_the_device_that_was_asked_for(monkeypatch, launcher, device, told) -> None:
    pytest.importorskip("deepspeed")
    from training.engines.deepspeed import name_device

    monkeypatch.setenv("LOCAL_RANK", launcher or "")  # so that what is set here is put back
    if launcher is None:
        monkeypatch.delenv("LOCAL_RANK")
    name_device(torch.device(device))
    assert os.environ["LOCAL_RANK"] == told
