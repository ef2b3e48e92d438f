"""What cannot be split as asked is one sentence that says what to do instead, before anything is read."""

import re
from dataclasses import replace

import pytest

from model import GPTConfig
from training import STAGES, load_config
from training.distributed import World
from training.engines import engine_name
from training.split import check_micro_batches, check_shape, planned_micro_batches, stages_per_rank

SHAPE = GPTConfig(vocab_size=97, dim=48, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=96, max_seq_len=64)
FSDP, DDP = "--engine fsdp", "--engine ddp"


def config_of(flags: str, stage: str = "pretrain"):
    return load_config(STAGES[stage].config, flags.split())


def engine_of(flags: str, stage: str = "pretrain", launcher: str | None = "torchrun", size: int = 8) -> str:
    config = config_of(flags, stage)
    return engine_name(config, World(size=size, launcher=launcher, tp=config.tp, pp=config.pp))


@pytest.mark.parametrize(
    ("flags", "engine"),
    [
        ("--tp 2", "fsdp"),
        ("--pp 2", "ddp"),
        ("--tp 2 --pp 2", "fsdp"),
        ("--pp 2 --engine fsdp --pp_schedule interleaved --hsdp", "fsdp"),
        ("--pp 2 --pp_schedule zb --pp_stages_per_rank 1", "ddp"),
        ("--pp 2 --optimizer muon --adapter prefix", "ddp"),
    ],
)
def test_what_can_be_split_has_an_engine(flags, engine):
    assert engine_of(flags, "full_sft") == engine


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            f"{DDP} --tp 2",
            "--tp 2 is for --engine fsdp, and the engine is ddp; give that engine, or leave the flag out",
        ),
        (f"{DDP} --tp 2 --pp 2", "--tp 2 is for --engine fsdp, and the engine is ddp; give that engine"),
        ("--engine deepspeed --tp 2", "--tp 2 is for --engine fsdp, and the engine is deepspeed; give that engine"),
        ("--engine deepspeed --pp 2", "--pp 2 is for --engine ddp or fsdp, and the engine is deepspeed; give that"),
        ("--engine single --pp 2", "--engine single, but a launcher started 8 processes; leave --engine out"),
        (f"{DDP} --pp 2 --hsdp", "--hsdp is for --engine fsdp, and the engine is ddp; give that engine"),
        (f"{DDP} --pp 2 --offload cpu", "--offload cpu is for --engine fsdp or deepspeed, and the engine is ddp; give"),
        ("--pp_schedule zb", "are for a pipeline; give --pp N, or leave them out"),
        ("--pp_stages_per_rank 2", "are for a pipeline; give --pp N, or leave them out"),
        ("--tp 2 --adapter prefix", "--adapter prefix under --tp 2: .*; give --adapter lora, or --pp in place of --tp"),
        (f"{FSDP} --pp 2 --pp_schedule zb", "--pp_schedule zb makes .* fsdp does not notice; give --engine ddp, or"),
        (f"{FSDP} --pp 2 --pp_schedule zbv", "--pp_schedule zbv makes .*; give .* or --pp_schedule interleaved"),
        ("--tp 2 --pp 2 --pp_schedule zb", "which fsdp does not notice"),
        (
            "--pp 2 --pp_stages_per_rank 2",
            "--pp_stages_per_rank 2: 1f1b has one stage a rank; give --pp_schedule inter",
        ),
        ("--pp 2 --pp_schedule gpipe --pp_stages_per_rank 3", "--pp_stages_per_rank 3: gpipe has one stage a rank"),
        ("--pp 2 --pp_schedule zbv --pp_stages_per_rank 3", "3: zbv has two stages a rank; leave it out"),
        (
            "--pp 2 --pp_schedule interleaved --pp_stages_per_rank 1",
            "1: interleaved has several a rank; give 2, or --p",
        ),
    ],
)
def test_flags_that_contradict_each_other_or_the_engine_are_refused(flags, told):
    with pytest.raises(ValueError, match=told):
        engine_of(flags, "full_sft")


@pytest.mark.parametrize("stage", [stage for stage in STAGES if not STAGES[stage].config.splits])
@pytest.mark.parametrize("flag", ["--tp 2", "--pp 2"])
def test_a_stage_that_asks_a_whole_model_while_it_learns_says_so(stage, flag):
    with pytest.raises(ValueError, match=f"{flag}: train_{stage}.py asks a whole model .*; leave it out, and where"):
        engine_of(flag, stage)


def test_the_stages_that_cannot_be_split_are_those_that_draw_answers_or_have_a_teacher():
    assert {name for name, each in STAGES.items() if not each.config.splits} == {"distill", "grpo", "ppo"}


