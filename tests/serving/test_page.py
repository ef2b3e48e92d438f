"""The page to chat, in a real browser (Chromium, driven by Playwright), talking to a real server process."""

import html.parser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import DEFAULT_TOKENIZER, load_tokenizer
from model import GPT, GPTConfig, save_pretrained
from serving.page.markdown import to_html
from tests.helpers import ROOT, environment, free_port
from tests.memorised import CONVERSATIONS, assistant, make_memorised, user

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEY = "a key"
ATTACK = '<script>hacked=1</script><img src=x onerror="hacked=2">[a](javascript:hacked=3)![b](http://x.y/z)'
TEXTS = ["Who are you?", "I am a seed. 🌱"]


# Markdown, without a browser ------------------------------------------------------------------------------------

TAGS = "p br h1 h2 h3 h4 h5 h6 strong em s a code pre span ul ol li blockquote hr table thead tbody tr th td"
CLASS = {"class"}
ATTRIBUTES = {
    "a": {"href", "title", "target", "rel"},
    "ol": {"start"},
    "span": CLASS,
    "code": CLASS,
    "th": CLASS,
    "td": CLASS,
}
MARKS = """
<script> </script> ![ [ ]( ) javascript: JaVaScRiPt: data:text/html, http://a.b/ &#106;avascript: ` ```
```python ```" ~~ ** _ # > - 1. | |- :-: \\ & < " ' ] text é 汉 \ud800 []: mailto: <//a.b> https:
"""
PIECES = [*MARKS.split(), " ", "\n", "\n\n", "\t", "\u00a0", "<img src=x onerror=x>"]


class Reader(html.parser.HTMLParser):
    """What a browser would find: tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def assert_safe(text: str) -> None:
    for tag, attributes in Reader(text).found:
        assert tag in TAGS.split() and set(attributes) <= ATTRIBUTES.get(tag, set()), (tag, attributes)
        assert re.match(r"https?://|mailto:", attributes.get("href") or "http://", re.I), attributes


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_whatever_a_model_writes_becomes_known_tags_and_safe_links(text: str) -> None:
    assert_safe(to_html(text))


def test_markdown_is_rendered() -> None:
    assert to_html("**Hi** <b>x</b>") == "<p><strong>Hi</strong> &lt;b&gt;x&lt;/b&gt;</p>\n"
    assert to_html("[a](javascript:b)") == "<p>[a](javascript:b)</p>\n"
    assert "<a" not in to_html("[a](/b) [c](//d.e) [f](data:image/png;base64,x) [g](ftp://h) [i](javascript&#58;j)")
    link = '<a href="http://c" target="_blank" rel="noopener noreferrer nofollow">cat</a>'
    assert to_html("![cat](http://c)") == f"<p>{link}</p>\n"
    assert '<th class="right">b</th>' in to_html("|a|b|\n|-|-:|\n|1|2|")
    assert '<span class="mi">1</span>' in to_html("```python\nx = 1\n```")
    assert to_html("```nope\n<b>\n```") == '<pre><code class="language-nope">&lt;b&gt;\n</code></pre>\n'
    assert to_html("half a pair \ud800") == "<p>half a pair ?</p>\n"


# The server and the browser -------------------------------------------------------------------------------------


def make_endless(folder: Path) -> Path:
    """A model that never stops by itself: its end tokens are the least likely of all."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(DEFAULT_TOKENIZER)
    model = GPT(GPTConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=8192)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.embed_tokens.weight[list(tokenizer.stop_ids), 0] = -100.0
        model.model.norm.weight.fill_(0.0)
        model.model.norm.weight[0] = 1.0
    save_pretrained(model, folder)
    tokenizer.save(folder)
    return folder


