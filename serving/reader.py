"""Tokens in, what a client is told out: text, thoughts and tool calls, as soon as each is certain.

    reader = ChatReader(tokenizer, stop=["\\n\\n"])
    reader.push(9), reader.push(71), reader.push(10), reader.push(72)
    -> [], [("reasoning_content", "2+3")], [], [("content", "5")]
    reader.push(13) ...        [] until the call between <tool_call> and </tool_call> is whole, then
                               [("tool_call", Call("weather", {"city": "Rome"}))]
    reader.finish()            what was held back: the beginning of a stop string, of a control token's name, of a call

What is sent cannot be taken back, so some things differ from `parse_answer`, which sees whole answers: a thought that
never ended is a thought, and each call stands for itself, whatever the others look like.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from dataset import TextTokenizer
from evaluation.tools.calls import Call, read

Kind = Literal["content", "reasoning_content"]


class Piece(NamedTuple):
    """Text of an answer, or of the thought before it."""

    kind: Kind
    text: str


Delta = Piece | Call

THINK, END_THINK, CALL, END_CALL = "<think>", "</think>", "<tool_call>", "</tool_call>"


class TextReader:
    """Text up to a stop string, which is no part of it; control tokens are left out."""

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str] = (), skip_control: bool = True) -> None:
        self.decoder = tokenizer.stream_decoder(skip_control)
        self.stop = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string came."""
        return self.stop.found

    def push(self, token_id: int) -> list[Delta]:
        return list(self.deltas(self.decoder.push(token_id)))

    def finish(self) -> list[Delta]:
        """What was held back, once no token comes any more."""
        return [*self.deltas(self.decoder.flush()), *self.content("", end=True)]

    def deltas(self, text: str) -> Iterator[Delta]:
        yield from self.content(text)

    def content(self, text: str, end: bool = False) -> Iterator[Delta]:
        if found := self.stop.push(text, end):
            yield Piece("content", found)


class ChatReader(TextReader):
    """An assistant's answer: thought, text and calls. Stop strings are looked for in the text alone."""

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str] = ()) -> None:
        super().__init__(tokenizer, stop, skip_control=False)
        self.inside: Literal["beginning", "thought", "text", "call"] = "beginning"
        self.held = ""  # not told yet

    def finish(self) -> list[Delta]:
        deltas = list(self.deltas(self.decoder.flush()))
        rest = (CALL if self.inside == "call" else "") + self.held
        if self.inside == "thought" and rest:
            return [*deltas, Piece("reasoning_content", rest)]
        return [*deltas, *self.content(rest, end=True)]

    def deltas(self, text: str) -> Iterator[Delta]:
        self.held += text
        inside = None
        while inside != self.inside:  # what ended one thing may hold the next as a whole
            inside = self.inside
            if inside == "beginning":
                self.begin()
            elif inside == "thought":
                if thought := self.until(END_THINK, "text"):
                    yield Piece("reasoning_content", thought)
            elif inside == "text":
                yield from self.content(self.until(CALL, "call"))
            elif END_CALL in self.held:
                body = self.until(END_CALL, "text")
                yield from self.calls(body)

    def begin(self) -> None:
        """A thought stands at the very beginning, behind white space at most."""
        text = self.held.lstrip()
        if text.startswith(THINK):
            self.held, self.inside = text.removeprefix(THINK), "thought"
        elif not THINK.startswith(text):
            self.inside = "text"

    def until(self, mark: str, then: Literal["text", "call"]) -> str:
        """What is held up to a mark, where that is found; else up to what may be its beginning."""
        found, marked, rest = self.held.partition(mark)
        if marked:
            self.inside = then
        else:
            found, rest = split_at_beginning(self.held, (mark,))
        self.held = rest
        return found

    def calls(self, body: str) -> Iterator[Delta]:
        found = read(body, closed=True)
        if all(isinstance(call, Call) for call in found):
            yield from (call for call in found if isinstance(call, Call))
        else:
            yield from self.content(CALL + body + END_CALL)


class StopStrings:
    """Text in, text out up to the first stop string; what may be the beginning of one is held back.

    StopStrings(["END"]): push("a E") -> "a ", push("ND b") -> "", and `found`.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop, self.held, self.found = tuple(stop), "", False

    def push(self, text: str, end: bool = False) -> str:
        """Text that is certain; at the `end` all of it is."""
        if self.found:
            return ""
        self.held += text
        places = [place for each in self.stop if (place := self.held.find(each)) >= 0]
        if places:
            self.found = True
            told, self.held = self.held[: min(places)], ""
        elif end:
            told, self.held = self.held, ""
        else:
            told, self.held = split_at_beginning(self.held, self.stop)
        return told


def split_at_beginning(text: str, marks: Sequence[str]) -> tuple[str, str]:
    """Text up to where it ends in the beginning of a mark, and that.

    ("a </thi", ["</think>"]) -> ("a ", "</thi")
    """
    longest = max(map(len, marks), default=0) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(mark.startswith(text[start:]) for mark in marks):
            return text[:start], text[start:]
    return text, ""
