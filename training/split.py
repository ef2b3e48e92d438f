"""Which ways of splitting a model there are, and what cannot be, said in one sentence each.

check_flags(config, "ddp")                 --tp 2 of a stage that draws answers: ValueError
check_shape(config, shape, parts=1)        --tp 4 of 6 heads: ValueError
check_micro_batches(config, count=2)       --pp 4, fewer than stages: ValueError

What an engine has no part in at all, and whether there are ranks enough, is refused before: engines.engine_name, and
World.from_environment.
"""

from dataset.loader import fitting, micro_batches
from model import GPTConfig
from training.config import Config
from training.division import SINGLE, ZERO_BUBBLE


def stages_per_rank(config: Config) -> int:
    return config.pp_stages_per_rank or (1 if config.pp_schedule in SINGLE else 2)


def check_flags(config: Config, engine: str) -> None:
    """Raise ValueError for flags that contradict each other, or the engine."""
    if config.pp == 1 and (config.pp_schedule != "1f1b" or config.pp_stages_per_rank):
        raise ValueError("--pp_schedule and --pp_stages_per_rank are for a pipeline; give --pp N, or leave them out")
    if config.tp == config.pp == 1:
        return
    asked = f"--tp {config.tp}" if config.tp > 1 else f"--pp {config.pp}"
    if not config.splits:
        raise ValueError(
            f"{asked}: train_{config.stage}.py asks a whole model while it learns, and no rank would hold one; leave "
            "it out, and where the model does not fit give --engine fsdp"
        )
    if config.tp > 1 and config.adapter == "prefix":
        raise ValueError(
            f"--adapter prefix under --tp {config.tp}: its keys and values of all heads are one matrix; give "
            "--adapter lora, or --pp in place of --tp"
        )
    if config.pp > 1:
        check_schedule(config, engine)


def check_schedule(config: Config, engine: str) -> None:
    schedule, per_rank = config.pp_schedule, stages_per_rank(config)
    if engine == "fsdp" and schedule in ZERO_BUBBLE:
        raise ValueError(
            f"--pp_schedule {schedule} makes gradients of weights apart from the backward pass, which fsdp does not "
            "notice; give --engine ddp, or --pp_schedule interleaved"
        )
    if config.compile and schedule in ZERO_BUBBLE:
        raise ValueError(
            f"--compile with --pp_schedule {schedule} makes gradients of weights apart from the backward pass, which "
            "of a compiled block is one piece; leave --compile out, or give --pp_schedule interleaved"
        )
    if schedule in SINGLE and per_rank != 1:
        raise ValueError(
            f"--pp_stages_per_rank {per_rank}: {schedule} has one stage a rank; give --pp_schedule interleaved or zb"
        )
    if schedule == "zbv" and per_rank != 2:
        raise ValueError(f"--pp_stages_per_rank {per_rank}: zbv has two stages a rank; leave it out")
    if schedule == "interleaved" and per_rank == 1:
        raise ValueError("--pp_stages_per_rank 1: interleaved has several a rank; give 2, or --pp_schedule 1f1b")


def planned_micro_batches(config: Config, data_size: int) -> int:
    """How many an update will have, by flags alone: where the data fill one."""
    if not config.global_batch_size:
        return config.accumulation_steps
    rows = fitting(config.batch_size, config.global_batch_size, data_size)
    return micro_batches(config.global_batch_size, rows * data_size)


def check_shape(config: Config, shape: GPTConfig, parts: int = 1) -> None:
    """Raise ValueError for a model that cannot be split as asked. parts: how many data ranks hold one copy of a stage
    between them."""
    row = config.max_seq_len or shape.max_seq_len
    divided = {"n_heads": shape.n_heads, "n_kv_heads": shape.n_kv_heads, "ffn_dim": shape.ffn_dim or 0}
    divided["max_seq_len"] = row  # between the products every rank has a part of each row
    for name, value in divided.items():
        if value % config.tp:
            may_be = ", ".join(str(n) for n in range(1, value + 1) if all(v % n == 0 for v in divided.values()))
            other = f"; or give --max_seq_len {max(row - row % config.tp, config.tp)}" if name == "max_seq_len" else ""
            raise ValueError(
                f"--tp {config.tp} does not divide {name} {value}; of this model it may be {may_be}{other}"
            )
    if -(-shape.vocab_size // config.tp) * (config.tp - 1) >= shape.vocab_size:  # as many for each, what is left last
        raise ValueError(
            f"--tp {config.tp} leaves its last rank no row of the vocabulary, and vocab_size is {shape.vocab_size}; "
            "lower --tp, or give a tokenizer of more pieces"
        )
    if config.tp > 1 and shape.dim % parts:
        raise ValueError(
            f"--tp {config.tp} leaves the width of matrices to the {parts} data ranks, which do not divide dim "
            f"{shape.dim}; start another number of processes, or give --pp or --engine fsdp in place of --tp"
        )
    per_rank = stages_per_rank(config)
    if config.pp * per_rank > shape.n_layers:
        lower = "--pp" if per_rank == 1 or config.pp_schedule == "zbv" else "--pp or --pp_stages_per_rank"
        fewer = "" if per_rank == 1 else ", or give --pp_schedule 1f1b"
        raise ValueError(
            f"--pp {config.pp} with --pp_stages_per_rank {per_rank} makes {config.pp * per_rank} stages of at least "
            f"one layer, and n_layers is {shape.n_layers}; lower {lower}{fewer}"
        )


def check_micro_batches(config: Config, count: int) -> None:
    """Raise ValueError for a number of micro-batches an update that the schedule cannot use."""
    schedule, pp = config.pp_schedule, config.pp
    if pp == 1:
        return
    rounds = max(1, count // pp)
    fits = {
        "gpipe": True,
        "1f1b": count >= pp,
        "interleaved": count % rounds == 0,
        "zb": count % rounds == 0,
        "zbv": True,
    }
    if not fits[schedule]:
        wanted = f"at least {pp}" if schedule == "1f1b" else f"a multiple of {pp}"
        raise ValueError(
            f"--pp_schedule {schedule} of {pp} ranks takes {wanted} micro-batches an update, and this one has {count}; "
            f"give --accumulation_steps {pp * -(-count // pp)} (with --global_batch_size: another --batch_size), or "
            "--pp_schedule gpipe"
        )
