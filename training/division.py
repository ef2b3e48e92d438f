"""How a model's blocks are divided among the ranks of a pipeline: numbers in, numbers out, and no torch.

cut(8, block=6.0, head=3.0, stages=2)     [range(0, 4), range(4, 8)], the blocks of every stage
rank_of(3, pp=2, schedule="zbv")          0, which holds the first stage of the V and the last
stages_of(0, 2, "zbv", per_rank=2)        [0, 3]
"""

SINGLE = ("gpipe", "1f1b")  # schedules of one stage a rank
ZERO_BUBBLE = ("zb", "zbv")  # that take the gradients of weights apart from those of activations


def cut(layers: int, block: float, head: float, stages: int) -> list[range]:
    """The blocks of every stage: neighbours, and such that the stage that costs most costs least.

    block, head: what one costs, in any unit. The head's product counts as part of the last stage; an embedding is
    looked up, which costs nothing.
    """
    before = max(1, stages - 1)
    # blocks of the last stage: as many as leave the longest of the others no shorter than itself, head included
    costs = {
        last: max(-(-(layers - last) // before) * block, last * block + head) for last in range(1, layers - stages + 2)
    }
    last = min(costs, key=lambda count: (costs[count], -count)) if stages > 1 else layers
    least, more = divmod(layers - last, before)
    # early stages hold most micro-batches at a time, so it is the later ones that have a block more
    counts = [least + (stage >= before - more) for stage in range(stages - 1)] + [last]
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def rank_of(stage: int, pp: int, schedule: str) -> int:
    """The rank that holds a stage: one after another, and again; in a V, on the way there and on the way back."""
    return min(stage, 2 * pp - 1 - stage) if schedule == "zbv" else stage % pp


def stages_of(rank: int, pp: int, schedule: str, per_rank: int) -> list[int]:
    """The stages that a rank holds, in order."""
    return [stage for stage in range(pp * per_rank) if rank_of(stage, pp, schedule) == rank]
