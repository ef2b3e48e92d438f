"""Our flags and a user's DeepSpeed JSON -> the one config DeepSpeed gets.

    --zero_stage 2 --batch_size 8 --dtype bfloat16     {"train_micro_batch_size_per_gpu": 8, "bf16": {"enabled": true},
                                                        "zero_optimization": {"stage": 2, ...}, ...}

Batch, accumulation, clipping, precision, optimizer and schedule are said by our flags alone; the JSON may leave them
out, say "auto", or say the same. Everything else in it (buckets, overlap, offload details, monitors) is DeepSpeed's.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

import torch

from dataset.loader import micro_batches
from training.config import Config

Settings = dict[str, Any]  # DeepSpeed's JSON, or a section of it
Value = TypeVar("Value", bound=str | float)

DECIDED = "which our flags decide (--optimizer, --learning_rate, --lr_schedule, ...)"
NOT_THERE = {  # sections of a file, and why they must not stand there
    "optimizer": DECIDED,
    "scheduler": DECIDED,
    "tensor_parallel": "whose ranks see the same data, and here each has its own (--engine fsdp --tp N splits layers)",
}
BUCKET = 50_000_000  # elements sent at a time; DeepSpeed's own 500 million would be larger than a small model


def deepspeed_settings(config: Config, dtype: torch.dtype, world_size: int) -> Settings:
    """The config DeepSpeed gets.

    Raises FileNotFoundError for a file that is not there, and ValueError, naming flag and key, for a contradiction.
    """
    path = config.deepspeed_config
    given = read_json(path) if path else {}
    zero = dict(given.get("zero_optimization") or {})
    stage = agreed(path, "zero_optimization.stage", zero.get("stage"), "--zero_stage", config.zero_stage, default=2)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"--zero_stage is {stage}; it must be 0, 1, 2 or 3")
    for section, reason in NOT_THERE.items():
        if section in given:
            raise ValueError(f"{path} has {section!r}, {reason}; remove it there")
    if config.optimizer == "muon":
        raise ValueError(
            f"--optimizer {config.optimizer} needs whole matrices, which DeepSpeed's partitions are not; "
            "use --engine ddp or fsdp, or --optimizer adamw"
        )
    rows = config.batch_size * world_size
    steps = micro_batches(config.global_batch_size, rows) if config.global_batch_size else config.accumulation_steps
    ours: dict[str, tuple[str, float]] = {
        "train_micro_batch_size_per_gpu": ("--batch_size", config.batch_size),
        "gradient_accumulation_steps": ("--accumulation_steps", steps),
        "train_batch_size": ("--batch_size x --accumulation_steps x processes", rows * steps),
        "gradient_clipping": ("--grad_clip", config.grad_clip),
        "bf16.enabled": ("--dtype", dtype == torch.bfloat16),
        "fp16.enabled": ("--dtype", dtype == torch.float16),
    }
    merged: Settings = {k: v for k, v in given.items() if not k.startswith("//")}
    for key, (flag, value) in ours.items():
        section, _, name = key.rpartition(".")
        holder = merged.setdefault(section, {}) if section else merged
        shown = dtype if flag == "--dtype" else value
        holder[name] = agreed(path, key, holder.get(name), flag, value, shown=shown)
    merged["zero_optimization"] = offloaded(
        {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET} | zero | {"stage": stage}, config
    )
    # the update is torch's AdamW in every stage, also on offloaded state, so that it is the other engines' update
    merged |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    merged.setdefault("steps_per_print", 10**9)  # our own loop reports
    return merged


def read_json(path: str) -> Settings:
    if not Path(path).is_file():
        raise FileNotFoundError(f"--deepspeed_config {path}: no such file; configs/deepspeed has some to start from")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--deepspeed_config {path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--deepspeed_config {path}: found {type(content).__name__}, expected an object of sections")
    return content


def agreed(
    path: str | None,
    key: str,
    in_file: Value | None,
    flag: str,
    ours: Value | None,
    default: Value | None = None,
    shown: object = None,
) -> Value | None:
    """The value both sides agree on; a side may be silent (None, or "auto" in the file), `default` where both are.

    Raises ValueError where they differ, naming `flag` with its value (or `shown` in its place) and `key`.
    """
    if in_file in (None, "auto"):
        return default if ours is None else ours
    if ours is None:
        return in_file
    if in_file != ours:
        raise ValueError(
            f"{flag} is {ours if shown is None else shown}, but {path} says {key} {json.dumps(in_file)}; "
            'change one of them, or write "auto" there'
        )
    return ours


def offload_device(zero: Settings, section: str) -> str:
    """Where offload_optimizer or offload_param of a ZeRO section puts its state: none, cpu or nvme."""
    return (zero.get(section) or {}).get("device", "none")


def offloaded(zero: Settings, config: Config) -> Settings:
    """The ZeRO section with --offload in it."""
    sections = ["offload_optimizer"] + (["offload_param"] if zero["stage"] == 3 else [])
    devices = (offload_device(zero, name) for name in sections)
    in_file = next((device for device in devices if device != "none"), None)
    device = agreed(
        config.deepspeed_config, "zero_optimization.offload_optimizer.device", in_file, "--offload", config.offload
    )
    if device not in (None, "none"):
        able = (3,) if device == "nvme" else (1, 2, 3)
        if zero["stage"] not in able:
            stages = "3" if device == "nvme" else "1, 2 or 3"
            raise ValueError(f"--offload {device} needs --zero_stage {stages}, and the stage is {zero['stage']}")
        for name in sections:
            if in_file is None or name in zero:  # a file may offload the optimizer alone
                zero[name] = {"device": device} | (zero.get(name) or {})
    folder = config.offload_dir or str(config.run_dir / "offload")
    for name in sections:
        if offload_device(zero, name) == "nvme" and zero[name].get("nvme_path") in (None, "auto"):
            zero[name] = zero[name] | {"nvme_path": folder}
    return zero
