"""The server's routes: what OpenAI's clients ask, the page to chat, health and metrics.

    app = create_app([Served("full_sft_512", model, tokenizer, chat=True)], api_key=None)
    uvicorn.run(app, host="127.0.0.1", port=8000)

The event loop reads and writes; prompts are rendered in threads of its pool, and the engine's thread computes.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from serving.asking import chat_jobs, completion_jobs
from serving.desk import Desk
from serving.engine import Engine, Job, Served
from serving.errors import ApiError, ErrorBody
from serving.guard import Guard, Limits
from serving.metrics import Metrics
from serving.page import page_router
from serving.protocol import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Health,
    ModelCard,
    ModelList,
)
from serving.protocol import Request as Asked
from serving.telling import ChatTeller, CompletionTeller, EventStream, whole_answer

A = TypeVar("A", bound=Asked)
EVENT = {"type": "object", "properties": {"data": {"type": "string", "description": "JSON, or [DONE]"}}}  # each of them
STREAM: dict[str, Any] = {"text/event-stream": {"schema": EVENT}}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


def create_app(
    models: Sequence[Served],
    *,
    api_key: str | None = None,
    slots: int = 16,
    context: int | None = None,
    max_waiting: int = 64,
    limits: Limits | None = None,
    stop_seconds: float = 30.0,
) -> FastAPI:
    """context: most tokens of a prompt and its answer; None: each model's own. max_waiting: answers that may wait for a
    slot. stop_seconds: what runs when the server stops may take so long."""
    limits, metrics = limits or Limits(), Metrics()
    engine = Engine(models, slots, context, max_waiting, metrics)
    desk = Desk(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        desk.start()
        yield
        await run_in_threadpool(engine.stop, stop_seconds)

    app = FastAPI(title="Seedling", lifespan=lifespan, docs_url=None, redoc_url=None, responses=ERRORS)
    app.state.engine = engine
    app.add_middleware(Guard, api_key=api_key, limits=limits, metrics=metrics)  # type: ignore[arg-type]
    tell_errors(app)
    add_answers(app, desk, limits)
    add_facts(app, engine, metrics)
    app.include_router(page_router())
    return app


def add_answers(app: FastAPI, desk: Desk, limits: Limits) -> None:
    """The routes that generate."""

    async def answer(
        asked: A, make: Callable[[Served, int, A, float], list[Job]], teller: type[ChatTeller], request: Request
    ) -> Response:
        batch = desk.engine.batches.get(asked.model)
        if batch is None:
            raise no_model(asked.model, list(desk.engine.batches))
        jobs = await run_in_threadpool(make, batch.served, batch.context, asked, time.monotonic() + limits.seconds)
        ticket, told = desk.submit(asked.model, jobs), teller(batch.served, jobs, asked.n or 1)
        if asked.stream:
            return EventStream(ticket, told, bool(asked.stream_options and asked.stream_options.include_usage))
        return await whole_answer(ticket, told, request.receive)

    @app.post("/v1/chat/completions", responses={200: {"model": ChatCompletion, "content": STREAM}})
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        """The answer to a conversation."""
        return await answer(asked, chat_jobs, ChatTeller, request)

    @app.post("/v1/completions", responses={200: {"model": Completion, "content": STREAM}})
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """How texts go on."""
        return await answer(asked, completion_jobs, CompletionTeller, request)


def add_facts(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    """The routes that say what there is."""

    def card(name: str) -> ModelCard:
        batch = engine.batches[name]
        served = batch.served
        return ModelCard(
            id=name, created=served.created, context=batch.context, parameters=served.model.num_parameters(),
            chat=served.chat,
        )  # fmt: skip

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The models that are served."""
        return ModelList(data=[card(name) for name in engine.batches])

    @app.get("/v1/models/{name}")
    async def model(name: str) -> ModelCard:
        """One of them."""
        if name not in engine.batches:
            raise no_model(name, list(engine.batches))
        return card(name)

    @app.get("/health")
    async def health() -> Health:
        """Whether answers can be given: status 200, or 503."""
        if not engine.alive:
            raise ApiError(503, "the engine is not running")
        return Health(status="ok")

    @app.get("/metrics", include_in_schema=False)
    def metrics_text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def no_model(name: str, there: Sequence[str]) -> ApiError:
    return ApiError(
        404, f"there is no model {name[:80]!r}; there is {', '.join(there)}", code="model_not_found", param="model"
    )


def tell_errors(app: FastAPI) -> None:
    """All errors in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def ours(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return ApiError(400, f"{place or 'body'}: {first['msg']}", param=place or None).response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return ApiError(500, f"the server failed: {type(error).__name__}").response()
