"""What models and people wrote, as HTML that does nothing: no tag of theirs, no link, no image, no hidden direction.

Markdown is rendered but for links and images, which stand as they were written: nothing can be clicked, nothing is
fetched, and what a link's text hides is seen.
"""

from __future__ import annotations

import html
import re
from difflib import SequenceMatcher

from markdown_it import MarkdownIt

PLAIN_ABOVE = 50_000
"""Characters above which a text is shown as it is, in full: rendering a megabyte of Markdown takes seconds."""
COMPARED = 4_000
"""Words of each of two answers that are compared."""

# Characters that turn the direction of text or show nothing, and controls: named in place, so that all read the same.
# (Not the joiners U+200C and U+200D, which emoji and some scripts need.)
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\u3164\ufeff\uffa0"
    "\U000e0000-\U000e007f]"
)
MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
MARKDOWN.disable(["image", "link", "autolink", "reference", "entity"])


def rendered(text: str) -> str:
    """Markdown as HTML."""
    displayed = visible(text)
    return f"<pre>{html.escape(displayed)}</pre>" if len(displayed) > PLAIN_ABOVE else MARKDOWN.render(displayed)


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