@dataclass
class Server:
    """A real `scripts/serve.py`, which can be killed and started again at the same address."""

    models: list[str]
    port: int
    key: str | None = KEY
    process: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> httpx.Response:
        flags = ["--model", *self.models, "--port", str(self.port), *(["--api_key", self.key] if self.key else [])]
        command = [sys.executable, str(ROOT / "scripts/serve.py"), *flags]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        assert any(line.startswith("listening") for line in self.process.stdout), "the server ended"
        for _ in range(100):
            with suppress(httpx.TransportError):
                return httpx.get(self.url + "health").raise_for_status()
            time.sleep(0.1)
        raise AssertionError("the server does not answer")

    def stop(self, how: int = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not BROWSER:
        pytest.skip("no chromium; SEEDLING_BROWSER=1 bash scripts/test.sh installs it")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def server(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("page")
    attack = [user("Attack"), assistant(ATTACK)]
    seed = make_memorised(base / "seed", [*CONVERSATIONS, attack], max_seq_len=256)
    server = Server([str(seed), str(make_endless(base / "endless"))], free_port())
    server.start()
    yield server
    server.stop()


class Page:
    """One browser window of its own, with what a user does in it. `expected` are parts of errors that may be logged."""

    def __init__(self, browser: Any, url: str, key: str | None = KEY, **options: Any) -> None:
        self.context = browser.new_context(base_url=url, reduced_motion="reduce", **({"locale": "en-US"} | options))
        self.context.set_default_timeout(15_000)
        if key:
            self.context.add_init_script(f"sessionStorage.setItem('seedling.key', {key!r})")
            self.context.add_init_script("localStorage['seedling.settings'] ??= '{\"temperature\": 0}'")
        self.url, self.errors, self.asked, self.expected = url, [], [], ()
        self.tab = self.open()

    def open(self, path: str = "/") -> Any:
        tab = self.context.new_page()
        tab.on("console", lambda said: self.errors.append(said.text) if said.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: self.errors.append(str(error)))
        tab.on("request", lambda request: self.asked.append(request))
        tab.goto(path)
        return tab

    def ready(self) -> "Page":
        self.tab.wait_for_selector("#models select")
        return self

    def settings(self, **values: Any) -> None:
        self.tab.click("#settings-open")
        for name, value in values.items():
            self.tab.fill(f"[name={name}]", str(value))
        self.tab.keyboard.press("Escape")

    def type(self, text: str) -> None:
        self.tab.fill("#message", text)
        self.tab.press("#message", "Enter")

    def answered(self) -> None:
        self.tab.wait_for_selector("#send:visible")
        self.tab.wait_for_selector(".tail:not(:empty)", state="detached")  # all is rendered

    def say(self, text: str) -> None:
        self.type(text)
        self.answered()

    def streams(self) -> None:
        """Until there are some tokens of an answer that goes on."""
        self.tab.locator(".running .stats", has_text=re.compile(r"^\d\d+ tokens")).wait_for()

    def texts(self) -> list[str]:
        """Messages and answers, from the first to the last."""
        return [text.strip() for text in self.tab.locator(".user p, .answer .markdown").all_inner_texts()]

    def request(self) -> dict[str, Any]:
        """The last one for an answer."""
        return [request for request in self.asked if request.url.endswith("completions")][-1].post_data_json

    def close(self) -> None:
        self.context.close()
        unexpected = [error for error in self.errors if not any(part in error for part in self.expected)]
        assert unexpected == [], "\n".join(unexpected)
        assert {request.url for request in self.asked if not request.url.startswith(self.url)} == set()


@pytest.fixture
def window(browser: Any, server: Server) -> Iterator[Callable[..., Page]]:
    """window(**what the browser is like) -> Page. Nothing unexpected may have been logged, no other host asked."""
    pages: list[Page] = []

    def make(**options: Any) -> Page:
        pages.append(Page(browser, server.url, **options))
        return pages[-1]

    yield make
    for page in pages:
        page.close()


@pytest.fixture
def page(window: Callable[..., Page]) -> Page:
    return window().ready()


# Talking --------------------------------------------------------------------------------------------------------


def test_a_conversation_says_what_the_api_says_and_is_kept(page: Page, server: Server) -> None:
    page.settings(system=" ", top_p=0.5, max_tokens=40, seed=7)
    page.say("Add 2 and 3")
    page.say("Add 1")
    sampling = {"temperature": 0, "top_p": 0.5, "max_tokens": 40, "seed": 7}
    said = [user("Add 2 and 3"), assistant("5", reasoning_content="2+3"), user("Add 1")]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    assert page.request() == {"model": "seed", "messages": said, **sampling, **options}
    answer = httpx.post(
        server.url + "v1/chat/completions",
        json={"model": "seed", "messages": said, **sampling},
        headers={"Authorization": f"Bearer {KEY}"},
    ).json()
    assert page.texts() == ["Add 2 and 3", "5", "Add 1", answer["choices"][0]["message"]["content"]]
    assert page.tab.locator(".stats").last.inner_text().startswith(f"{answer['usage']['completion_tokens']} tokens")

    thinking = page.tab.locator("details:visible")
    assert thinking.count() == 1 and not page.tab.locator(".thoughts").first.is_visible()
    thinking.locator("summary").click()
    assert page.tab.locator(".thoughts").first.inner_text() == "2+3"

    page.tab.reload()
    page.tab.wait_for_selector(".markdown p")
    assert page.texts() == ["Add 2 and 3", "5", "Add 1", "6"]
    assert page.tab.title() == "Add 2 and 3"
    page.tab.click("#new")
    page.say("Who are you?")
    assert page.tab.locator(".conversation").all_inner_texts() == ["Who are you?", "Add 2 and 3"]
    page.tab.click("text=Add 2 and 3")
    assert page.texts() == ["Add 2 and 3", "5", "Add 1", "6"]
    page.tab.click("#settings-open")
    page.tab.check("[name=alone]")
    page.tab.keyboard.press("Escape")
    page.say(TEXTS[0])
    assert page.request()["messages"] == [user(TEXTS[0])] and page.texts()[-2:] == TEXTS


def test_a_tool_call_is_shown_and_sent_back(page: Page) -> None:
    page.say("Weather in Rome?")
    assert page.texts()[-1] == "Let me look."
    assert page.tab.locator(".call figcaption").inner_text() == "Calls weather"
    assert json.loads(page.tab.locator(".call pre").inner_text()) == {"city": "Rome"}
    page.say("Who are you?")
    (call,) = page.request()["messages"][1]["tool_calls"]
    assert call["function"]["name"] == "weather" and page.texts()[-1]


def test_stop_again_and_edit(page: Page) -> None:
    page.tab.select_option("#models select", "endless")
    page.settings(max_tokens=8000)
    page.expected = ("status of 400",)  # the browser's own line, where a conversation does not fit in the context
    page.type("Go on")
    page.streams()
    page.tab.click(".edit")
    page.tab.fill(".editor textarea", "half written")
    page.tab.click("#stop")
    page.answered()
    assert page.tab.input_value(".editor textarea") == "half written"
    page.tab.click("text=Cancel")
    stopped = page.texts()[-1]
    assert stopped and "stopped" in page.tab.locator(".stats").inner_text()

    page.tab.select_option("#models select", "seed")
    page.tab.click(".again")
    page.answered()
    assert page.texts()[0] == "Go on" and page.texts()[1] != stopped

    page.say("Add 1")
    page.tab.locator(".edit").first.click()
    page.tab.fill(".editor textarea", "not this")
    page.tab.click("text=Cancel")
    assert page.texts()[0] == "Go on" and len(page.texts()) == 4
    page.tab.locator(".edit").first.click()
    page.tab.fill(".editor textarea", TEXTS[0])
    page.tab.press(".editor textarea", "Enter")
    page.answered()
    assert page.texts() == TEXTS


def test_two_models_side_by_side_and_one_is_stopped(page: Page) -> None:
    page.tab.click("#compare")
    page.settings(max_tokens=8000)
    page.type(TEXTS[0])
    page.tab.wait_for_selector(".answer:not(.running)")
    page.tab.keyboard.press("Escape")
    page.answered()
    assert page.tab.locator(".answer > h2").all_inner_texts() == ["seed", "endless"]
    assert page.texts()[:2] == TEXTS and page.texts()[2]
    first, second = page.tab.locator(".stats").all_inner_texts()
    assert "stopped" not in first and "stopped" in second
    boxes = [answer.bounding_box() for answer in page.tab.locator(".answer").all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    page.tab.set_viewport_size({"width": 390, "height": 800})
    boxes = [answer.bounding_box() for answer in page.tab.locator(".answer").all()]
    assert boxes[0]["x"] == boxes[1]["x"] and boxes[0]["y"] + boxes[0]["height"] < boxes[1]["y"]


def stored(turns: list[tuple[str, str]], models: tuple[str, ...] = ("seed",), **more: Any) -> dict[str, Any]:
    """A conversation as the page keeps it."""
    answer = {"reasoning": "", "calls": [], "state": "done", "tokens": 3, "seconds": 1, "first": 0.1, "leftOut": 0}
    settings = {"system": "", "temperature": 0, "top_p": 1, "max_tokens": 64, "seed": None}
    said = [
        {"user": asked, "answers": [answer | {"model": model, "content": told} | more for model in models]}
        for asked, told in turns
    ]
    return {"id": "1", "updated": 1, "models": list(models), "settings": settings, "turns": said}


def restore(page: Page, conversation: dict[str, Any]) -> None:
    """Open it as if the browser had kept it."""
    page.tab.evaluate("text => localStorage.setItem('seedling.conversation.1', text)", json.dumps(conversation))
    page.tab.goto("/#1")
    page.tab.reload()
    page.tab.wait_for_selector(".markdown > :not(.tail)")
    page.answered()


def test_a_full_context_leaves_out_the_oldest_and_says_so(page: Page) -> None:
    restore(page, stored([("one " * 120, "two " * 120), ("Add 2 and 3", "5")], reasoning="2+3"))
    page.say("Add 1")
    assert page.texts()[-1] == "6"
    assert "no longer sees the first exchange" in page.tab.locator(".note:visible").inner_text()
    assert page.request()["messages"] == [user("Add 2 and 3"), assistant("5", reasoning_content="2+3"), user("Add 1")]
    page.say("one " * 300)
    assert "context is 256 tokens" in page.tab.locator(".problem:visible").inner_text()
    page.expected = ("status of 400",)


# What must not happen -------------------------------------------------------------------------------------------


def test_nothing_that_a_model_or_a_user_writes_runs(page: Page) -> None:
    page.say("Attack")
    assert page.texts()[1] == '<script>hacked=1</script><img src=x onerror="hacked=2">[a](javascript:hacked=3)b'
    page.say(ATTACK)
    assert page.texts()[2] == ATTACK
    page.tab.locator(".conversation").first.hover()
    inside = page.tab.locator("#log")
    assert inside.locator("script, style, iframe, .answer img, [onerror]").count() == 0
    assert [a.get_attribute("href") for a in inside.locator("a").all()][:1] == ["http://x.y/z"]
    assert page.tab.evaluate("typeof hacked") == "undefined"


def test_a_mistake_of_the_page_would_be_stopped_by_its_policy(page: Page) -> None:
    headers = httpx.get(page.url).headers
    policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    policy += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    assert headers["Content-Security-Policy"].startswith(policy)
    assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
    elsewhere = page.url.replace("127.0.0.1", "localhost") + "page/icon.svg"  # it is there, under another name
    refused = page.tab.evaluate(
        """async (url) => {
        const attempts = [
            () => (document.body.innerHTML = "<b>x</b>"),
            () => document.body.append(Object.assign(document.createElement("script"), {text: "hacked = 1"})),
            () => document.body.setAttribute("onclick", "hacked = 2"),
            () => fetch(url, {mode: "no-cors"}),
            () => new Promise((onload, onerror) => Object.assign(new Image(), {onload, onerror, src: url})),
        ];
        return Promise.all(attempts.map((attempt) => Promise.resolve().then(attempt).then(() => false, () => true)));
    }""",
        elsewhere,
    )
    assert refused == [True] * 5 and httpx.get(elsewhere).is_success
    page.asked = [request for request in page.asked if request.url != elsewhere]
    page.expected = ("Content Security Policy", "'Trusted")


def test_files_that_are_not_the_page_s_are_not_given(server: Server) -> None:
    for path in ("page/__init__.py", "page/..%2f__init__.py", "page/markdown.py", "page/index.html", "page/"):
        assert httpx.get(server.url + path).status_code == 404
    limited = httpx.post(
        server.url + "render", json={"text": "x" * 200_001}, headers={"Authorization": f"Bearer {KEY}"}
    )
    assert limited.status_code == 400 and httpx.post(server.url + "render", json={"text": "x"}).status_code == 401


def test_a_key_is_asked_for_and_kept_for_the_tab(window: Callable[..., Page]) -> None:
    page = window(key=None)
    page.expected = ("status of 401",)
    for typed, said in (("wrong", "asks for a key"), (KEY, "not accepted")):
        page.tab.locator("#key-problem", has_text=said).wait_for()
        page.tab.fill("#key", typed)
        page.tab.press("#key", "Enter")
    page.ready().say(TEXTS[0])
    page.tab.reload()
    page.ready()
    assert page.texts() and not page.tab.locator("#key-dialog").is_visible()
    assert KEY not in page.tab.evaluate("JSON.stringify(localStorage)")


def test_two_tabs_and_a_full_storage_lose_nothing_unsaid(page: Page) -> None:
    other = page.open()
    other.wait_for_selector("#models select")
    page.say("Add 2 and 3")
    assert other.locator(".conversation").all_inner_texts() == ["Add 2 and 3"]
    page.tab.hover(".conversation")
    page.tab.click("nav li .icon")
    assert page.tab.locator(".conversation").count() == 0
    page.tab.click("#undo button")
    assert page.texts() == ["Add 2 and 3", "5"]
    other.close()
    page.tab.evaluate("""() => {
        for (let size = 1 << 22; size > 16; size >>= 1)
            try { for (;;) localStorage.setItem("x" + Math.random(), "x".repeat(size)) } catch {}
    }""")
    page.say("Add 1")
    assert "storage is full" in page.tab.locator("#notice").inner_text() and page.texts()[-1] == "6"


# How it looks ---------------------------------------------------------------------------------------------------

RICH = f"""# Title
{"long" * 60}

| {" | ".join(["column"] * 12)} |
|{"-|" * 12}
| {" | ".join(["value"] * 12)} |

```python
def f(x):  # {"a comment that does not end " * 8}
```
> {"quoted " * 30} http://{"x" * 90}.org
"""


def test_nothing_is_wider_than_the_window(page: Page) -> None:
    call = {"type": "function", "function": {"name": "n" * 90, "arguments": json.dumps({"text": "t" * 200})}}
    restore(page, stored([("w" * 300, RICH)], ("seed", "endless"), calls=[call], reasoning="r" * 200, state="lost"))
    for width in (320, 390, 800, 1280):
        page.tab.set_viewport_size({"width": width, "height": 700})
        for selector in ("html", "#log", "header", "#composer", ".answer", ".user"):
            wide = page.tab.eval_on_selector_all(selector, "found => found.map((e) => e.scrollWidth - e.clientWidth)")
            assert max(wide) <= 0, (selector, width)
        page.tab.click("#settings-open")
        box = page.tab.locator("#settings-dialog").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        page.tab.keyboard.press("Escape")


COLOURS = [
    ("ink", "paper"),
    ("quiet", "paper"),
    ("quiet", "side"),
    ("quiet", "code"),
    ("accent", "paper"),
    ("ink", "bubble"),
]
COLOURS += [
    ("on-accent", "accent"),
    ("warn", "warn-paper"),
    *((name, "code") for name in ("word", "string", "number", "name")),
]


def contrast(page: Page, front: str, back: str) -> float:
    """The ratio of WCAG 2.2, which asks for 4.5 where text is read."""

    def luminance(name: str) -> float:
        script = (
            "name => { document.body.style.color = `var(--${name})`; return getComputedStyle(document.body).color; }"
        )
        parts = [int(part) / 255 for part in re.findall(r"\d+", page.tab.evaluate(script, name))[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(front), luminance(back)))
    return (high + 0.05) / (low + 0.05)


def test_light_and_dark_follow_the_system_and_the_switch_and_can_be_read(window: Callable[..., Page]) -> None:
    page = window(color_scheme="dark").ready()
    seen = []
    for _ in range(4):
        seen.append(page.tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        for front, back in COLOURS:
            assert contrast(page, front, back) >= 4.5, (front, back, seen[-1])
        page.tab.click("#theme-switch")
    assert seen[0] == seen[2] == seen[3] != seen[1]  # automatic, light, dark, automatic
    page.tab.reload()
    assert page.tab.evaluate("getComputedStyle(document.body).backgroundColor") == seen[1]


def test_chinese(window: Callable[..., Page]) -> None:
    page = window(locale="zh-CN").ready()
    assert page.tab.locator("html").get_attribute("lang") == "zh-CN"
    assert page.tab.locator("#new").inner_text() == "新对话"
    page.say("你是谁？")
    assert page.texts() == ["你是谁？", "我是一颗种子。"]
    assert "个 token" in page.tab.locator(".stats").inner_text()
    page.tab.click("#language-switch")
    assert (
        page.tab.locator("#new").inner_text() == "New conversation"
        and " tokens" in page.tab.locator(".stats").inner_text()
    )
    page.tab.reload()
    assert page.tab.locator("#new").inner_text() == "New conversation"
    keys = page.tab.evaluate(
        "import('/page/words.js').then(({WORDS}) => Object.values(WORDS).map((words) => Object.keys(words)))"
    )
    assert len(keys) == 2 and set(keys[0]) == set(keys[1])


NAMED = "e => e === document.body ? 'body' : e.ariaLabel || e.innerText.trim() || e.labels?.[0]?.innerText || ''"


def test_a_keyboard_is_enough(page: Page) -> None:
    keys = page.tab.keyboard

    def focused() -> str:
        return page.tab.evaluate(f"({NAMED})(document.activeElement)")

    assert focused() == "Write a message"
    keys.type("Who are")
    keys.press("Shift+Enter")
    keys.press("Backspace")
    keys.type(" you?")
    keys.press("Enter")
    page.answered()
    assert page.texts() == TEXTS
    order = []
    for _ in range(16):
        keys.press("Tab")
        order.append(focused())
        assert page.tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none" or order[-1] in (
            "Write a message",
            "body",
        )
    wanted = [
        "New conversation",
        "Who are you?",
        "Delete “Who are you?”",
        "Colours: as the system",
        "中文",
        "Keyboard shortcuts",
    ]
    wanted += [
        "Model",
        "Two models side by side",
        "Settings",
        "Edit message",
        "Copy",
        "Answer again",
        "Write a message",
    ]
    assert [name for name in order if name in wanted][: len(wanted)] and set(wanted) <= set(order) and "" not in order
    start = order.index("New conversation")
    assert [name for name in (order[start:] + order[:start]) if name in wanted][: len(wanted)] == wanted

    page.tab.focus("#message")
    keys.press("ArrowUp")  # edit the last message
    assert focused() == "Edit message"
    keys.press("Control+A")
    keys.type("Add 2 and 3")
    keys.press("Enter")
    page.answered()
    assert page.texts() == ["Add 2 and 3", "5"]
    keys.press("Alt+KeyR")
    page.answered()
    keys.press("Alt+KeyN")
    assert page.texts() == [] and focused() == "Write a message"
    keys.press("Alt+ArrowDown")
    assert page.texts() == ["Add 2 and 3", "5"]
    page.tab.focus("#settings-open")
    keys.press("Enter")
    assert page.tab.locator("#settings-dialog").is_visible()
    keys.press("Escape")
    assert focused() == "Settings"
    keys.press("?")
    assert page.tab.locator("#keys-dialog").is_visible()


def test_a_word_that_an_input_method_ends_is_not_sent(page: Page) -> None:
    page.tab.fill("#message", "ni")
    event = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true})"
    page.tab.evaluate(f"document.getElementById('message').dispatchEvent({event})")
    assert page.texts() == [] and page.tab.input_value("#message") == "ni"


# Last, since it kills the server --------------------------------------------------------------------------------


def test_a_lost_server_loses_no_message(page: Page, server: Server) -> None:
    page.expected = ("net::ERR",)
    page.tab.select_option("#models select", "endless")
    page.settings(max_tokens=8000)
    page.type("Go on")
    page.streams()
    server.stop(signal.SIGKILL)
    page.tab.wait_for_selector(".problem:visible")
    assert "had come is kept" in page.tab.locator(".problem").inner_text()
    assert page.tab.locator(".markdown").inner_text()
    page.tab.click("#new")
    page.tab.select_option("#models select", "seed")
    page.type(TEXTS[0])
    page.tab.wait_for_selector(".problem:visible")
    assert "cannot be reached. Your message is kept" in page.tab.locator(".problem").inner_text()
    server.start()
    page.tab.click(".problem button")
    page.answered()
    assert page.texts() == TEXTS


# README's pictures ----------------------------------------------------------------------------------------------

QUESTIONS = ["Who are you?", "Tell me about the white elephant.", "Translate: five white elephants under the bridge"]
CHINESE = ["你是谁？", "介绍一下白象。", "反过来说：弱的鹿很忙。"]


@pytest.mark.skipif(
    "SEEDLING_PICTURES" not in os.environ, reason="writes docs/images/chat_*.png where SEEDLING_PICTURES asks"
)
def test_pictures(browser: Any) -> None:
    """SEEDLING_PICTURES="before=FOLDER after=FOLDER" makes those of docs/images, with models of the quickstart."""
    server = Server(os.environ["SEEDLING_PICTURES"].split(), free_port(), key=None)
    server.start()
    names = [model.split("=")[0] for model in server.models]

    def picture(name: str, *conversations: list[str], two: bool = False, **options: Any) -> None:
        page = Page(browser, server.url, key=None, **options).ready()
        page.tab.evaluate("localStorage['seedling.settings'] = '{\"temperature\": 0, \"alone\": true}'")
        page.tab.evaluate(
            "models => (localStorage['seedling.models'] = models)", json.dumps(names if two else names[-1:])
        )
        for texts in conversations:
            page.tab.goto("/?")
            page.ready()
            for text in texts:
                page.say(text)
        page.tab.mouse.move(0, 0)
        page.tab.screenshot(path=ROOT / "docs/images" / name)
        page.close()

    phone = {
        "viewport": {"width": 390, "height": 760},
        "is_mobile": True,
        "has_touch": True,
        "device_scale_factor": 1.5,
    }
    picture("chat_desktop.png", CHINESE[2:], QUESTIONS, viewport={"width": 1200, "height": 720})
    picture("chat_side_by_side.png", [QUESTIONS[1], CHINESE[1]], two=True, viewport={"width": 1200, "height": 660})
    picture("chat_phone.png", CHINESE, color_scheme="dark", locale="zh-CN", **phone)
    server.stop()
