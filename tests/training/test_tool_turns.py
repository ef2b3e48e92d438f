"""Answers of several turns: what a tool says is read, not drawn, and the whole is what render_chat makes of it."""

import contextlib
from pathlib import Path

import pytest
import torch

from dataset import DEFAULT_TOKENIZER, PROMPT, Loader, build_rows, load_tokenizer, render_chat
from dataset.loader import PromptRows
from evaluation import Reward
from evaluation.tools import build_tools
from model import GPT, load_pretrained
from tests.dataset.foreign import make_foreign_folder
from tests.helpers import write_jsonl
from tests.memorised import assistant, make_memorised, user
from training import GRPO, GRPOConfig
from training.distributed import World
from training.engines import Machine, SingleEngine
from training.groups import Sampling
from training.rollout import Judged, Judging
from training.tool_turns import Toolbox, between_turns

ASK = {"name": "calculator", "arguments": {"expression": "6*7"}}
ASK_WRONGLY = {"name": "oracle", "arguments": {}}
ERROR = "error: found no tool 'oracle', expected one of calculator"
CALLED = [user("6 x 7?"), assistant("", tool_calls=[ASK]), {"role": "tool", "content": "42"}, assistant("It is 42.")]
FAILED = [
    user("Tomorrow?"),
    assistant("", tool_calls=[ASK_WRONGLY, ASK]),
    {"role": "tool", "content": ERROR},
    {"role": "tool", "content": "42"},
    assistant("Nobody knows."),
]
PLAIN = [user("Hi"), assistant("Hello!")]
HOW = Sampling(group_size=2, max_new_tokens=80, temperature=0.2, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GPT:
    folder = make_memorised(tmp_path_factory.mktemp("caller") / "model", [CALLED, FAILED, PLAIN], max_seq_len=160)
    return load_pretrained(folder)


@pytest.fixture
def make_rollouts(model: GPT, tmp_path: Path):
    tokenizer = load_tokenizer(DEFAULT_TOKENIZER)

    def make(*conversations, how: Sampling = HOW, max_turns: int = 4) -> Judged:
        data = [{"conversations": messages[:1], "answer": "42"} for messages in conversations]
        rows = build_rows(PROMPT, str(write_jsonl(tmp_path / "p.jsonl", data)), tokenizer, 160, cache_dir=tmp_path)
        assert isinstance(rows, PromptRows)
        engine = SingleEngine(model, GRPOConfig(), Machine(World(), torch.device("cpu"), torch.float32))
        return Judged(
            Loader(rows, 4, rows_per_update=len(data), seed=5), engine, tokenizer, how,
            Judging(Reward(["number"]), 1.0), lambda network: contextlib.nullcontext(network),
            box=Toolbox(build_tools(["calculator"]), max_turns),
        )  # fmt: skip

    return make


def answered(rollouts: Judged) -> dict[str, list]:
    """First question -> its answers."""
    with rollouts.engine.generator() as network:
        groups = rollouts.answered(list(range(rollouts.rows_per_update)), network)
    return {group.messages[0]["content"]: group.answers for group in groups}


def test_the_whole_is_the_conversation_as_it_is_rendered(make_rollouts) -> None:
    """Ids, and what is learnt of them, are those that fine-tuning would make of the same conversation."""
    rollouts = make_rollouts(CALLED, FAILED, PLAIN)
    found = answered(rollouts)
    for conversation in (CALLED, FAILED, PLAIN):
        rendered = render_chat(rollouts.tokenizer, conversation)
        begin = len(render_chat(rollouts.tokenizer, conversation[:1], add_generation_prompt=True).ids)
        for answer in found[conversation[0]["content"]]:
            assert answer.ids == rendered.ids[begin:] and answer.drawn == rendered.mask[begin:]
            assert len(answer.logps) == sum(answer.drawn) and answer.finish_reason == "stop"
            assert answer.turns == conversation[1:-1] and answer.text == conversation[-1]["content"]


def test_training_reads_every_turn_as_it_was_drawn(make_rollouts) -> None:
    rollouts = make_rollouts(CALLED, FAILED, PLAIN)
    objective = GRPO(temperature=HOW.temperature, parts=["number"], tools=True)
    (batch,) = rollouts.update(0)
    output = rollouts.engine.ask(batch, objective)
    assert (-output.nll.flatten()[batch.learnt] - batch.drawn_at).abs().max() < 3e-5
    _, sums = objective(output, batch)
    logged = objective.metrics({name: float(value) for name, value in sums.items()}, objective.weight(batch))
    assert logged["calls"] == 1.0 and logged["failed_calls"] == pytest.approx(1 / 3)
    assert logged["number_reward"] == pytest.approx(1 / 3)  # of what was said last


def test_an_answer_is_the_same_in_a_crowd(make_rollouts) -> None:
    how = HOW._replace(temperature=1.5)  # answers differ
    together = answered(make_rollouts(CALLED, FAILED, PLAIN, how=how))
    rollouts = make_rollouts(CALLED, FAILED, PLAIN, how=how)
    for position in range(3):
        with rollouts.engine.generator() as network:
            (group,) = rollouts.answered([position], network)
        for alone, crowded in zip(group.answers, together[group.messages[0]["content"]], strict=True):
            assert alone.ids == crowded.ids and alone.drawn == crowded.drawn


def test_turns_tokens_and_the_context_have_ends(make_rollouts, model: GPT) -> None:
    (answer, _) = answered(make_rollouts(CALLED, max_turns=1))["6 x 7?"]
    assert answer.turns == [] and "calculator" in answer.text and answer.finish_reason == "stop"
    drawn = len(answer.ids)
    for more in (0, 2):
        (answer, _) = answered(make_rollouts(CALLED, how=HOW._replace(max_new_tokens=drawn + more)))["6 x 7?"]
        assert len(answer.logps) == drawn + more and answer.finish_reason == "length" and len(answer.turns) == 2
    prompt = render_chat(load_tokenizer(DEFAULT_TOKENIZER), CALLED[:1], add_generation_prompt=True).ids
    context, model.config.max_seq_len = model.config.max_seq_len, len(prompt) + drawn + 4  # its result has more
    try:
        (answer, _) = answered(make_rollouts(CALLED))["6 x 7?"]
    finally:
        model.config.max_seq_len = context
    assert answer.turns == [] and answer.finish_reason == "length" and len(answer.ids) == drawn


def test_other_models_templates_say_what_stands_between_turns(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_foreign_folder(tmp_path / "qwen"))
    whole = render_chat(tokenizer, [CALLED[0], assistant("x"), CALLED[2]], add_generation_prompt=True)
    ids = between_turns(tokenizer, CALLED[:1], CALLED[2:3])
    assert whole.ids[-len(ids) :] == ids and whole.ids[-len(ids) - 1] in tokenizer.stop_ids
