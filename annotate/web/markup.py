"""Texts of models and people as harmless HTML: no tags, links or images of theirs, and no hidden text direction.

Markdown is rendered without losing any of the text. Links and images appear as written: nothing can be clicked, nothing
is fetched, and a link's target is visible. Numbers of lists, backslashes and the language of a code block are kept;
only the marks `* _ ~ # > | - :` and backquotes may be replaced by formatting. If Markdown would drop more, such as a
surplus cell in a table's row, the text is shown as written.
"""

from __future__ import annotations

import html
import re
from difflib import SequenceMatcher
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, emphasis

MAX_MARKDOWN_LENGTH = 50_000
"""Maximum characters of a text that is rendered as Markdown, because a megabyte takes seconds."""
MAX_NESTING = 10
"""Maximum nesting of blocks, where a list counts twice. Deeper texts, too wide for a phone, are shown as written."""
MAX_COMPARED_WORDS = 4_000
"""Maximum words of each text in a comparison."""

# Characters that change the direction of text, invisible characters, and controls. They are replaced by their names, so
# that everyone sees the same text. The joiners U+200C and U+200D stay, because emoji and some scripts need them.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\u3164\ufeff\uffa0"
    "\U000e0000-\U000e007f]"
)
MARKS = re.compile(r"[\s*_~`#>|:-]")
"""Whitespace and marks of Markdown, which formatting may replace."""
TIMES = re.compile(r"(?<=[0-9A-Za-z)\]])\*+(?=[0-9A-Za-z(\[\\])")
"""Asterisks of multiplications: Markdown would turn 2*3*4 into an emphasised 3."""


def keep_backslash(state: StateInline, silent: bool) -> bool:
    """Parse a backslash and the next character as plain text, as an inline rule of markdown-it.

    In LaTeX, `\\(` means more than `(`. Returns False if there is no backslash. With `silent` nothing is written.
    """
    if state.src[state.pos] != "\\":
        return False
    escaped = state.src[state.pos : state.pos + 2].rstrip("\n")
    if not silent:
        state.pending += escaped
    state.pos += len(escaped)
    return True


def keep_times(state: StateInline, silent: bool) -> bool:
    match = None if silent else TIMES.match(state.src, state.pos)
    if match is None:
        return emphasis.tokenize(state, silent)
    state.pending += match[0]
    state.pos = match.end()
    return True


def render_item_start(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    """Return the HTML of the start of a list item, with its number or bullet as text.

    Markdown itself numbers on from the first number and ignores the others, and browsers clip a marker that is wider
    than the margin.
    """
    token = tokens[index]
    return f'<li><span class="marker">{html.escape(token.info + token.markup)}</span> <div>'


def render_item_end(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    return "</div></li>\n"


def render_fence(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    """Return a fenced block of code as HTML, with its language above it."""
    language = tokens[index].info.strip()
    label = f'<p class="soft">{html.escape(language)}</p>\n' if language else ""
    return f"{label}<pre><code>{html.escape(tokens[index].content)}</code></pre>\n"


MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": MAX_NESTING})
MARKDOWN.enable(["table", "strikethrough"])
MARKDOWN.disable(["image", "link", "autolink", "reference", "entity", "lheading"])
MARKDOWN.inline.ruler.at("escape", keep_backslash)
MARKDOWN.inline.ruler.at("emphasis", keep_times)
for name, rule in (
    ("list_item_open", render_item_start),
    ("list_item_close", render_item_end),
    ("fence", render_fence),
):
    MARKDOWN.add_render_rule(name, rule)


def render_markdown(text: str) -> str:
    """Return Markdown as HTML, or the text as written if it is very long or the HTML would lose part of it."""
    displayed = name_invisible_characters(text)
    if len(displayed) <= MAX_MARKDOWN_LENGTH and (content := MARKS.sub("", displayed)):
        rendered_html = MARKDOWN.render(displayed)
        if MARKS.sub("", html.unescape(re.sub("<[^>]*>", "", rendered_html))) == content:
            return rendered_html
    return render_as_written(text)


def render_as_written(text: str) -> str:
    """Return a text as preformatted HTML, escaped and not interpreted, with invisible characters by their names."""
    return f"<pre>\n{html.escape(name_invisible_characters(text))}</pre>"  # a browser drops the first line feed


def name_invisible_characters(text: str) -> str:
    """Return a text with every invisible character replaced by its name, such as ⟨U+202E⟩, and lines ended by `\\n`."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return INVISIBLE.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", lines)


def render_difference(first_text: str, second_text: str) -> str:
    """Return the word-by-word difference of two texts as HTML, with `<del>` and `<ins>`.

    Words that make up more than 1 % of a long text start no match (difflib's own rule). Without it, two texts that
    repeat a few words would take minutes.
    """
    word_lists = [re.findall(r"\s+|\w+|[^\w\s]", name_invisible_characters(text)) for text in (first_text, second_text)]
    a, b = (segment[:MAX_COMPARED_WORDS] for segment in word_lists)
    fragments = []
    for kind, i, j, k, m in SequenceMatcher(None, a, b).get_opcodes():
        if kind == "equal":
            fragments.append(html.escape("".join(a[i:j])))
            continue
        for tag, segment in (("del", a[i:j]), ("ins", b[k:m])):
            if segment:
                fragments.append(f"<{tag}>{html.escape(''.join(segment))}</{tag}>")
    is_cut = any(len(segment) > MAX_COMPARED_WORDS for segment in word_lists)
    return "".join(fragments) + (f"<p>… ({MAX_COMPARED_WORDS} words were compared)</p>" if is_cut else "")
