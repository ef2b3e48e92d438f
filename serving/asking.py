"""A request of the API in, jobs for the engine out.

    chat_jobs(served, context=512, request, deadline)
    {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "n": 2}
    -> two jobs of the prompt [1, 5, 4418, 352, 8, 6], of at most 8 tokens each

A conversation that the context has no room for is refused, not shortened: what a client did not send away, it believes
to be read. Rendering a long one takes a while, so this is called outside the event loop.
"""

from collections.abc import Sequence
from typing import cast

from dataset import Message, TextTokenizer, render_chat
from dataset.forms import start_document
from model.generate import uniforms
from serving.engine import Job, SamplingParams, Served
from serving.errors import ApiError
from serving.protocol import ChatMessage, ChatRequest, CompletionRequest, Request
from serving.reader import ChatReader, TextReader

MAX_STOPS, MAX_STOP_LENGTH, MAX_ANSWERS = 4, 256, 64


def chat_jobs(served: Served, context: int, request: ChatRequest, deadline: float) -> list[Job]:
    """One job an answer. Raises ApiError (400) for what the model cannot be asked."""
    if not served.chat:
        raise ApiError(400, f"{served.name} continues texts and does not chat; ask /v1/completions", param="model")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    try:
        messages = to_messages(request)
        check_length(
            served.tokenizer, context, sum(len(message.get("content") or "") for message in messages), "messages"
        )
        prompt = render_chat(served.tokenizer, messages, add_generation_prompt=True).ids
    except (ValueError, RecursionError) as error:
        raise ApiError(400, str(error) or "messages are nested too deeply", param="messages") from None
    most = request.max_completion_tokens or request.max_tokens
    top = (request.top_logprobs or 0) if request.logprobs else None
    return jobs(served, context, request, [prompt], most, top, deadline, ChatReader, "messages")


def completion_jobs(served: Served, context: int, request: CompletionRequest, deadline: float) -> list[Job]:
    """One job an answer, those to the first prompt first. Raises ApiError (400)."""
    given = request.prompt
    one = isinstance(given, str) or not given or isinstance(given[0], int)
    texts = cast(list[str | list[int]], [given] if one else given)
    prompts = [prompt_ids(served.tokenizer, context, text) for text in texts]
    most = request.max_tokens or 16
    return jobs(served, context, request, prompts, most, request.logprobs, deadline, TextReader, "prompt")


def jobs(
    served: Served,
    context: int,
    request: Request,
    prompts: Sequence[list[int]],
    most: int | None,
    top_logprobs: int | None,
    deadline: float,
    reader: type[TextReader],
    param: str,
) -> list[Job]:
    n, stop = request.n or 1, stop_strings(request.stop)
    if len(prompts) * n > MAX_ANSWERS:
        raise ApiError(
            400, f"{len(prompts) * n} answers are asked for at once; at most {MAX_ANSWERS} may be", param="n"
        )
    for prompt in prompts:
        if len(prompt) >= context:
            raise too_long(f"{len(prompt)} tokens", context, param)
    room = [min(most or context, context - len(prompt)) for prompt in prompts]
    draws = uniforms(len(prompts) * n, max(room), request.seed).tolist()
    sampling = sampling_of(request)
    return [
        Job(
            prompt, room[i // n], sampling, draws[i], reader(served.tokenizer, stop), deadline, top_logprobs
        )
        for i, prompt in enumerate(prompt for prompt in prompts for _ in range(n))
    ]  # fmt: skip


def sampling_of(request: Request) -> SamplingParams:
    """OpenAI's defaults for what was not given. With temperature 0 the rest has no effect."""
    penalty = request.repetition_penalty or 1.0
    if request.temperature == 0:
        return SamplingParams(0.0, repetition_penalty=penalty)
    top_p = 1.0 if request.top_p is None else max(request.top_p, 1e-6)  # 0: the likeliest token alone
    return SamplingParams(
        1.0 if request.temperature is None else request.temperature, top_p, request.top_k or 0, penalty
    )


def stop_strings(stop: str | list[str] | None) -> list[str]:
    found = [stop] if isinstance(stop, str) else stop or []
    if len(found) > MAX_STOPS or any(len(each) > MAX_STOP_LENGTH for each in found):
        raise ApiError(
            400, f"stop may hold {MAX_STOPS} texts of {MAX_STOP_LENGTH} characters each at most", param="stop"
        )
    return found


def prompt_ids(tokenizer: TextTokenizer, context: int, given: str | list[int]) -> list[int]:
    if isinstance(given, list):
        wrong = next((token for token in given if not 0 <= token < tokenizer.vocab_size), None)
        if wrong is not None:
            raise ApiError(
                400, f"prompt holds the token id {wrong}; ids are 0 to {tokenizer.vocab_size - 1}", param="prompt"
            )
        ids = given
    else:
        check_length(tokenizer, context, len(given), "prompt")
        try:
            ids = start_document(tokenizer, tokenizer.encode(given))
        except ValueError as error:
            raise ApiError(400, str(error), param="prompt") from None
    if not ids:
        raise ApiError(400, "prompt is empty; give a text", param="prompt")
    return ids


def check_length(tokenizer: TextTokenizer, context: int, characters: int, param: str) -> None:
    """Refuse what has no room in a context without tokenizing it, which takes a while."""
    if characters > context * int(tokenizer.token_bytes.max()):
        raise too_long(f"{characters} characters", context, param)


def too_long(found: str, context: int, param: str) -> ApiError:
    return ApiError(
        400,
        f"{param} has {found}, and this model's context is {context} tokens, the answer's included: shorten it",
        code="context_length_exceeded",
        param=param,
    )


def to_messages(request: ChatRequest) -> list[Message]:
    """OpenAI's messages as `render_chat` reads them; tools are told in the first one."""
    messages = [to_message(message) for message in request.messages]
    if request.tools and request.tool_choice != "none":
        if messages[0]["role"] == "assistant":
            messages.insert(0, {"role": "system", "content": ""})
        messages[0]["tools"] = [tool.model_dump(exclude_none=True) for tool in request.tools]
    return messages


def to_message(message: ChatMessage) -> Message:
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    found: Message = {"role": "system" if message.role == "developer" else message.role, "content": content}
    if message.reasoning_content:
        found["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        found["tool_calls"] = [call.function.model_dump() for call in message.tool_calls]
    return found
