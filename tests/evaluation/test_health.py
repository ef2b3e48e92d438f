"""Whether answers are whole: loops by hand, and a model that knows its answers by heart."""

from pathlib import Path

import pytest

from dataset import load_tokenizer
from evaluation.health import Answer, answer, health
from evaluation.wording import loops
from model import load_pretrained
from tests.memorised import CONVERSATIONS, make_memorised, user


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([5] * 12, True),
        ([5] * 11, False),
        ([5, 9] * 6, True),
        ([5, 9] * 5 + [5], False),
        ([1, 2, 3, *range(20, 24), *range(20, 24), *range(20, 24)], True),
        ([*range(20, 24), *range(20, 24), 7, *range(20, 24)], False),  # not in a row
        ([*range(30), *range(30), *range(29)], False),
        ([*range(30)] * 3, True),
        ([*range(40)], False),
        ([], False),
    ],
)
def test_a_block_that_comes_three_times_in_a_row_is_a_loop(ids: list[int], found: bool) -> None:
    assert loops(ids) is found


def test_numbers_of_hand_made_answers() -> None:
    answers = [Answer("", [1, 2, 3], True), Answer("", [1, 2], True), Answer("", [7] * 13, False)]
    assert health(answers) == {"ended": 2 / 3, "no_loops": 2 / 3, "distinct_2": 3 / 15, "answer_tokens": 6.0}


def test_answers_known_by_heart_are_whole(tmp_path: Path) -> None:
    folder = make_memorised(tmp_path)
    model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    prompts = [[messages[0]] for messages in CONVERSATIONS[:2]]
    answers = answer(model, tokenizer, prompts, batch_size=1)
    assert [each.text for each in answers] == ["I am a seed. 🌱", "我是一颗种子。"]
    assert health(answers)["ended"] == health(answers)["no_loops"] == 1.0
    cut = answer(model, tokenizer, prompts, max_new_tokens=2)
    assert health(cut)["ended"] == 0.0 and health(cut)["answer_tokens"] == 2.0


def test_a_seed_repeats_what_is_drawn(tmp_path: Path) -> None:
    folder = make_memorised(tmp_path)
    model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    drawn = [answer(model, tokenizer, [[user("xyz")]] * 3, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_no_answers_are_an_error() -> None:
    with pytest.raises(ValueError, match="no answers"):
        health([])
