"""What comes of jobs in, the API's JSON out: whole, or as a stream of server-sent events.

data: {"id": "chatcmpl-...", "object": "chat.completion.chunk", ..., "choices": [{"index": 0, "delta":
       {"content": "Hi"}, "logprobs": null, "finish_reason": null}]}

data: [DONE]
"""

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.desk import ClientGone, Ticket
from serving.engine import Job, Progress, Served, TokenLogprob
from serving.errors import ApiError
from serving.reader import Call, Delta

Object = dict[str, Any]  # of JSON


class ChatTeller:
    """Of one chat request."""

    chunk_object, whole_object, prefix = "chat.completion.chunk", "chat.completion", "chatcmpl"

    def __init__(self, served: Served, jobs: Sequence[Job], n: int) -> None:
        self.served, self.jobs, self.n = served, jobs, n
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.calls = [0] * len(jobs)  # told so far

    def frame(self, kind: str, choices: list[Object]) -> Object:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.served.name, "choices": choices
        }  # fmt: skip

    def usage(self) -> Object:
        """Prompts count once, however many answers there are to each."""
        prompts = self.jobs[:: self.n]
        asked, said = sum(len(job.prompt) for job in prompts), sum(job.generated for job in self.jobs)
        return {
            "prompt_tokens": asked,
            "completion_tokens": said,
            "total_tokens": asked + said,
            "prompt_tokens_details": {"cached_tokens": sum(job.cached for job in prompts)},
        }

    # A stream

    def opening(self) -> Iterator[Object]:
        """Chunks before the first token."""
        for number in range(len(self.jobs)):
            yield self.chunk(number, {"role": "assistant", "content": ""})

    def chunks(self, number: int, progress: Progress) -> Iterator[Object]:
        logprobs = self.logprobs(progress.logprobs)
        for delta in progress.deltas:
            yield self.chunk(number, self.delta(number, delta), logprobs)
            logprobs = None
        if progress.finish_reason or logprobs:
            yield self.chunk(number, {}, logprobs, progress.finish_reason)

    def chunk(self, number: int, delta: Object, logprobs: Object | None = None, reason: str | None = None) -> Object:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.frame(self.chunk_object, [choice])

    def delta(self, number: int, delta: Delta) -> Object:
        if not isinstance(delta, Call):
            return {delta.kind: delta.text}
        self.calls[number] += 1
        return {"tool_calls": [{"index": self.calls[number] - 1, **self.call(delta)}]}

    def call(self, call: Call) -> Object:
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        function = {"name": call.name, "arguments": arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}

    # All at once

    def whole(self, progress: Sequence[Progress]) -> Object:
        """progress: of each job, all of it."""
        choices = [self.choice(number, each) for number, each in enumerate(progress)]
        return self.frame(self.whole_object, choices) | {"usage": self.usage()}

    def choice(self, number: int, progress: Progress) -> Object:
        texts = {"content": "", "reasoning_content": ""}
        calls = []
        for delta in progress.deltas:
            if isinstance(delta, Call):
                calls.append(self.call(delta))
            else:
                texts[delta.kind] += delta.text
        message: Object = {"role": "assistant", "content": texts["content"] or (None if calls else "")}
        if texts["reasoning_content"]:
            message["reasoning_content"] = texts["reasoning_content"]
        if calls:
            message["tool_calls"] = calls
        logprobs = (
            None if self.jobs[number].top_logprobs is None else self.logprobs(progress.logprobs) or {"content": []}
        )
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": progress.finish_reason}

    # Log-probabilities

    def logprobs(self, found: Sequence[TokenLogprob]) -> Object | None:
        return {"content": [self.logprob(each) for each in found]} if found else None

    def logprob(self, found: TokenLogprob) -> Object:
        return self.token(found.id, found.logprob) | {"top_logprobs": [self.token(*each) for each in found.top]}

    def token(self, token_id: int, logprob: float) -> Object:
        text = self.served.tokenizer.decode([token_id], skip_control=False)
        whole = "\ufffd" not in text  # a token may be a part of a character
        shown = text if whole else self.served.tokenizer.token_text(token_id)
        return {"token": shown, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


class CompletionTeller(ChatTeller):
    """Of one request to continue texts."""

    chunk_object, whole_object, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, served: Served, jobs: Sequence[Job], n: int) -> None:
        super().__init__(served, jobs, n)
        self.told = [0] * len(jobs)  # characters of the tokens whose log-probabilities were told

    def opening(self) -> Iterator[Object]:
        return iter(())

    def chunks(self, number: int, progress: Progress) -> Iterator[Object]:
        choice = self.choice(number, progress)
        if choice["text"] or choice["logprobs"] or choice["finish_reason"]:
            yield self.frame(self.chunk_object, [choice])

    def choice(self, number: int, progress: Progress) -> Object:
        text = "".join(delta.text for delta in progress.deltas if not isinstance(delta, Call))
        logprobs = None
        if self.jobs[number].top_logprobs is not None:
            logprobs = self.listed(number, progress.logprobs)
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": progress.finish_reason}

    def listed(self, number: int, found: Sequence[TokenLogprob]) -> Object:
        """Log-probabilities in the lists that the older API has."""
        tokens, offsets = [self.token(each.id, each.logprob)["token"] for each in found], []
        for token in tokens:
            offsets.append(self.told[number])
            self.told[number] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in found],
            "top_logprobs": [{self.token(*top)["token"]: top[1] for top in each.top} for each in found],
            "text_offset": offsets,
        }


