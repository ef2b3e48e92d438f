"""What the code promises of a card, watched while it runs: a `Ground` in, a `Result` out.

waits     nothing within an update waits for the card
kernel    attention is no plain formula
graphs    all blocks share one graph, however rows are packed
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from model import attention, generate
from model.decode import CachedGPT
from scripts.benchmark_clock import wait
from scripts.check_gpu_ground import Ground, Result, judged, left_out, name_of

# Waits -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sync_errors() -> Iterator[None]:
    """What waits for the card raises RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(stage: str, ground: Ground) -> Result:
    """Updates as the loop makes them; their numbers are read when all are queued."""
    if ground.watching is None:
        return left_out("a CPU waits for nothing; tests/training/test_waits.py finds what would")
    engine, objective = ground.engine(stage, ground.dtype, ground.compiles), ground.objective(stage)

    def update(number: int, watching: contextlib.AbstractContextManager[object]) -> Callable[[], object]:
        weight = float(sum(objective.weight(batch) for batch in ground.batches(stage, number)))
        with watching:
            totals = engine.forward_backward(ground.sent(stage, number), objective, weight)
            norm = engine.step(1e-4)
        return lambda: (totals.read(), norm.read())

    for number in range(2):  # compiling waits
        update(number, contextlib.nullcontext())()
    reads = []
    try:
        for number in range(2, 5):
            reads.append(update(number, ground.watching()))
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        where = ours(error)[-1]
        advice = "the card stands still there until the host goes on: training is right, and slower than it could be"
        return judged(False, f"{where} waits for the card ({str(error).splitlines()[0]})", advice)
    for read in reads:
        read()
    return judged(True, f"{len(reads)} updates in {name_of(ground.dtype)} were queued without one", "")


def ours(error: BaseException) -> list[str]:
    """file:line of our code that an error passed, the innermost last."""
    places, trace, root = ["elsewhere"], error.__traceback__, str(Path(__file__).parent.parent)
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file.startswith(root) and "site-packages" not in file:
            places.append(f"{Path(file).relative_to(root)}:{trace.tb_lineno}")
        trace = trace.tb_next
    return places


# Kernels ---------------------------------------------------------------------------------------------------------

# names in a profile, of operators and of the kernels they start
ATTENTION = {
    "FlashAttention": r"flash_(fwd|bwd)|_flash_attention(_forward|_backward)?$",
    "efficient": r"fmha_cutlass|_efficient_attention(_forward|_backward)?$",
    "cuDNN": r"cudnn\w*(sdpa|fmha|attention|flash)|_scaled_dot_product_cudnn_attention",
}
# the plain formula makes all scores, and their softmax by the kernel for rows of up to 1,024; a loss has larger ones
MATH = r"_scaled_dot_product_attention_math|softmax_warp_(forward|backward)"


def attention_of(names: Iterable[str]) -> set[str]:
    """Which of ATTENTION ran. Raises ValueError where the plain formula did, or none."""
    names = list(names)
    math = sorted({name for name in names if re.search(MATH, name)})
    if math:
        raise ValueError(f"the plain formula ran, with all scores in memory: {math[0][:80]}")
    found = {kind for kind, pattern in ATTENTION.items() if any(re.search(pattern, name) for name in names)}
    if not found:
        raise ValueError(f"no attention among {len(names)} names")
    return found


def names_of(run: Callable[[], object], ground: Ground) -> set[str]:
    """Of operators and kernels."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        run()
        wait(ground.device)
    return {event.name for event in prof.events() or []}


def training_run(dtype: torch.dtype, ground: Ground) -> Callable[[], object]:
    engine, objective = ground.engine("pretrain", dtype), ground.objective("pretrain")
    return lambda: engine.forward_backward(ground.batches("pretrain", 0), objective).read()


def decoding_run(dtype: torch.dtype, ground: Ground) -> Callable[[], object]:
    """Not recorded: kernels of a graph are not in every profile."""
    network = ground.network(dtype)

    def run() -> None:
        decoder = CachedGPT(network, rows=2, capacity=16, static=False)
        decoder.step(decoder.add([[5, 6, 7], [8]]).argmax(-1))

    return run


def kernel(run: Callable[[torch.dtype, Ground], Callable[[], object]], dtype: torch.dtype, ground: Ground) -> Result:
    if not ground.on_card:
        return left_out("kernels are a card's")
    if ground.lacks(dtype):
        return left_out(ground.lacks(dtype))
    varlen = attention.has_varlen(ground.device, dtype, 0.0)
    if run is decoding_run and not varlen:  # the only kernel in which queries share keys needs what it needs
        return left_out("prompts are read by the plain formula where there is no FlashAttention")
    wanted = {"FlashAttention"} if varlen and run is training_run else set(ATTENTION)
    advice = f"slow, and of much memory; {' or '.join(sorted(wanted))} is meant to run: try another torch or driver"
    try:
        found = attention_of(names_of(run(dtype, ground), ground))
    except ValueError as error:
        return judged(False, str(error), advice)
    return judged(found <= wanted, " and ".join(sorted(found)), advice)


# Graphs ----------------------------------------------------------------------------------------------------------


def graphs(stage: str, ground: Ground) -> Result:
    """One graph for all blocks, and the loss's, however rows are packed, and after sampling."""
    if not ground.compiles:
        return left_out("nothing is compiled here unasked")
    if not ground.on_card and not attention.has_varlen(ground.device, ground.dtype, 0.0):
        return left_out("attention in blocks, which is a CPU's, stands outside graphs")
    engine, objective = ground.engine(stage, ground.dtype, compiled=True), ground.objective(stage)
    counters.clear()

    def update(number: int) -> int:
        engine.forward_backward(ground.sent(stage, number), objective)
        engine.step(1e-4).read()
        return counters["stats"]["unique_graphs"]

    made = [update(number) for number in range(3)]
    with engine.generator() as network:
        generate(network, [[5, 6, 7], [8]], max_new_tokens=5, temperature=0)
    made += [update(number) for number in range(3, 5)]
    meant = 2
    breaks = list(counters["graph_break"])
    return judged(
        made == [meant] * len(made) and not breaks,
        f"graphs after each update {made}, sampling after the third; breaks: {breaks or 'none'}",
        f"{meant} are meant, one of blocks and the loss's: more cost a minute each, and breaks the speed of compiling. "
        "TORCH_LOGS=recompiles,graph_breaks says why; --compile false goes on without",
    )
