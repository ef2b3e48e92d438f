"""The house stays readable: what is counted in tests/counts.py keeps within bounds."""

import pytest

from tests.counts import files, follow, longest_functions, words


@pytest.mark.parametrize(("stage", "crossings_at_most", "files_at_most"), [("pretrain", 23, 14), ("full_sft", 25, 15)])
def test_one_batch_is_followed_through_few_files(stage: str, crossings_at_most: int, files_at_most: int) -> None:
    found = follow(stage)
    called = {place.split(":")[1] for _, place in found}
    assert {"read_rows", "GPT.forward", "NextToken.__call__", "Loader.update"} <= called
    assert len(found) <= crossings_at_most and len(files(found)) <= files_at_most


def test_types_say_something() -> None:
    counts = words()
    assert counts["Any"] / counts["lines"] <= 0.012
    assert counts["type: ignore"] / counts["lines"] <= 0.0015


def test_no_function_is_scrolled_for() -> None:
    assert [found for found in longest_functions() if found[0] > 50] == []