class EventStream(Response):
    """Chunks as they come. An error after the first one ends the stream with an `error` object."""

    media_type = "text/event-stream"

    def __init__(self, ticket: Ticket, teller: ChatTeller, usage: bool) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.ticket, self.teller, self.usage = ticket, teller, usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(objects: Sequence[Object | str], more: bool = True) -> None:
            body = b"".join(event(each) for each in objects)
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            async with self.ticket.watched(receive):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await tell([self.with_usage(chunk) for chunk in self.teller.opening()])
                async for came in self.ticket:
                    chunks = [chunk for number, progress in came for chunk in self.teller.chunks(number, progress)]
                    if chunks:
                        await tell([self.with_usage(chunk) for chunk in chunks])
            closing = [self.teller.frame(self.teller.chunk_object, []) | {"usage": self.teller.usage()}]
            await tell([*(closing if self.usage else []), "[DONE]"], more=False)
        except ClientGone:
            pass
        except ApiError as error:
            await tell([error.body(), "[DONE]"], more=False)

    def with_usage(self, chunk: Object) -> Object:
        """A stream that ends with the usage says in every chunk that it is not there yet."""
        return chunk | {"usage": None} if self.usage else chunk


def event(value: Object | str) -> bytes:
    return b"data: " + (value.encode() if isinstance(value, str) else as_json(value)) + b"\n\n"


def as_json(value: Object) -> bytes:
    """A lone surrogate, which a model may write in the JSON of a call, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class JSON(Response):
    media_type = "application/json"

    def render(self, content: Object) -> bytes:
        return as_json(content)


def merged(parts: Sequence[Progress]) -> Progress:
    """All that came of one job, as if it had come at once."""
    deltas = [delta for part in parts for delta in part.deltas]
    logprobs = [each for part in parts for each in part.logprobs]
    return Progress(deltas, logprobs, parts[-1].finish_reason)


async def whole_answer(ticket: Ticket, teller: ChatTeller, receive: Receive) -> Response:
    """Everything at once, when all is over."""
    parts: list[list[Progress]] = [[] for _ in ticket.jobs]
    try:
        async with ticket.watched(receive):
            async for came in ticket:
                for number, progress in came:
                    parts[number].append(progress)
    except ClientGone:
        return Response(status_code=499)  # nobody reads it
    return JSON(teller.whole([merged(each) for each in parts]))
