"""Where an update's time goes: a prepared update in; a Chrome trace, every operation and seven groups of them out.

An operation's own time (without those it calls) counts for the first group whose pattern fits it or one of those that
called it. On a GPU it is the time of the kernels an operation starts.
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from scripts.benchmark_clock import Work, wait

GROUPS = {
    "matrix products": r"^aten::(mm|addmm_?|linear|mv)$|mkldnn",
    "loss": r"nll|NLL|SummedLoss|log_softmax|logsumexp|cross_entropy|logsigmoid|log_sigmoid",
    "attention": r"scaled_dot_product|flash_attn|flash_attention|efficient_attention|varlen|bmm|softmax",
    "optimizer": r"Optimizer\.|adam|muon|clip_grad|_foreach|linalg_vector_norm|unscale",
    "copies": r"copy|clone|contiguous|Memcpy|Memset|^aten::(cat|stack|to|embedding|index|gather|scatter|masked_|fill"
    r"|zero|empty|nonzero)",
    "norm and elementwise": r"^aten::",
}  # in order: a product within the loss is a matrix product; those of many matrices are attention's
OTHER = "other"


def group_of(event: FunctionEvent) -> str:
    names = [event.name]
    caller = event.cpu_parent
    while caller is not None:
        names.append(caller.name)
        caller = caller.cpu_parent
    return next((group for group, pattern in GROUPS.items() if any(re.search(pattern, n) for n in names)), OTHER)


def profiled(update: Callable[[], Work], device: torch.device, trace: Path) -> dict[str, float]:
    """Run the update; seconds by group. Writes `trace`, and beside it all operations as text."""
    on_card = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]
    with profile(activities=activities) as prof:
        update()
        wait(device)
    trace.parent.mkdir(parents=True, exist_ok=True)
    prof.export_chrome_trace(str(trace))
    order = "self_device_time_total" if on_card else "self_cpu_time_total"
    table = prof.key_averages().table(sort_by=order, row_limit=-1, max_name_column_width=60)
    trace.with_suffix(".txt").write_text(table, encoding="utf-8")
    spent: Counter[str] = Counter()
    for event in prof.events() or []:
        if event.device_type == torch.autograd.DeviceType.CPU:
            spent[group_of(event)] += event.self_device_time_total if on_card else event.self_cpu_time_total
    return {group: spent[group] / 1e6 for group in (*GROUPS, OTHER)}
