"""Answers that call tools in, the same answers with what the tools said and what the model said to it out.

    <tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call><|end|>    drawn
    <|tool|>42<|end|><|assistant|>                                                               read
    It is 42.<|end|>                                                                             drawn

It stays one answer with one reward. What the model drew is learnt from, what it read is not, and --max_new_tokens
counts what it drew in all of its turns. An answer's numbers to draw by go on where its last turn left off, so that it
is the same whatever else is in the batch.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from dataset import Message, TextTokenizer, render_chat
from dataset.chat import parse_answer
from dataset.cores import usable_cores
from evaluation.tools import Tool, tool_turns
from model import GPT
from model.draw import draw
from training.groups import Answer, Group, Sampling, add_turn, uniform

FAILED = "error: "  # what a result of a call begins with that could not be made (evaluation/tools/calls.py)


class Toolbox(NamedTuple):
    """What answers may call."""

    tools: Mapping[str, Tool]
    max_turns: int  # turns of the model's in one answer


NO_TOOLS = Toolbox({}, 1)


class Caller(NamedTuple):
    """An answer whose last turn has ended."""

    group: Group
    place: int  # of the answer, in its group

    @property
    def answer(self) -> Answer:
        return self.group.answers[self.place]

    @property
    def ids(self) -> list[int]:
        return self.group.prompt + self.answer.ids


def take_turns(network: GPT, tokenizer: TextTokenizer, groups: Sequence[Group], how: Sampling, box: Toolbox) -> None:
    """Let every answer that called something read the results and go on, until it calls nothing, has had `max_turns`
    turns, or has no room left. In place."""
    ended = [Caller(group, place) for group in groups for place in range(len(group.answers))]
    for _ in range(box.max_turns - 1):
        with ThreadPoolExecutor(usable_cores()) as pool:  # a user's tool is a process of its own, and is waited for
            results = list(pool.map(lambda caller: called(caller, box), ended))
        both = zip(ended, results, strict=True)
        ended = [caller for caller, said in both if said and read(tokenizer, caller, said, network.config.max_seq_len)]
        if not ended:
            return
        left = [how.max_new_tokens - len(caller.answer.logps) for caller in ended]
        uniforms = torch.stack([
            uniform(how, caller.group.key, caller.place).roll(-len(caller.answer.logps)) for caller in ended
        ])  # fmt: skip
        turns = draw(
            network, [caller.ids for caller in ended], uniforms, copies=1, max_new_tokens=left,
            temperature=how.temperature, stop_ids=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size,
        )  # fmt: skip
        for caller, turn in zip(ended, turns, strict=True):
            add_turn(caller.answer, turn, tokenizer)


def called(caller: Caller, box: Toolbox) -> list[Message]:
    """What the tools say to an answer's last turn; nothing where it called none, or was cut."""
    return tool_turns(caller.answer.text, box.tools) if caller.answer.finish_reason == "stop" else []


def read(tokenizer: TextTokenizer, caller: Caller, said: list[Message], most: int) -> bool:
    """Whether the answer goes on, with what the tools said read. Where the context has no room for that, it is cut."""
    answer = caller.answer
    ids = between_turns(tokenizer, caller.group.messages, said)
    if len(caller.ids) + len(ids) >= most:
        answer.finish_reason = "length"
        return False
    answer.turns += [parse_answer(answer.text), *said]
    answer.ids += ids
    answer.drawn += [False] * len(ids)
    return True


def count_calls(answers: Sequence[Answer]) -> tuple[int, int]:
    """How many calls were made, and how many of them failed."""
    said = [turn["content"] or "" for answer in answers for turn in answer.turns if turn["role"] == "tool"]
    return len(said), sum(text.startswith(FAILED) for text in said)


def between_turns(tokenizer: TextTokenizer, messages: Sequence[Message], said: Sequence[Message]) -> list[int]:
    """What stands between the end of an answer and the next one: the results, and what asks the model to speak."""
    spoke: Message = {"role": "assistant", "content": "x"}
    before = render_chat(tokenizer, [*messages, spoke])
    whole = render_chat(tokenizer, [*messages, spoke, *said], add_generation_prompt=True)
    end = len(before.mask) - before.mask[::-1].index(True)  # behind the token that ended the turn
    assert whole.ids[:end] == before.ids[:end]
    return whole.ids[end:]
