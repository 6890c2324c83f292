"""What models and people wrote, as HTML that does nothing: no tag of theirs, no link, no image, no hidden direction.

Markdown is rendered, and says all that the text says. Links and images stand as they were written: nothing can be
clicked, nothing is fetched, and what a link's text hides is seen. Numbers of lists, backslashes and the language of a
code block stay; only the marks `* _ ~ # > | - :` and backquotes may be replaced by what they do. A text of which
Markdown would swallow more, such as a cell too many in a table's row, is shown as it was written.
"""

from __future__ import annotations

import html
import re
from difflib import SequenceMatcher
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, emphasis

PLAIN_ABOVE = 50_000
"""Characters above which a text is shown as it is, in full: rendering a megabyte of Markdown takes seconds."""
DEEPEST = 10
"""Blocks within one another; a list is two. Deeper ones leave no room on a phone: such a text is shown as written."""
COMPARED = 4_000
"""Words of each of two answers that are compared."""

# Characters that turn the direction of text or show nothing, and controls: named in place, so that all read the same.
# (Not the joiners U+200C and U+200D, which emoji and some scripts need.)
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\u3164\ufeff\uffa0"
    "\U000e0000-\U000e007f]"
)
MARKS = re.compile(r"[\s*_~`#>|:-]")
"""What formatting may stand in place of."""
TIMES = re.compile(r"(?<=[0-9A-Za-z)\]])\*+(?=[0-9A-Za-z(\[\\])")
"""Asterisks that multiply: Markdown would make 2*3*4 an emphasised 3."""


def keep_backslash(state: StateInline, silent: bool) -> bool:
    """A backslash stands, and what it escapes is no mark: in LaTeX, `\\(` means more than `(`."""
    if state.src[state.pos] != "\\":
        return False
    escaped = state.src[state.pos : state.pos + 2].rstrip("\n")
    if not silent:
        state.pending += escaped
    state.pos += len(escaped)
    return True


def keep_times(state: StateInline, silent: bool) -> bool:
    found = None if silent else TIMES.match(state.src, state.pos)
    if found is None:
        return emphasis.tokenize(state, silent)
    state.pending += found[0]
    state.pos = found.end()
    return True


def open_item(renderer: Any, tokens: Any, at: int, options: Any, env: Any) -> str:
    """Of a list, with its number or bullet as text: Markdown counts on from the first number, whatever the others are,
    and a browser clips a marker that is wider than its margin."""
    token = tokens[at]
    return f'<li><span class="marker">{html.escape(token.info + token.markup)}</span> <div>'


def close_item(renderer: Any, tokens: Any, at: int, options: Any, env: Any) -> str:
    return "</div></li>\n"


def fence(renderer: Any, tokens: Any, at: int, options: Any, env: Any) -> str:
    """A block of code, with its language."""
    language = tokens[at].info.strip()
    named = f'<p class="soft">{html.escape(language)}</p>\n' if language else ""
    return f"{named}<pre><code>{html.escape(tokens[at].content)}</code></pre>\n"


MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": DEEPEST})
MARKDOWN.enable(["table", "strikethrough"])
MARKDOWN.disable(["image", "link", "autolink", "reference", "entity", "lheading"])
MARKDOWN.inline.ruler.at("escape", keep_backslash)
MARKDOWN.inline.ruler.at("emphasis", keep_times)
for name, rule in (("list_item_open", open_item), ("list_item_close", close_item), ("fence", fence)):
    MARKDOWN.add_render_rule(name, rule)


def rendered(text: str) -> str:
    """Markdown as HTML; as it was written where it is very long, or would not say all of it."""
    displayed = visible(text)
    if len(displayed) <= PLAIN_ABOVE and (said := MARKS.sub("", displayed)):
        made = MARKDOWN.render(displayed)
        if MARKS.sub("", html.unescape(re.sub("<[^>]*>", "", made))) == said:
            return made
    return written(text)


def written(text: str) -> str:
    """A text as HTML that shows each of its characters."""
    return f"<pre>\n{html.escape(visible(text))}</pre>"  # a browser drops the first line feed


def visible(text: str) -> str:
    """The text with every unseen character named, such as ⟨U+202E⟩; lines end with a line feed."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", lines)


def compared(before: str, after: str) -> str:
    """The two texts in one, word by word: what only the first has in `<del>`, what only the second has in `<ins>`.

    Words that make up more than 1 % of a long text start no match (difflib's own rule): without it two texts of a few
    words over and over take minutes.
    """
    words = [re.findall(r"\s+|\w+|[^\w\s]", visible(text)) for text in (before, after)]
    a, b = (part[:COMPARED] for part in words)
    found = []
    for kind, i, j, k, m in SequenceMatcher(None, a, b).get_opcodes():
        if kind == "equal":
            found.append(html.escape("".join(a[i:j])))
            continue
        for tag, part in (("del", a[i:j]), ("ins", b[k:m])):
            if part:
                found.append(f"<{tag}>{html.escape(''.join(part))}</{tag}>")
    more = any(len(part) > COMPARED for part in words)
    return "".join(found) + (f"<p>… ({COMPARED} words were compared)</p>" if more else "")
