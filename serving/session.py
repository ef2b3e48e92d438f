"""A conversation with a model: a user's message in, the answer out in pieces of text as it is generated.

    session = Session(model, tokenizer, {"max_new_tokens": 256, "temperature": 0.0})
    session.answer("Add 2 and 3")  -> "<think>", "2", "+", "3", "</think>", "5", ""
    session.messages               -> [{"role": "user", "content": "Add 2 and 3"},
                                       {"role": "assistant", "reasoning_content": "2+3", "content": "5"}]

Nothing is printed here. That messages were left out of a full context, or that an answer was cut, is told to `notice`
when it happens, before the first piece and after the last; how it is worded is the caller's business.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Literal, Required, TypedDict

from dataset import Message, TextTokenizer, parse_answer, render_chat
from dataset.forms import start_document
from model import GPT, stream


class Sampling(TypedDict, total=False):
    """How tokens are chosen; `model.stream` says what each means and what it is when left out."""

    max_new_tokens: Required[int]
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float


@dataclass(frozen=True)
class ContextFull:
    """From here on the model does not see the oldest messages any more."""

    left_out: int  # messages, beside those that were left out before


@dataclass(frozen=True)
class AnswerCut:
    """The answer did not end by itself."""

    limit: Literal["max_new_tokens", "context"]  # what ended it
    tokens: int  # how many that limit is


Notice = ContextFull | AnswerCut


def ignore(notice: Notice) -> None:
    """For callers that do not want to know."""


@dataclass
class Session:
    """One conversation; or, with `raw`, texts continued one by one."""

    model: GPT
    tokenizer: TextTokenizer
    sampling: Sampling
    seed: int | None = None  # makes the answers repeatable
    system: str | None = None  # the system prompt
    raw: bool = False
    notice: Callable[[Notice], None] = ignore
    messages: list[Message] = field(default_factory=list)  # without the system prompt
    forgotten: int = 0  # messages at the beginning that the context has no room for any more
    answers: int = 0

    def conversation(self, start: int = 0) -> list[Message]:
        """The messages from `start` on, after the system prompt."""
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.messages[start:]

    def answer(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to `text` piece by piece. What came is kept, also when it is stopped halfway by `close`.

        Raises ValueError for a text that leaves no room for an answer; it is then no part of the conversation.
        """
        prompt, start = self.prompt(text)
        if start > self.forgotten:
            self.notice(ContextFull(start - self.forgotten))
            self.forgotten = start
        ids: list[int] = []
        try:
            yield from self.generate(prompt, ids)
        finally:
            if not self.raw:
                answer = parse_answer(self.tokenizer.decode(ids, skip_control=False))
                self.messages += [{"role": "user", "content": text}, answer]

    def prompt(self, text: str) -> tuple[list[int], int]:
        """Prompt ids for a new message, and the first message they hold: the oldest are left out where there is no
        room for all."""
        if self.raw:
            return start_document(self.tokenizer, self.tokenizer.encode(text)), 0
        context = self.model.config.max_seq_len
        reserve = min(self.sampling["max_new_tokens"], context // 4)  # tokens kept free for the answer
        for start in range(self.forgotten, len(self.messages) + 1, 2):
            messages: list[Message] = [*self.conversation(start), {"role": "user", "content": text}]
            ids = render_chat(self.tokenizer, messages, add_generation_prompt=True).ids
            if len(ids) + reserve <= context:
                break
        if len(ids) >= context:
            raise ValueError(
                f"this message and the system prompt are {len(ids)} tokens; the context is {context}: shorten them"
            )
        return ids, start

    def generate(self, prompt: list[int], ids: list[int]) -> Iterator[str]:
        """Yield text as it is generated, its tokens going into `ids`; tell where the length cut it."""
        seed = None if self.seed is None else self.seed + self.answers
        self.answers += 1
        decoder = self.tokenizer.stream_decoder(skip_control=False)
        stop_ids, vocab_size = self.tokenizer.stop_ids, self.tokenizer.vocab_size
        for (token,) in stream(
            self.model, [prompt], stop_ids=stop_ids, vocab_size=vocab_size, seed=seed, **self.sampling
        ):
            assert token is not None
            if token in stop_ids:
                yield decoder.flush()
                return
            ids.append(token)
            yield decoder.push(token)
        yield decoder.flush()
        limit, context = self.sampling["max_new_tokens"], self.model.config.max_seq_len
        self.notice(AnswerCut("max_new_tokens", limit) if len(ids) >= limit else AnswerCut("context", context))
