"""What OpenAI's own client gets from a real server, and what becomes of clients that do not behave."""

import asyncio
import json
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import hypothesis
import openai
import pytest
import schemathesis
import torch
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from dataset import load_tokenizer, render_chat
from model import generate, load_pretrained
from tests.memorised import make_memorised
from tests.serving.served import Server, make_talker, serving

GREEDY: dict[str, Any] = {"model": "memorised", "temperature": 0}
WHO, ADD, ROME = "Who are you?", "Add 2 and 3", "Weather in Rome?"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("models")
    return {"memorised": make_memorised(base / "memorised"), "talker": make_talker(base / "talker")}


@pytest.fixture(scope="module")
def server(folders) -> Iterator[Server]:
    with serving("--model", *folders.values(), "--slots", 8, "--max_waiting", 500, "--threads", 1) as found:
        yield found


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}v1", api_key="none", max_retries=0)


@pytest.fixture
def calm(server) -> Iterator[Server]:
    """After the test no slot is taken."""
    yield server
    assert server.process.poll() is None and server.idle()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def ask(client: openai.OpenAI, text: str, **settings: Any) -> Any:
    return client.chat.completions.create(messages=[user(text)], **(GREEDY | settings))  # type: ignore[arg-type]


# What is answered -------------------------------------------------------------------------------------------------


def test_models_are_listed(client, folders):
    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == ["memorised", "talker"]
    model = load_pretrained(folders["memorised"])
    extra = cards["memorised"].model_extra
    assert extra == {"context": 96, "parameters": model.num_parameters(), "chat": True}
    assert client.models.retrieve("talker").owned_by == "seedling"


def test_an_answer_is_what_generate_writes(client, folders):
    model, tokenizer = load_pretrained(folders["memorised"]), load_tokenizer(folders["memorised"])
    prompt = render_chat(tokenizer, [user("Once")], add_generation_prompt=True).ids
    for settings in (
        {"temperature": 0},
        {"temperature": 1.5, "seed": 7},
        {"temperature": 1.2, "top_p": 0.5, "seed": 1},
    ):
        how = {"max_new_tokens": 30, "stop_ids": tokenizer.stop_ids, "vocab_size": tokenizer.vocab_size} | settings
        expected = generate(model, [prompt], **how)[0]
        answer = ask(client, "Once", max_tokens=30, **settings)
        assert answer.choices[0].message.content == tokenizer.decode(expected.ids, skip_control=False)
        assert answer.choices[0].finish_reason == expected.finish_reason
        stopped = expected.finish_reason == "stop"
        assert answer.usage.completion_tokens == len(expected.ids) + stopped
        assert answer.usage.prompt_tokens == len(prompt)


def test_thoughts_calls_and_text_are_told_apart(client):
    thought = ask(client, ADD).choices[0].message
    assert (thought.content, thought.reasoning_content) == ("5", "2+3")
    called = ask(client, ROME).choices[0]
    assert called.finish_reason == "tool_calls" and called.message.content == "Let me look. "
    (call,) = called.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Rome"}


def test_a_conversation_goes_on_where_it_was(client):
    first = ask(client, ADD)
    message = first.choices[0].message
    turns = [user(ADD), message.model_dump(exclude_none=True), user("Add 1")]
    second = client.chat.completions.create(messages=turns, **GREEDY)
    assert second.choices[0].message.content == "6"
    before = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert second.usage.prompt_tokens_details.cached_tokens == before


