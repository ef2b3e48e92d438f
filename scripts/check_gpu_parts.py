"""The checks of check_gpu.py: a `Ground` in, a `Result` out; `checks()` names them all, in order.

Each takes training's own way (the rows of the sample data, the engine, the objective of every stage) and holds it to
something else: the CPU in float32, a formula, a network without a cache. Waits, kernels and graphs are watched in
check_gpu_promises.py, engines in check_gpu_engines.py.
"""

import contextlib
import gc
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from model import attention, generate
from scripts import memory
from scripts.benchmark import OurGeneration
from scripts.benchmark_clock import Turns, reset_peak
from scripts.check_gpu_engines import ENGINES, same_losses
from scripts.check_gpu_ground import (
    PRECISIONS,
    TRIES,
    Check,
    Ground,
    Learnt,
    Precision,
    Result,
    judged,
    left_out,
    name_of,
)
from scripts.check_gpu_promises import decoding_run, graphs, kernel, training_run, waits
from training import ALONE
from training.engines import SingleEngine
from training.metrics import peak_memory_mb
from training.setup import starting_model

SCRIPTS = Path(__file__).parent
NO_CARD = "there is no card"
MIB = 2**20

# The card --------------------------------------------------------------------------------------------------------


def card(ground: Ground) -> Result:
    if not ground.on_card:
        return left_out(f"{NO_CARD}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    found = torch.cuda.get_device_properties(ground.device)
    square = torch.ones(64, 64, device=ground.device)
    text = (
        f"{found.name}, compute capability {found.major}.{found.minor}, {found.total_memory / 2**30:.0f} GiB, "
        f"driver {driver()}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    )
    good = float((square @ square)[0, 0]) == 64.0
    return judged(
        good, text, "a product of ones is wrong: nothing else here can be trusted; test the card and its driver"
    )


def driver() -> str:
    """The driver's version; "unknown" where nvidia-smi is not at hand."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")[0]
    return "unknown"


def bfloat16(ground: Ground) -> Result:
    lacking = ground.lacks(torch.bfloat16)
    if lacking or not ground.on_card:
        return left_out(lacking or NO_CARD)
    return judged(
        torch.cuda.is_bf16_supported(), "there", "this torch computes no bfloat16 here: train with --dtype float16"
    )


def flash(ground: Ground) -> Result:
    if not ground.on_card:
        return left_out("a CPU computes attention in blocks")
    if torch.cuda.get_device_capability(ground.device) < (8, 0):
        return left_out("cards before compute capability 8.0 take the formula under a mask")
    return judged(
        attention.has_varlen(ground.device, ground.dtype, 0.0) and torch.backends.cuda.is_flash_attention_available(),
        f"there, {'queries share keys' if attention.VARLEN_GQA else 'keys are copied for queries that share them'}",
        "this torch was built without FlashAttention, and training in 16 bits ends with an error: install one of "
        "pytorch.org's own builds",
    )


def compiling(ground: Ground) -> Result:
    if not ground.on_card:
        return left_out("blocks are compiled on cards alone, unless --compile asks for it")
    if torch.cuda.get_device_capability(ground.device) < (7, 0):
        return left_out("Triton knows cards from compute capability 7.0 on")
    return judged(
        ground.compiles,
        "Triton and a C compiler are there",
        "Triton or a C compiler is missing, so that blocks run as they are, and slower: apt-get install gcc, "
        "pip install triton",
    )


# Numbers ---------------------------------------------------------------------------------------------------------


def learn(engine: SingleEngine, ground: Ground, stage: str) -> Learnt:
    """Of one update. A loss scaler's first scales may be too large: such updates are skipped, as in training."""
    batches, objective = ground.batches(stage, 0), ground.objective(stage)
    weight = float(sum(objective.weight(batch) for batch in batches))
    for _ in range(TRIES):
        totals = engine.forward_backward(batches, objective, weight).read()
        scale = engine.scaler.get_scale()
        grads = {name: p.grad.cpu() / scale for name, p in engine.model.named_parameters() if p.grad is not None}
        if not engine.scales_loss or all(bool(grad.isfinite().all()) for grad in grads.values()):
            break
        engine.step(0.0)
    return Learnt(totals.sums["loss"] / weight, grads)


def expected(ground: Ground, stage: str) -> Learnt:
    """On the CPU, in float32, not compiled."""
    if stage not in ground.expected:
        host = Ground(torch.device("cpu"), ground.flags)
        ground.expected[stage] = learn(host.engine(stage, torch.float32), host, stage)
    return ground.expected[stage]


def parity(stage: str, precision: Precision, compiled: bool, ground: Ground) -> Result:
    """Loss and gradient of an update, beside the CPU's."""
    if ground.lacks(precision.dtype):
        return left_out(ground.lacks(precision.dtype))
    if precision.matmul != "highest" and not ground.on_card:
        return left_out("TF32 is a card's")
    if compiled and not ground.compiles:
        return left_out("nothing is compiled here unasked")
    found = learn(ground.engine(stage, precision.dtype, compiled, precision.matmul), ground, stage)
    told = expected(ground, stage)
    loss = abs(found.loss - told.loss) / abs(told.loss)
    off = {name: float((found.gradients[name] - grad).norm() / grad.norm()) for name, grad in told.gradients.items()}
    worst = max(off, key=lambda name: (off[name] != off[name], off[name]))  # one that is no number before all others
    return judged(
        loss <= precision.loss and off[worst] <= precision.gradient,
        f"loss {found.loss:.4f}, off by {loss:.1e} (at most {precision.loss:g}); gradients off by {off[worst]:.1e} "
        f"(at most {precision.gradient:g}), most of all {worst}",
        "another loss or gradient than the CPU's: do not train like this. Where only `compiled` fails, --compile false "
        "goes on without; where only 16 bits fail, --dtype float32",
    )


# Decoding --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def greedy(ground: Ground) -> Result:
    """Each of a batch's likeliest tokens, by the cache, is likeliest too where the whole sequence is read at once."""
    network = ground.network(torch.float32)
    length = min(48, network.config.max_seq_len // 2)
    prompts = [list(range(5, 5 + length // n)) for n in (1, 2, 8)]
    answers = [answer.ids for answer in generate(network, prompts, max_new_tokens=length, temperature=0)]
    short, same = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = network(torch.tensor([prompt + answer], device=ground.device))[0, len(prompt) - 1 : -1]
        behind = logits.amax(-1) - logits.gather(1, torch.tensor(answer, device=ground.device)[:, None])[:, 0]
        short, same = max(short, float(behind.max())), same + int((behind == 0).sum())
    total = sum(map(len, answers))
    return judged(
        short < 1e-3 and total == len(prompts) * length,  # two as good as alike may change places
        f"{same} of {total} tokens the same {'by the recorded graph' if ground.on_card else '(without a graph)'}, "
        f"others behind by at most {short:.1e}",
        "answers are not what the model says: sample with --device cpu until this is found",
    )


def tokens(ground: Ground) -> int:
    """Of a prompt, and of its answer, where speed is measured: the benchmark's, or what the context has room for."""
    return min(64, ground.loaded("pretrain")[0].model.config.max_seq_len // 4)


def speed(rows: int, ground: Ground) -> Result:
    start = ground.loaded("pretrain")[0]
    room = tokens(ground)
    settings = {"max_new_tokens": room, "temperature": 0.0}
    prompts = [[5 + row] * room for row in range(rows)]
    turns = Turns(ground.device)
    start = starting_model(start.config)  # one of its own, to be given memory
    turns.start("ours", lambda: OurGeneration(start, ground.machine, prompts, **settings))
    for step in range(1, 4):
        turns.go_round(step)
    timed = turns.timed["ours"]
    rates = [work.tokens / seconds for work, seconds in zip(timed.work, timed.seconds, strict=True)]
    return judged(min(rates) > 0, f"{max(rates):,.0f} new tokens/s in {name_of(ground.dtype)}, prompts of {room}", "")


# Memory ----------------------------------------------------------------------------------------------------------


def held(ground: Ground) -> Result:
    """What stays, beside the ZeRO paper's formula, and the peak of updates."""
    gc.collect()
    engine, objective = ground.engine("pretrain", ground.dtype), ground.objective("pretrain")
    measured = memory.measure(engine)
    formula = memory.formula(engine, 1, memory.stage_of(engine), engine.model.num_parameters())
    reset_peak(ground.device)
    for number in range(2):
        engine.forward_backward(ground.sent("pretrain", number), objective)
        engine.step(1e-4).read()
    parts = ", ".join(f"{part} {measured[part] / MIB:,.1f} ({size / MIB:,.1f})" for part, size in formula.items())
    return judged(
        all(abs(measured[part] - size) <= 0.01 * size + 4096 for part, size in formula.items()),
        f"MiB, in brackets by the formula: {parts}; peak of an update {peak_memory_mb(ground.device):,.0f}",
        "the engine holds more than it needs, or less than it learns: `python scripts/memory.py` says the same by part",
    )


# Benchmark -------------------------------------------------------------------------------------------------------


def benchmark(ground: Ground) -> Result:
    """scripts/benchmark.py in a process of its own, with few updates."""
    size = str(tokens(ground))
    flags = ["--markdown", "--device", str(ground.device), "--prompt_tokens", size, "--new_tokens", size, *ground.flags]
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    start = done.stdout.rfind("\ncommit ")
    said = (done.stderr or done.stdout).strip().splitlines()[-1:]
    advice = f"`{' '.join(command[1:])}` says what is wrong: {' '.join(said)}"
    result = judged(done.returncode == 0 and start >= 0, f"{done.stdout[start:].count('tokens/s')} lines below", advice)
    result.paste = done.stdout[start + 1 :].strip() if result.status == "ok" else ""
    return result


# All -------------------------------------------------------------------------------------------------------------


COMPILED = ("float32", "bfloat16", "float16")  # one of float32 is enough


def checks() -> dict[str, Check]:
    """By name, `group: what`, in the order in which they are run."""
    found: dict[str, Check] = {
        "card: itself": card, "card: bfloat16": bfloat16, "card: FlashAttention": flash, "card: compiling": compiling
    }  # fmt: skip
    for stage in ALONE:
        for name, precision in PRECISIONS.items():
            for compiled in (False, True)[: 1 + (name in COMPILED)]:
                how = f"{name}{', compiled' * compiled}"
                found[f"parity: {stage}, {how}"] = partial(parity, stage, precision, compiled)
    found |= {f"waits: {stage}": partial(waits, stage) for stage in ALONE}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found[f"attention: training, {name_of(dtype)}"] = partial(kernel, training_run, dtype)
    for dtype in (torch.bfloat16, torch.float16):
        found[f"attention: decoding, {name_of(dtype)}"] = partial(kernel, decoding_run, dtype)
    found |= {f"graphs: {stage}": partial(graphs, stage) for stage in ALONE}
    for processes, engines in ENGINES.items():
        found |= {f"engines: {name} x{processes}": partial(same_losses, name, processes) for name in engines}
    found |= {"decoding: greedy": greedy, "decoding: 1 row": partial(speed, 1), "decoding: 32 rows": partial(speed, 32)}
    return found | {"memory: held": held, "benchmark: table": benchmark}
