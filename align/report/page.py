"""A page that grows block by block.

Each block is a method that returns the report, so that what a stage shows reads as a list:

    Report("PPO", "pocket-qlora-1a2b3c4d").verdict("The score rose.").plot(image, "Score", alt).write(path)

Model text is untrusted: the templates escape every string, images are embedded, and a content security policy forbids
scripts and anything remote, so an answer that contains `<script>` is shown and never run.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from align.core.distribution import install_command, missing_modules
from align.core.errors import InputError, StorageError
from align.core.outputs import refuse_foreign_file, replace_file
from align.report.figure_text import counted, format_figure
from align.track import turn_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"
# Nothing may run and nothing may be fetched, whatever a model wrote.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
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
        label: what the page says of it.
        text: the answer.
        reasoning: its first part, which no judge read, shown folded.
    """

    label: str
    text: str
    reasoning: str = ""


Fact = str | Link | Code
Asked = Sequence[Mapping[str, Any]]
"""A conversation up to an answer: `{role, content}` a turn."""
Block = Markup
"""HTML of one block, every text in it escaped."""
SEAL = "<!-- written by align; sha256 of everything above: {} -->\n"


def add_seal(page: bytes) -> bytes:
    """Return a page with a last line that tells it from the files of others: a digest of the rest."""
    return page + SEAL.format(sha256(page).hexdigest()).encode()


def is_sealed(data: bytes) -> bool:
    """Return whether the bytes are those of a page as `add_seal` made it."""
    return data == add_seal(data[: data.rfind(b"<!-- written by align")])


def template_environment(*folders: Path) -> Environment:
    """Return the templates of folders, the first of which has precedence. They escape every value."""
    return Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


@cache
def report_templates() -> Environment:
    environment = template_environment(TEMPLATES)
    environment.tests["link"] = lambda value: isinstance(value, Link)
    environment.tests["code"] = lambda value: isinstance(value, Code)
    return environment


