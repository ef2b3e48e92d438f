"""How long do a pipeline's ranks wait? What each did in some updates in, as it did it; shares of their time out.

    with recorded(actions):                          of this rank, in order
        update(engine, batches)
    shares([[actions of rank 0], [of rank 1]])       an update of two ranks: Shares(order=0.33, costs=0.36, waited=0.39)

    1f1b of two ranks and two micro-batches; F forward, B backward, which takes twice as long:

    rank 0   F0 F1 .. .. B0 B0 .. B1 B1
    rank 1   .. F0 B0 B0 F1 B1 B1 .. ..              each works 6 of 9 units

`order`: were all stages alike, and F and both halves of B, I (gradients of what came in) and W (weights), a unit each.
This is what papers say of a schedule. `costs`: with the processor time that actions took here; it knows that stages
are not alike, and neither messages nor other programs. `waited`: measured, from the first action of all to the last.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import wraps
from statistics import mean, median
from typing import Any, NamedTuple

from torch.distributed.pipelining import PipelineStage

UNITS = {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}
KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "forward_one_chunk": lambda options: "F",
    "backward_one_chunk": lambda options: "B" if options.get("full_backward", True) else "I",
    "backward_weight_one_chunk": lambda options: "W",
}


class Action(NamedTuple):
    """What a rank did with a micro-batch in one of its stages."""

    kind: str  # of UNITS
    stage: int
    micro_batch: int
    began: float = 0.0  # seconds, by a clock that all processes of a machine have
    ended: float = 0.0
    busy: float = 0.0  # seconds of the processor


Orders = list[list[Action]]  # by rank


class Shares(NamedTuple):
    """Of the time of an update, of all ranks together."""

    order: float
    costs: float
    waited: float


@contextlib.contextmanager
def recorded(actions: list[Action]) -> Iterator[None]:
    """Around an update on a CPU: on GPUs a call returns before anything is done."""
    before = {name: getattr(PipelineStage, name) for name in KINDS}
    try:
        for name, method in before.items():
            setattr(PipelineStage, name, noted(method, KINDS[name], actions))
        yield
    finally:
        for name, method in before.items():
            setattr(PipelineStage, name, method)


def noted(method: Callable[..., Any], kind: Callable[[dict[str, Any]], str], actions: list[Action]) -> Any:
    @wraps(method)
    def timed(stage: PipelineStage, micro_batch: int, *rest: Any, **options: Any) -> Any:
        began, before = time.perf_counter(), time.thread_time()
        returned = method(stage, micro_batch, *rest, **options)
        busy = time.thread_time() - before
        actions.append(Action(kind(options), stage.stage_index, micro_batch, began, time.perf_counter(), busy))
        return returned

    return timed


def shares(updates: list[Orders]) -> Shares:
    """`costs` goes by the median of each stage's actions of a kind, `waited` is the median of the updates."""
    took = defaultdict(list)
    for actions in updates[0]:
        for action in actions:
            took[action.kind, action.stage].append(action.busy)
    middle = {which: median(seconds) for which, seconds in took.items()}
    return Shares(
        idle(updates[0], lambda action: UNITS[action.kind]),
        idle(updates[0], lambda action: middle[action.kind, action.stage]),
        median(waited(orders) for orders in updates),
    )


def waited(orders: Orders) -> float:
    every = [action for actions in orders for action in actions]
    whole = max(action.ended for action in every) - min(action.began for action in every)
    return 1 - sum(action.ended - action.began for action in every) / len(orders) / whole


def idle(orders: Orders, cost: Callable[[Action], float]) -> float:
    """The share in which ranks wait that do their actions in this order, each as soon as what it needs is there."""
    done: dict[tuple[str, int, int], float] = {}  # when an action, its kind "F", "I" or "W", is over
    left = [list(actions) for actions in orders]
    free = [0.0] * len(orders)
    last = max(action.stage for actions in orders for action in actions)
    while any(left):
        moved = False
        for rank, actions in enumerate(left):
            while actions and all(need in done for need in needs(actions[0], last)):
                action = actions.pop(0)
                begins = max([free[rank], *(done[need] for need in needs(action, last))])
                free[rank] = begins + cost(action)
                kind = "I" if action.kind == "B" else action.kind
                done[kind, action.stage, action.micro_batch] = free[rank]
                moved = True
        if not moved:
            raise ValueError(f"no rank can go on with {[actions[0] for actions in left if actions]}")
    busy = mean(sum(cost(action) for action in actions) for actions in orders)
    return 1 - busy / max(free)


def needs(action: Action, last: int) -> list[tuple[str, int, int]]:
    """What has to be over before an action; `last` is the number of the last stage."""
    stage, i = action.stage, action.micro_batch
    if action.kind == "F":
        return [("F", stage - 1, i)] if stage else []
    if action.kind == "W":
        return [("I", stage, i)]
    return [("F", stage, i), *([("I", stage + 1, i)] if stage < last else [])]
