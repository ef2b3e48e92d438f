"""Markdown that a model wrote -> HTML that is safe to show.

    to_html("**Hi** <b>x</b>")    -> "<p><strong>Hi</strong> &lt;b&gt;x&lt;/b&gt;</p>\\n"
    to_html("[a](javascript:b)")  -> "<p>[a](javascript:b)</p>\\n"
    to_html("![cat](http://c)")   -> '<p><a href="http://c" target="_blank" ...>cat</a></p>\\n'

What is safe: HTML in the text stays text. A link goes to http, https or a mail address, and tells its target nothing of
this page. Nothing is loaded: a picture is a link to it. There are no style attributes, which the page's policy
refuses: columns of a table and the words of code are told apart by classes, which page.css colours.
"""

import re
from collections.abc import Sequence

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

ALLOWED_LINK = re.compile(r"(https?://|mailto:)", re.IGNORECASE)
LONGEST_CODE = 20_000  # characters that are coloured; regular expressions of some languages are slow on odd text


def to_html(text: str) -> str:
    """CommonMark, tables and ~~strikethrough~~. Half a surrogate pair, which no UTF-8 holds, becomes "?"."""
    return MARKDOWN.render(text.encode("utf-8", "replace").decode("utf-8"))


def code_to_html(code: str, language: str, _attributes: str) -> str:
    """Spans with Pygments' classes; "" for markdown-it to escape it as it is, where the language is not known."""
    if len(code) > LONGEST_CODE:
        return ""
    try:
        lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return ""
    return highlight(code, lexer, HtmlFormatter(nowrap=True))


class Renderer(RendererHTML):
    """markdown-it's own, but for links, pictures and the columns of tables."""

    def link_open(self, tokens: Sequence[Token], i: int, options: OptionsDict, env: EnvType) -> str:
        tokens[i].attrs.update({"target": "_blank", "rel": "noopener noreferrer nofollow"})
        return self.renderToken(tokens, i, options, env)

    def image(self, tokens: Sequence[Token], i: int, options: OptionsDict, env: EnvType) -> str:
        """A link to the picture, named by what stands for it."""
        source = str(tokens[i].attrs["src"])
        name = self.renderInlineAsText(tokens[i].children, options, env) or source
        link = [Token("link_open", "a", 1, attrs={"href": source}), Token("text", "", 0, content=name)]
        return self.link_open(link, 0, options, env) + self.text(link, 1, options, env) + "</a>"

    def td_open(self, tokens: Sequence[Token], i: int, options: OptionsDict, env: EnvType) -> str:
        """`style="text-align:right"` becomes `class="right"`."""
        if style := tokens[i].attrs.pop("style", None):
            tokens[i].attrs["class"] = str(style).removeprefix("text-align:")
        return self.renderToken(tokens, i, options, env)

    th_open = td_open


def make_markdown() -> MarkdownIt:
    options = {"html": False, "breaks": True, "highlight": code_to_html}
    markdown = MarkdownIt("commonmark", options, renderer_cls=Renderer)
    markdown.enable(["table", "strikethrough"])
    markdown.validateLink = lambda url: bool(ALLOWED_LINK.match(url))  # type: ignore[method-assign]
    return markdown


MARKDOWN = make_markdown()
