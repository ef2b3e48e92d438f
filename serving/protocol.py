"""Requests and answers of the OpenAI API, as far as there is something to them here.

    POST /v1/chat/completions   {"model": "full_sft_512", "messages": [{"role": "user", "content": "Hi"}]}
    POST /v1/completions        {"model": "pretrain_512", "prompt": "Once upon a time"}

A field that this server does not know, or a value that it could not act on, is refused with its name: an answer that
was not asked for in that way would be worse. `user`, `metadata` and `store` are taken and have no effect.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Zero = Annotated[float, Field(ge=0, le=0)]


class Strict(BaseModel):
    """Types as JSON has them, no conversions, no further fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


# What is asked ----------------------------------------------------------------------------------------------------


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="No effect.")


class ResponseFormat(Strict):
    type: Literal["text"]


class Request(Strict):
    """What both kinds of completion take. null is as if a field were not there."""

    model: str = Field(description="An id of /v1/models.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=16, description="Answers to each prompt [1].")
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the likeliest token [1].")
    top_p: float | None = Field(None, ge=0, le=1, description="Of the likeliest tokens that make up this share [1].")
    top_k: int | None = Field(None, ge=0, description="Of the k likeliest tokens, 0: of all [0].")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="1: none [1].")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The same answer for the same seed.")
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, description="An answer ends before the first of these; at most 4 of at most 256 characters."
    )
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    user: str | None = Field(None, description="No effect.")
    metadata: dict[str, str] | None = Field(None, description="No effect.")
    store: bool | None = Field(None, description="No effect.")


class TextPart(Strict):
    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    name: str
    arguments: str = Field(description="A JSON object as text.")


class ToolCall(Strict):
    id: str | None = None
    index: int | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = Field(None, description="No effect.")
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = Field(None, description="No effect: results are read in the order of the calls.")


class Function(Strict):
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="No effect.")


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ChatRequest(Request):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="As max_tokens, which it is preferred to.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = Field(None, description="none: the model is not told of the tools.")
    parallel_tool_calls: Literal[True] | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(Request):
    prompt: str | list[str] | list[int] | list[list[int]] = Field(description="Texts, or token ids.")
    max_tokens: int | None = Field(None, ge=1, description="[16]")
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None


# What is answered -------------------------------------------------------------------------------------------------


class CachedTokens(BaseModel):
    cached_tokens: int = Field(description="Of the prompt's, those that were in the cache.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprobs]


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "seedling"
    context: int = Field(description="Most tokens of a prompt and its answer.")
    parameters: int
    chat: bool = Field(description="Whether it answers messages; else it continues texts.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"]