@pytest.mark.parametrize(
    ("flags", "shape", "parts", "told"),
    [
        ("--tp 3", {}, 1, "--tp 3 does not divide n_heads 4; of this model it may be 1, 2$"),
        ("--tp 4", {}, 1, "--tp 4 does not divide n_kv_heads 2; of this model it may be 1, 2$"),
        ("--tp 2", {"ffn_dim": 85}, 1, "--tp 2 does not divide ffn_dim 85; of this model it may be 1$"),
        ("--tp 2 --max_seq_len 63", {}, 1, "--tp 2 does not divide max_seq_len 63; .* 1; or give --max_seq_len 62$"),
        (
            "--tp 4",
            {"vocab_size": 9, "n_kv_heads": 4},  # of which four ranks would have 3, 3, 3 and none
            1,
            "--tp 4 leaves its last rank no row of the vocabulary, and vocab_size is 9; lower --tp, or give a tok",
        ),
        ("--tp 2", {}, 5, "the 5 data ranks, which do not divide dim 48; start another number .*, or give --pp or"),
        ("--pp 8", {}, 1, "--pp 8 with --pp_stages_per_rank 1 makes 8 stages .*, and n_layers is 4; lower --pp$"),
        (
            "--pp 3 --pp_schedule zbv",
            {},
            1,
            "--pp 3 with --pp_stages_per_rank 2 makes 6 stages .*n_layers is 4; lower --pp, or give .* 1f1b$",
        ),
        ("--pp 3 --pp_schedule zb", {}, 1, "--pp_stages_per_rank 2 makes 6 .*; lower --pp or --pp_stages_per_rank, or"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(flags, shape, parts, told):
    config = config_of(flags)
    with pytest.raises(ValueError, match=told):
        check_shape(config, GPTConfig(**(vars(SHAPE) | shape)), parts)


@pytest.mark.parametrize(
    ("flags", "parts"), [("--tp 2", 4), ("--tp 2", 3), ("--pp 4", 5), ("", 5), ("--pp 2 --pp_schedule zbv", 1)]
)
def test_a_model_that_can_be_divided_is_not(flags, parts):
    check_shape(config_of(flags), SHAPE, parts)


@pytest.mark.parametrize("pieces", [4, 7, 8, 10, 97])
def test_a_vocabulary_of_which_each_rank_has_a_row_need_not_divide(pieces):
    check_shape(config_of("--tp 4"), replace(SHAPE, vocab_size=pieces, n_kv_heads=4))


@pytest.mark.parametrize(
    ("schedule", "pp", "fit", "refused"),
    [
        ("gpipe", 4, [1, 3, 4, 5], []),
        ("1f1b", 4, [4, 5, 9], [1, 3]),
        ("interleaved", 2, [1, 2, 3, 4, 6], [5, 7]),
        ("zb", 4, [4, 8, 12], [9, 13]),
        ("zbv", 2, [1, 2, 3, 5], []),
    ],
)
def test_a_schedule_says_which_numbers_of_micro_batches_it_takes(schedule, pp, fit, refused):
    config = config_of(f"--pp {pp} --pp_schedule {schedule}")
    for count in fit:
        check_micro_batches(config, count)
    for count in refused:
        told = (
            f"--pp_schedule {schedule} of {pp} ranks takes .* micro-batches an update, and this one has {count}; give"
        )
        with pytest.raises(ValueError, match=told) as error:
            check_micro_batches(config, count)
        # what is advised can be done
        advised = re.search(r"--accumulation_steps (\d+)", str(error.value))
        check_micro_batches(config, int(advised[1]))


@pytest.mark.parametrize(
    ("flags", "data_size", "count"),
    [
        ("", 4, 1),
        ("--accumulation_steps 6", 4, 6),
        ("--global_batch_size 64 --batch_size 4", 4, 4),
        ("--global_batch_size 60 --batch_size 4", 4, 4),  # the last is padded
        ("--global_batch_size 8 --batch_size 16", 4, 1),
    ],
)
def test_the_micro_batches_of_an_update_are_known_by_the_flags(flags, data_size, count):
    assert planned_micro_batches(config_of(flags), data_size) == count


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        ("--pp 2", 1),
        ("--pp 2 --pp_schedule interleaved", 2),
        ("--pp 2 --pp_schedule zb", 2),
        ("--pp 2 --pp_schedule zbv", 2),
        ("--pp 2 --pp_schedule zb --pp_stages_per_rank 1", 1),
    ],
)
def test_stages_a_rank(flags, count):
    assert stages_per_rank(config_of(flags)) == count


@pytest.mark.parametrize(
    ("size", "tp", "pp", "told"),
    [
        (
            1,
            2,
            1,
            r"the number of processes, 1, is no multiple of 2; start 2 \(torchrun --nproc_per_node 2\) or a mult",
        ),
        (6, 2, 2, r"--tp 2 x --pp 2 ranks hold one model .*, 6, is no multiple of 4; start 4 .* lower --tp or --pp"),
    ],
)
def test_processes_that_cannot_hold_whole_models_between_them_are_refused(monkeypatch, size, tp, pp, told):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, {"RANK": "0", "WORLD_SIZE": str(size)}[name])
    with pytest.raises(ValueError, match=told):
        World.from_environment(tp, pp)


@pytest.mark.parametrize(
    ("size", "local", "tp", "pp", "parts"), [(8, 4, 1, 1, 4), (8, 4, 2, 1, 2), (8, 4, 1, 2, 4), (8, 8, 2, 2, 2)]
)
def test_a_node_holds_a_copy_of_a_stage_between_its_data_ranks(size, local, tp, pp, parts):
    world = World(size=size, local_size=local, tp=tp, pp=pp)
    assert (world.parts(copy_a_node=True), world.parts()) == (parts, size // (tp * pp))


@pytest.mark.parametrize(("size", "local", "tp", "pp"), [(6, 3, 2, 1), (8, 2, 4, 1), (12, 4, 1, 2), (8, 5, 1, 1)])
def test_nodes_that_cannot_hold_whole_copies_are_refused(size, local, tp, pp):
    with pytest.raises(ValueError, match="--hsdp needs the same number of processes .*; start others, or leave --hsdp"):
        World(size=size, local_size=local, tp=tp, pp=pp).parts(copy_a_node=True)