def test_a_tool_turn_is_read(client):
    call = ask(client, ROME, tools=[TOOL]).choices[0].message
    again = [user(ROME), {"role": "assistant", "content": "Let me look. ", "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}]  # fmt: skip
    answer = client.chat.completions.create(messages=again, tools=[TOOL], max_tokens=5, **GREEDY)
    assert answer.usage.prompt_tokens > 40 and call.content is not None
    silent = client.chat.completions.create(messages=again, tools=[TOOL], tool_choice="none", max_tokens=5, **GREEDY)
    assert silent.usage.prompt_tokens < answer.usage.prompt_tokens  # the model was not told of the tool


@pytest.mark.parametrize("question", [WHO, ADD, ROME])
def test_a_stream_is_the_answer_in_pieces(client, question):
    whole = ask(client, question)
    chunks = list(ask(client, question, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens and not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert choices[0].delta.role == "assistant" and len(choices) > 3
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == [whole.choices[0].finish_reason]
    message = whole.choices[0].message
    assert "".join(choice.delta.content or "" for choice in choices) == message.content
    thoughts = [getattr(choice.delta, "reasoning_content", None) or "" for choice in choices]
    assert "".join(thoughts) == (getattr(message, "reasoning_content", None) or "")
    calls = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert [(call.index, call.function.arguments) for call in calls] == [
        (number, call.function.arguments) for number, call in enumerate(message.tool_calls or [])
    ]


def test_stop_strings_end_an_answer_also_across_tokens(client):
    whole = ask(client, WHO).choices[0].message.content
    assert whole == "I am a seed. 🌱"
    for stop in ("a se", ["never", "seed"], " 🌱", "I"):
        first = stop if isinstance(stop, str) else stop[-1]
        answer = ask(client, WHO, stop=stop)
        assert answer.choices[0].message.content == whole[: whole.index(first)]
        assert answer.choices[0].finish_reason == "stop"
        chunks = ask(client, WHO, stop=stop, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: whole.index(first)]


def test_an_answer_ends_with_the_tokens_it_may_have_or_the_context(client):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = ask(client, WHO, **{name: 3})
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 3
    full = client.completions.create(model="talker", prompt=[9] * 2040, max_tokens=100)
    assert full.choices[0].finish_reason == "length" and full.usage.total_tokens == 2048


def test_logprobs_are_the_networks(client, folders):
    model, tokenizer = load_pretrained(folders["memorised"]), load_tokenizer(folders["memorised"])
    prompt = render_chat(tokenizer, [user(WHO)], add_generation_prompt=True).ids
    how = {"temperature": 1.7, "seed": 0}
    ids = generate(model, [prompt], max_new_tokens=20, stop_ids=tokenizer.stop_ids, vocab_size=6400, **how)[0].ids
    with torch.no_grad():
        logps = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    told = ask(client, WHO, logprobs=True, top_logprobs=3, max_tokens=20, **how).choices[0].logprobs.content
    assert [each.token for each in told] == [tokenizer.token_text(token) for token in ids] and len(ids) > 3
    top = logps.topk(3)
    for place, (each, token) in enumerate(zip(told, ids, strict=True)):
        assert each.logprob == pytest.approx(float(logps[place, token]), abs=1e-4)
        found = [other.logprob for other in each.top_logprobs]
        assert found == pytest.approx(top.values[place].tolist(), abs=1e-4)
        assert each.top_logprobs[0].token == tokenizer.token_text(int(top.indices[place, 0]))
    chunks = ask(client, WHO, logprobs=True, top_logprobs=3, max_tokens=20, stream=True, **how)
    streamed = [each for chunk in chunks if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content]
    assert streamed == told


def test_texts_are_continued_in_their_order(client, folders):
    model, tokenizer = load_pretrained(folders["memorised"]), load_tokenizer(folders["memorised"])
    ids = [[1, *tokenizer.encode(text)] for text in ("One", "Two, three")]
    expected = generate(model, ids, max_new_tokens=9, seed=3, stop_ids=tokenizer.stop_ids, vocab_size=6400)
    for prompt in (ids, ["One", "Two, three"]):
        answer = client.completions.create(model="memorised", prompt=prompt, max_tokens=9, seed=3, logprobs=2)
        assert [choice.text for choice in answer.choices] == [tokenizer.decode(each.ids) for each in expected]
        assert all(
            len(choice.logprobs.tokens) == len(each.ids) for choice, each in zip(answer.choices, expected, strict=True)
        )
    chunks = client.completions.create(model="memorised", prompt=ids[0], max_tokens=9, seed=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == tokenizer.decode(expected[0].ids)


def test_several_answers_to_one_prompt_differ_and_read_it_once(client):
    answer = ask(client, "Tell me", n=3, temperature=1.9, seed=5, max_tokens=12)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    again = ask(client, "Tell me", n=3, temperature=1.9, seed=5, max_tokens=12)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]
    chunks = list(ask(client, "Tell me", n=3, temperature=1.9, seed=5, max_tokens=12, stream=True))
    for number, choice in enumerate(answer.choices):
        mine = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices[0].index == number]
        assert "".join(mine) == choice.message.content


# What is refused --------------------------------------------------------------------------------------------------

CHAT, TEXT = "v1/chat/completions", "v1/completions"
GOOD = {"model": "memorised", "messages": [user(WHO)]}
REFUSED: list[tuple[str, bytes | dict[str, Any], int, str | None]] = [
    (CHAT, b"{", 400, None),
    (CHAT, b"[" * 100_000, 400, None),
    (CHAT, b"\xff\xfe", 400, None),
    (CHAT, b"", 400, None),
    (CHAT, b"[]", 400, None),
    (CHAT, {}, 400, "model"),
    (CHAT, GOOD | {"model": "gpt-9"}, 404, "model"),
    (CHAT, GOOD | {"messages": []}, 400, "messages"),
    (CHAT, GOOD | {"messages": "Hi"}, 400, "messages"),
    (CHAT, GOOD | {"messages": [user("\ud800")]}, 400, "messages"),
    (CHAT, GOOD | {"messages": [{"role": "robot", "content": "Hi"}]}, 400, "messages.0.role"),
    (CHAT, GOOD | {"messages": [{"role": "user"}]}, 400, "messages"),
    (CHAT, GOOD | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None),
    (CHAT, GOOD | {"messages": [{"role": "user", "content": "a", "reasoning_content": "b"}]}, 400, "messages"),
    (CHAT, GOOD | {"messages": [user("long " * 200)]}, 400, "messages"),
    (CHAT, GOOD | {"messages": [user("long " * 100_000)]}, 400, "messages"),
    (CHAT, GOOD | {"messages": [user("x" * 2_000_000)]}, 413, None),
    (CHAT, GOOD | {"temperature": float("nan")}, 400, "temperature"),
    (CHAT, GOOD | {"temperature": "hot"}, 400, "temperature"),
    (CHAT, GOOD | {"temperature": -1}, 400, "temperature"),
    (CHAT, GOOD | {"top_p": 1.5}, 400, "top_p"),
    (CHAT, GOOD | {"max_tokens": 0}, 400, "max_tokens"),
    (CHAT, GOOD | {"max_tokens": 2.5}, 400, "max_tokens"),
    (CHAT, GOOD | {"n": 17}, 400, "n"),
    (CHAT, GOOD | {"stop": ["a"] * 5}, 400, "stop"),
    (CHAT, GOOD | {"stop": ""}, 400, None),
    (CHAT, GOOD | {"seed": 2**70}, 400, "seed"),
    (CHAT, GOOD | {"top_logprobs": 3}, 400, "top_logprobs"),
    (CHAT, GOOD | {"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    (CHAT, GOOD | {"tempratur": 1}, 400, "tempratur"),
    (CHAT, GOOD | {"tool_choice": "required"}, 400, "tool_choice"),
    (TEXT, {"model": "memorised"}, 400, "prompt"),
    (TEXT, {"model": "memorised", "prompt": []}, 400, "prompt"),
    (TEXT, {"model": "memorised", "prompt": [[]]}, 400, "prompt"),
    (TEXT, {"model": "memorised", "prompt": [6400]}, 400, "prompt"),
    (TEXT, {"model": "memorised", "prompt": [5] * 96}, 400, "prompt"),
    (TEXT, {"model": "memorised", "prompt": ["a"] * 65}, 400, "n"),
    (TEXT, {"model": "memorised", "prompt": [1, "a"]}, 400, None),
    ("v1/nothing", {}, 404, None),
    ("v1/models", {}, 405, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_answered_is_refused_in_openais_form(server, path, body, status, param):
    found, answer = server.post(path, body)
    error = answer["error"]
    assert (found, set(error)) == (status, {"message", "type", "param", "code"}) and error["message"]
    assert param is None or error["param"] == param


def test_a_prompt_over_the_context_has_openais_code(client):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "long " * 200)
    assert error.value.code == "context_length_exceeded" and "96 tokens" in str(error.value)
    with pytest.raises(openai.NotFoundError, match="there is memorised, talker"):
        ask(client, WHO, model="gpt-9")


# Many at once -----------------------------------------------------------------------------------------------------


def test_answers_are_the_same_alone_and_in_a_crowd_whatever_others_do(calm, client):
    """200 requests: greedy ones to be compared, others that sample, go away in the middle, or read slowly."""
    rng = random.Random(0)
    words = ("Who", "Add", "2", "Rome", "是谁", "you")
    questions = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(25)]
    alone = {question: ask(client, question, max_tokens=20).choices[0].message for question in questions}
    asked = openai.AsyncOpenAI(base_url=str(client.base_url), api_key="none", max_retries=0, timeout=300)

    async def compare(question: str) -> bool:
        answer = await asked.chat.completions.create(messages=[user(question)], max_tokens=20, **GREEDY)
        return answer.choices[0].message == alone[question]

    async def leave(seed: int) -> bool:
        chunks = await asked.completions.create(model="talker", prompt="So", max_tokens=1500, stream=True, seed=seed)
        async for _ in chunks:
            if rng.random() < 0.2:
                break
        await chunks.close()
        return True

    async def read_slowly(seed: int) -> bool:
        chunks = await asked.completions.create(model="talker", prompt="So", max_tokens=40, stream=True, seed=seed)
        return len([await asyncio.sleep(0.02) async for _ in chunks]) >= 2

    async def all_of_them() -> list[bool]:
        made = [compare(rng.choice(questions)) for _ in range(130)]
        made += [leave(seed) for seed in range(50)] + [read_slowly(seed) for seed in range(20)]
        rng.shuffle(made)
        return await asyncio.gather(*made)

    assert all(asyncio.run(all_of_them()))


def test_a_client_that_is_killed_gives_its_slot_back(calm):
    program = f"""
import openai, sys
client = openai.OpenAI(base_url="{calm.url}v1", api_key="none")
for chunk in client.completions.create(model="talker", prompt="So", max_tokens=2000, stream=True, n=2):
    print(chunk.choices[0].text, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline()
    assert calm.metric("seedling_active_slots", model="talker") == 2
    process.kill()
    process.communicate()
    before = calm.metric("seedling_tokens_total", model="talker", kind="generated")
    assert calm.idle(10) and calm.metric("seedling_tokens_total", model="talker", kind="generated") < before + 3000


def test_who_asks_and_does_not_wait_gives_the_slot_back_too(calm):
    """Neither a whole answer that nobody waits for, nor half a request, holds anything."""
    body = json.dumps({"model": "talker", "prompt": "So", "max_tokens": 2000}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for sent in (body, body[:20]):
        with socket.create_connection(calm.address) as connection:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + sent)
            if sent == body:
                while not calm.metric("seedling_active_slots", model="talker"):
                    pass
    assert calm.idle(10)


def test_metrics_count(server, client):
    before = server.metric("seedling_requests_total", path="/v1/chat/completions", status="200")
    tokens = server.metric("seedling_tokens_total", kind="generated", model="memorised")
    answer = ask(client, WHO)
    assert server.metric("seedling_requests_total", path="/v1/chat/completions", status="200") == before + 1
    found = server.metric("seedling_tokens_total", kind="generated", model="memorised")
    assert found == tokens + answer.usage.completion_tokens
    assert server.metric("seedling_time_to_first_token_seconds_count") > 0
    assert server.metric("seedling_step_seconds_count") > 0


# The schema -------------------------------------------------------------------------------------------------------

GET, POST = ["/v1/models", "/v1/models/{name}", "/health"], ["/v1/chat/completions", "/v1/completions"]
ASKED = [*product(POST, GenerationMode), *product(GET, [GenerationMode.POSITIVE])]
CHECKS = [
    not_a_server_error, content_type_conformance, negative_data_rejection, response_schema_conformance,
    status_code_conformance, unsupported_method,
]  # fmt: skip


@pytest.mark.parametrize(("path", "mode"), ASKED, ids=str)
def test_the_schema_is_true(calm, path, mode):
    """What it allows is answered in the form it says, and what it forbids is refused."""
    operation = schemathesis.openapi.from_url(f"{calm.url}openapi.json")[path]["POST" if path in POST else "GET"]

    @hypothesis.settings(
        max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def every(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "memorised"  # of a name made up, no more is ever told than that there is none
        case.call_and_validate(checks=CHECKS)

    every()