class Report:
    """An HTML page that grows block by block.

    Args:
        title: the page's one `h1`.
        subtitle: a line under it, such as the run's name.
        refresh: seconds after which the page loads itself anew; 0 for never.
    """

    def __init__(self, title: str, subtitle: str = "", refresh: int = 0) -> None:
        self.title = title
        self.subtitle = subtitle
        self.refresh = refresh
        self.blocks: list[Block] = []
        self.has_plot_note = False

    def verdict(self, text: str, state: Literal["done", "running", "failed"] = "done") -> Report:
        """Add the result in a sentence or two, before everything else."""
        return self._add("verdict", text, state)

    def heading(self, text: str) -> Report:
        """Add a second-level heading over what follows."""
        return self._add("heading", text)

    def text(self, markdown: str) -> Report:
        """Add paragraphs, parted by blank lines. `- ` makes a list; `**bold**` and backticks are the only marks."""
        return self._add("text", list(parse_paragraphs(markdown)))

    def facts(self, facts: Sequence[tuple[str, Sequence[Fact]]]) -> Report:
        """Add terms and their explanations; each part of an explanation has a line of its own."""
        return self._add("facts", facts)

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Any]], name: str) -> Report:
        """Add a table that scrolls inside itself on a narrow screen.

        Args:
            headers: one a column.
            rows: cells. Text stands left and keeps its line breaks; anything else is a figure, formatted and set right.
            name: for screen readers; unique on the page.

        Raises:
            ValueError: a row has more or fewer cells than there are headers.
        """
        for row in rows:
            if len(row) != len(headers):
                raise ValueError(f"a row of {len(row)} cells under {len(headers)} headers")
        columns = [
            (header, bool(rows) and all(not isinstance(row[i], str) for row in rows))
            for i, header in enumerate(headers)
        ]
        cells = [
            [(value, False) if isinstance(value, str) else (format_figure(value), True) for value in row]
            for row in rows
        ]
        return self._add("table", name, columns, cells)

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
        return self._add("described_plot", caption, alt)

    def plot(self, image: bytes, caption: str, alt: str) -> Report:
        """Add an embedded SVG; neighbours stand side by side where there is room.

        Args:
            alt: a description of the plot for screen readers; not empty.
        """
        if not alt.strip():
            raise ValueError(f"the plot {caption!r} has no alt text")
        source = f"data:image/svg+xml;base64,{base64.b64encode(image).decode('ascii')}"
        return self._add("plot", source, caption, alt)

    def transcript(self, asked: Asked, answers: Sequence[Said]) -> Report:
        """Add the answers to one prompt, one below the other, line breaks kept."""
        return self._add("transcript", shorten_prompt(asked), [shorten_answer(answer) for answer in answers])

    def side_by_side(self, asked: Asked, answers: Sequence[Said]) -> Report:
        """Add the answers to one prompt beside each other, or below each other on a narrow screen."""
        return self._add("side_by_side", shorten_prompt(asked), [shorten_answer(answer) for answer in answers])

    def tokens(self, caption: str, parts: Sequence[Part]) -> Report:
        """Add a training row: tokens with a loss are tinted and underlined, special tokens are framed."""
        pieces = cut_middle(parts, LONGEST_TEXT)
        spans = groupby(pieces, lambda piece: isinstance(piece, Part) and piece.trained)
        return self._add("tokens", caption, [(is_trained, list(span)) for is_trained, span in spans])

    def html(self) -> str:
        """Return the whole page."""
        template = report_templates().get_template("page.html")
        page = template.render(
            policy=POLICY, title=self.title, subtitle=self.subtitle, refresh=self.refresh, blocks=self.blocks
        )
        return f"{page}\n"

    def write(self, path: Path, field: str = "") -> Path:
        """Write the page atomically.

        Args:
            field: the setting that names the file, for a page outside of a run's folder. Such a page is sealed and
                replaces only a page with a seal.

        Raises:
            InputError: the file exists and align did not write it, or it was edited since.
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

    def _add(self, macro: str, *values: Any) -> Report:
        block = getattr(report_templates().get_template("blocks.html").module, macro)(*values)
        self.blocks.append(block)
        return self


def shorten_prompt(messages: Asked) -> dict[str, Any]:
    """Return the last turn of a conversation, and the turns before it, which are shown folded."""
    *earlier, last = messages
    systems = sum(message["role"] == "system" for message in earlier)
    turns = counted(len(earlier) - systems, "earlier turn") if len(earlier) > systems else ""
    return {
        "summary": " and ".join(filter(None, ("system turn" if systems else "", turns))),
        "earlier": [(message["role"], shorten(turn_text(message))) for message in earlier],
        "text": shorten(turn_text(last)),
    }


def shorten_answer(answer: Said) -> Said:
    reasoning = shorten(answer.reasoning) if answer.reasoning else ""
    return Said(answer.label, shorten(answer.text), reasoning)


def shorten(text: str) -> str:
    """Return a text that is not blank and has a bounded length."""
    if not text.strip():
        return "(empty)"
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}… ({len(text):,} characters)"


def cut_middle(parts: Sequence[Part], most: int) -> Iterator[Part | str]:
    """Yield parts of at most `most` characters: of a longer row the beginning and the end, and a note between them."""
    total = sum(len(part.text) for part in parts)
    if total <= most:
        yield from parts
        return
    start = (most + 1) // 2
    stop = total - most // 2
    at = 0
    for part in parts:
        end = at + len(part.text)
        if at < start:
            yield part._replace(text=part.text[: start - at])
        if at <= start < end:
            yield f" … {stop - start:,} characters are left out here … "
        if stop < end:
            yield part._replace(text=part.text[max(0, stop - at) :])
        at = end


def parse_paragraphs(markdown: str) -> Iterator[tuple[Literal["list", "text"], Any]]:
    """Yield ("list", items) or ("text", paragraph). Text is escaped first and marked up afterwards."""
    for block in re.split(r"\n\s*\n", markdown.strip()):
        lines = [line.strip() for line in block.splitlines()]
        if all(line.startswith("- ") for line in lines):
            yield "list", [mark_up(line[2:]) for line in lines]
        else:
            yield "text", mark_up(" ".join(lines))


def mark_up(text: str) -> Markup:
    with_code = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", with_code))
