"""A page that grows block by block.

Each block is a method that returns the report, so that what a stage shows reads as a list:

    Report("PPO", "pocket-qlora-1a2b3c4d").verdict("The score rose.").plot(drawn, "Score", alt).write(path)

Model text is untrusted: every string is escaped, images are embedded, and a content security policy forbids scripts and
anything remote, so an answer that contains `<script>` is shown and never run.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from align.distribution import install_command, missing_modules
from align.errors import InputError, StorageError
from align.outputs import refuse_foreign_file, replace_file
from align.report.style import BLOCKS, COLOURS, FRAME
from align.report.words import counted, format_figure
from align.track import turn_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Nothing may run and nothing may be fetched, whatever a model wrote.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

AUTO = " dir=auto"
"""Of an element: its text runs the way its own script does."""
LONGEST_TEXT = 2000
"""Characters of a prompt or an answer that a page shows."""


class Link(NamedTuple):
    """Text that leads to a page beside this one."""

    text: str
    href: str


class Code(NamedTuple):
    """Text to be copied as it is."""

    text: str


class Part(NamedTuple):
    """A piece of a row of tokens: its text, whether a loss is taken on it, whether it is special tokens."""

    text: str
    trained: bool
    special: bool


class Said(NamedTuple):
    """An answer.

    Attributes:
        label: what is to be said of it.
        text: the answer.
        reasoning: what it begins with and nobody who judged it read, shown folded.
    """

    label: str
    text: str
    reasoning: str = ""


Fact = str | Link | Code
Asked = Sequence[Mapping[str, Any]]
"""A conversation up to an answer: `{role, content}` a turn."""
Block = str
"""HTML of one block, every text in it escaped."""


SEAL = "<!-- written by align; sha256 of everything above: {} -->\n"


def add_seal(page: bytes) -> bytes:
    """Return a page with a last line that tells it from the files of others: a digest of the rest."""
    return page + SEAL.format(sha256(page).hexdigest()).encode()


def is_sealed(data: bytes) -> bool:
    """Return whether the bytes are those of a page as `add_seal` made it."""
    return data == add_seal(data[: data.rfind(b"<!-- written by align")])


class Report:
    """An HTML page that grows block by block.

    Args:
        title: the page's one `h1`.
        subtitle: a line under it, such as the run's name.
        refresh: seconds after which the page loads itself anew; 0 for never.
    """

    def __init__(self, title: str, subtitle: str = "", refresh: int = 0) -> None:
        self.title, self.subtitle, self.refresh = title, subtitle, refresh
        self.blocks: list[Block] = []
        self.has_plot_note = False

    def verdict(self, text: str, state: Literal["done", "running", "failed"] = "done") -> Report:
        """What came of it, in a sentence or two, before everything else."""
        return self._add(f'<p class="verdict {state}">{escape(text)}</p>')

    def heading(self, text: str) -> Report:
        """A second-level heading over what follows."""
        return self._add(f"<h2>{escape(text)}</h2>")

    def text(self, markdown: str) -> Report:
        """Paragraphs parted by blank lines; `- ` makes a list; `**bold**` and backticks work, nothing else does."""
        return self._add(f"<div>{''.join(_paragraphs(markdown))}</div>")

    def facts(self, facts: Sequence[tuple[str, Sequence[Fact]]]) -> Report:
        """Terms and what is to be said of each; several parts stand on lines of their own."""

        def shown(part: Fact) -> str:
            if isinstance(part, Link):
                return f'<a href="{escape(part.href)}">{escape(part.text)}</a>'
            return f"<code>{escape(part.text)}</code>" if isinstance(part, Code) else escape(part)

        rows = (f"<dt>{escape(term)}</dt><dd>{'<br>'.join(map(shown, parts))}</dd>" for term, parts in facts)
        return self._add(f'<dl class="facts">{"".join(rows)}</dl>')

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Any]], name: str) -> Report:
        """A table that scrolls inside itself on a narrow screen.

        Args:
            headers: one a column.
            rows: cells; text stands left and keeps its line breaks, anything else is a figure, formatted and set right.
            name: for whoever hears the page; no other table of the page has it.

        Raises:
            ValueError: a row has more or fewer cells than there are headers.
        """
        for row in rows:
            if len(row) != len(headers):
                raise ValueError(f"a row of {len(row)} cells under {len(headers)} headers")

        def cell(tag: str, value: Any, figure: bool) -> str:
            text = escape(value if isinstance(value, str) else format_figure(value))
            return f"<{tag} class=number>{text}</{tag[:2]}>" if figure else f"<{tag}>{text}</{tag[:2]}>"

        figures = [bool(rows) and all(not isinstance(row[i], str) for row in rows) for i in range(len(headers))]
        head = "".join(cell("th scope=col", h, figures[i]) for i, h in enumerate(headers))
        body = "".join(f"<tr>{''.join(cell('td', v, not isinstance(v, str)) for v in row)}</tr>" for row in rows)
        # A region that scrolls must be reachable by keyboard, hence the tabindex.
        return self._add(
            f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">'
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def draw(self, build_figure: Callable[[], Figure], caption: str, alt: str) -> Report:
        """Add a plot, or its description if matplotlib is not installed.

        Args:
            build_figure: draws the figure; see `align.report.plots`.
            caption, alt: see `plot`.
        """
        if not missing_modules("plots"):
            from align.report.plots import render

            return self.plot(render(build_figure(), transparent=True), caption, alt)
        if not self.has_plot_note:
            self.has_plot_note = True
            self.text(f"Plots are described in words, since matplotlib is not installed: `{install_command('plots')}`")
        return self._add(f"<figure><p>{escape(alt)}</p><figcaption>{escape(caption)}</figcaption></figure>")

    def plot(self, image: bytes, caption: str, alt: str) -> Report:
        """An SVG embedded in the page; neighbours stand side by side where there is room.

        Args:
            alt: what the plot shows, for whoever cannot see it; must not be empty.
        """
        if not alt.strip():
            raise ValueError(f"the plot {caption!r} has no alt text")
        source = f"data:image/svg+xml;base64,{base64.b64encode(image).decode('ascii')}"
        label = f"<figcaption>{escape(caption)}</figcaption>"
        return self._add(f'<figure class="plot"><img alt="{escape(alt)}" src="{source}">{label}</figure>')

    def transcript(self, asked: Asked, answers: Sequence[Said]) -> Report:
        """What was answered to one prompt, one below the other, line breaks kept."""
        return self._add(f'<figure class="transcript">{_asked(asked)}<dl>{"".join(map(_said, answers))}</dl></figure>')

    def side_by_side(self, asked: Asked, answers: Sequence[Said]) -> Report:
        """Answers to one prompt beside each other; below each other on a narrow screen."""
        sides = "".join(f'<div class="side">{_said(answer)}</div>' for answer in answers)
        shape = "sides pairs" if len(answers) in (2, 4) else "sides"  # four stand two by two, and not three and one
        return self._add(f'<figure>{_asked(asked)}<dl class="{shape}">{sides}</dl></figure>')

    def tokens(self, caption: str, parts: Sequence[Part]) -> Report:
        """A row as it is trained on: what a loss is taken on is tinted and underlined, special tokens are framed."""

        def piece(part: Part | str) -> str:
            if isinstance(part, str):
                return f"<i>{escape(part)}</i>"
            return f"<code>{escape(part.text)}</code>" if part.special else escape(part.text)

        runs = groupby(_cut_within(parts, LONGEST_TEXT), lambda part: isinstance(part, Part) and part.trained)
        texts = (("".join(map(piece, run)), trained) for trained, run in runs)
        body = "".join(f"<mark>{text}</mark>" if trained else text for text, trained in texts)
        label = f"<figcaption>{escape(caption)}</figcaption>"
        return self._add(f'<figure>{label}<p class="tokens" dir=auto>{body}</p></figure>')

    def html(self) -> str:
        """The whole page."""
        subtitle = f"<p>{escape(self.subtitle)}</p>" if self.subtitle else ""
        refresh = f'<meta http-equiv="refresh" content="{self.refresh}">\n' if self.refresh else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n{refresh}'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>\n{COLOURS}\n{FRAME}\n{BLOCKS}\n</style>\n</head>\n<body>\n"
            f"<header><h1>{escape(self.title)}</h1>{subtitle}</header>\n<main class=blocks>\n"
            + "\n".join(self.blocks)
            + "\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: Path, field: str = "") -> Path:
        """Write the page at once: a reader sees the old file or the new one, never a half.

        Args:
            field: the setting that names the file, of a page outside of the folder of a run. It is sealed, and replaces
                nothing but a page with a seal.

        Raises:
            InputError: there is a file that align did not write, or that was edited since.
            StorageError: the folder is missing or cannot be written, or the disk is full.
        """
        # Lone surrogates, which a broken tokenizer can emit, have no UTF-8 form: they become references.
        page = self.html().encode("utf-8", "xmlcharrefreplace")
        try:
            if field:
                refuse_foreign_file(path, field, is_sealed)
            replace_file(path, add_seal(page) if field else page, sync=False)
        except InputError:
            raise
        except OSError as error:
            raise StorageError(
                "report", str(path), f"cannot be written ({error.strerror})", "Free space or choose another run.root."
            ) from error
        return path

    def _add(self, block: Block) -> Report:
        self.blocks.append(block)
        return self


def escape(text: Any) -> str:
    """Text made inert inside an element or a quoted attribute."""
    return html.escape(str(text), quote=True)


def _asked(messages: Asked) -> str:
    """The last turn of a conversation; what stands before it is folded."""
    *before, last = messages
    system = sum(message["role"] == "system" for message in before)
    turns = counted(len(before) - system, "earlier turn") if len(before) > system else ""
    names = " and ".join(filter(None, ("system turn" if system else "", turns)))
    told = "".join(f"<dt>{escape(m['role'])}</dt><dd{AUTO}>{escape(_cut(turn_text(m)))}</dd>" for m in before)
    folded = f"<details><summary>{names}</summary><dl>{told}</dl></details>" if before else ""
    return f"<figcaption>{folded}<div class=prompt{AUTO}>{escape(_cut(turn_text(last)))}</div></figcaption>"


def _said(answer: Said) -> str:
    thought = f"<div{AUTO}>{escape(_cut(answer.reasoning))}</div>"
    folded = f"<details><summary>reasoning</summary>{thought}</details>" if answer.reasoning else ""
    return f"<dt>{escape(answer.label)}</dt><dd>{folded}<div{AUTO}>{escape(_cut(answer.text))}</div></dd>"


def _cut(text: str) -> str:
    """A text of a bounded length that is not blank."""
    if not text.strip():
        return "(empty)"
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}… ({len(text):,} characters)"


def _cut_within(parts: Sequence[Part], most: int) -> Iterator[Part | str]:
    """Parts of at most so many characters: of a longer row the beginning and the end, and a note of what is between."""
    total = sum(len(part.text) for part in parts)
    if total <= most:
        yield from parts
        return
    start, stop, at = (most + 1) // 2, total - most // 2, 0
    for part in parts:
        end = at + len(part.text)
        if at < start:
            yield part._replace(text=part.text[: start - at])
        if at <= start < end:
            yield f" … {stop - start:,} characters are left out here … "
        if stop < end:
            yield part._replace(text=part.text[max(0, stop - at) :])
        at = end


def _paragraphs(markdown: str) -> Iterator[str]:
    """Escape first, then mark up: the marks are ours, whatever stands between them stays inert."""

    def inline(text: str) -> str:
        coded = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
        return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", coded)

    for block in re.split(r"\n\s*\n", markdown.strip()):
        lines = [line.strip() for line in block.splitlines()]
        if all(line.startswith("- ") for line in lines):
            yield f"<ul>{''.join(f'<li>{inline(line[2:])}</li>' for line in lines)}</ul>"
        else:
            yield f"<p>{inline(' '.join(lines))}</p>"
