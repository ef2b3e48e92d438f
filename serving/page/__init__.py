"""The page to chat, as a browser gets it: HTML, one style sheet, a few scripts, and Markdown turned into HTML.

    app.include_router(page_router())

    GET  /               index.html
    GET  /page/app.js    one of FILES
    POST /render         {"text": "**Hi**"} -> {"html": "<p><strong>Hi</strong></p>\\n"}

The page itself is open to everyone who reaches the server; it holds no secret. What it asks needs the key, /render too
(serving/guard.py). Every answer carries HEADERS: a browser then runs no script, takes no style and asks no host
but this server's own, whatever a model writes.
"""

from importlib.resources import files

from fastapi import APIRouter, HTTPException, Response
from pydantic import BaseModel, Field

from serving.page.markdown import to_html

FILES = {
    "page.css": "text/css",
    "icon.svg": "image/svg+xml",
    "app.js": "text/javascript",
    "api.js": "text/javascript",
    "chat.js": "text/javascript",
    "settings.js": "text/javascript",
    "store.js": "text/javascript",
    "view.js": "text/javascript",
    "words.js": "text/javascript",
}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    # HTML is made in one place of the page, under this name; anywhere else the browser refuses it
    "require-trusted-types-for": "'script'",
    "trusted-types": "rendered",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # after an update of the server no old script meets a new page
}
MAX_TEXT = 200_000  # characters


class Text(BaseModel):
    """Markdown, as a model wrote it."""

    text: str = Field(max_length=MAX_TEXT)


class Rendered(BaseModel):
    """Safe HTML (`serving.page.markdown`)."""

    html: str


def page_router() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    def index() -> Response:
        return page_file("index.html", "text/html")

    @router.get("/page/{name}")
    def file(name: str) -> Response:
        if name not in FILES:
            raise HTTPException(404, f"no such file: {name!r}; there are {', '.join(FILES)}")
        return page_file(name, FILES[name])

    @router.post("/render")
    def render(text: Text, response: Response) -> Rendered:
        response.headers.update(HEADERS)
        return Rendered(html=to_html(text.text))

    return router


def page_file(name: str, media_type: str) -> Response:
    return Response((files(__name__) / name).read_bytes(), media_type=media_type, headers=HEADERS)
