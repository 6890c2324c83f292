"""Self-contained HTML report pages, built block by block from headings, text, tables and plots.

Each block is a macro of `templates/blocks.html`, and a method that returns the report:

    Report("PPO", "pocket-qlora-1a2b3c4d").verdict("The score rose.").plot(image, "Score", alt).write(path)

A section of several blocks is a macro of a template of its own, see `Report.add`.

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

from align.core.distribution import build_install_command, find_missing_modules
from align.core.errors import InputError, StorageError
from align.core.outputs import refuse_foreign_file, replace_file
from align.report.figure_text import (
    format_figure,
    format_interval,
    format_percent,
    format_signed,
    note_small_sample,
    pluralize,
)
from align.track import format_turn, truncate_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"
# A browser runs no script and fetches nothing, whatever text a model wrote.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LONGEST_TEXT = 2000
"""Maximum number of characters of a prompt or an answer that a report shows."""


class Link(NamedTuple):
    """A link on a report page, with its text and its relative URL."""

    text: str
    href: str


class Code(NamedTuple):
    """A text that a report page shows as code, such as a command to copy."""

    text: str


class Part(NamedTuple):
    """A piece of a tokenized training row, with marks for tokens under the loss and special tokens.

    Attributes:
        trained: whether the loss is computed on it.
        special: whether it consists of special tokens.
    """

    text: str
    trained: bool
    special: bool


Fact = str | Link | Code
Block = Markup
"""HTML of one section of a report page, with every text in it escaped."""
SEAL = "<!-- written by align; sha256 of everything above: {} -->\n"


def add_seal(page: bytes) -> bytes:
    """Append an HTML comment with the page's SHA-256, by which a later edit is detected, and return the page."""
    return page + SEAL.format(sha256(page).hexdigest()).encode()


def is_sealed(data: bytes) -> bool:
    """Return whether a file's content ends with the comment of `add_seal` and was not edited since."""
    return data == add_seal(data[: data.rfind(b"<!-- written by align")])


def create_template_environment(*folders: Path) -> Environment:
    """Create a Jinja environment for HTML or SVG templates that escapes every value and fails on undefined names.

    Args:
        folders: folders with templates; the first one that has a template wins.
    """
    return Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        extensions=["jinja2.ext.do"],
    )


@cache
def load_report_templates() -> Environment:
    environment = create_template_environment(TEMPLATES)
    environment.tests |= {"link": lambda value: isinstance(value, Link), "code": lambda value: isinstance(value, Code)}
    environment.filters |= {
        "figure": format_figure,
        "interval": format_interval,
        "percent": format_percent,
        "signed": format_signed,
        "counted": pluralize,
        "few": note_small_sample,
        "shortened": truncate_text,
        "paragraphs": parse_paragraphs,
        "spans": split_trained_spans,
        "prompt": shorten_prompt,
        "shorten": shorten_text,
    }
    return environment


class Report:
    """An HTML report page, whose methods each append a block, such as a table or a plot, and return the page.

    Args:
        title: title and heading of the page.
        subtitle: a line below the heading, such as the run's name.
        refresh: seconds after which the page reloads itself; 0 for never.
    """

    def __init__(self, title: str, subtitle: str = "", refresh: int = 0) -> None:
        self.title = title
        self.subtitle = subtitle
        self.refresh = refresh
        self.blocks: list[Block] = []
        self.has_plot_note = False

    def verdict(self, text: str, state: Literal["done", "running", "failed"] = "done") -> Report:
        """Append the run's summary, a sentence or two in large type and in the colour of `state`."""
        return self.add("verdict", text, state)

    def heading(self, text: str) -> Report:
        """Append a second-level heading to the page."""
        return self.add("heading", text)

    def text(self, markdown: str) -> Report:
        """Append paragraphs of text to the page, separated by blank lines.

        The only markup is `- ` for lists, `**bold**` and backticks.
        """
        return self.add("text", markdown)

    def facts(self, facts: Sequence[tuple[str, Sequence[Fact]]]) -> Report:
        """Append a definition list of (term, explanations) to the page, with one line per explanation."""
        return self.add("facts", facts)

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Any]], name: str) -> Report:
        """Append a table to the page, which scrolls horizontally on a narrow screen.

        Args:
            headers: one per column.
            rows: cells. Strings are left-aligned and keep their line breaks. Anything else is formatted as a number
                and right-aligned.
            name: label for screen readers, unique on the page.

        Raises:
            ValueError: the number of cells in a row is not that of the headers.
        """
        for row in rows:
            if len(row) != len(headers):
                raise ValueError(f"a row of {len(row)} cells under {len(headers)} headers")
        numbers = [i for i in range(len(headers)) if rows and all(not isinstance(row[i], str) for row in rows)]
        return self.add("table", name, headers, numbers, rows)

    def draw(self, build_figure: Callable[[], Figure], caption: str, alt: str) -> Report:
        """Append a matplotlib plot to the page, or its alt text if matplotlib is not installed.

        Args:
            build_figure: draws the figure, see `align.report.plots`.
            caption, alt: see `plot`.
        """
        if not find_missing_modules("plots"):
            from align.report.plots import render_figure

            return self.plot(render_figure(build_figure(), transparent=True), caption, alt)
        if not self.has_plot_note:
            self.has_plot_note = True
            self.text(
                f"Plots are described in words, since matplotlib is not installed: `{build_install_command('plots')}`"
            )
        return self.add("described_plot", caption, alt)

    def plot(self, image: bytes, caption: str, alt: str) -> Report:
        """Append an embedded SVG image with a caption to the page, or raise ValueError if the alt text is blank.

        Consecutive plots stand side by side on a wide screen.

        Args:
            alt: a description of the plot for screen readers; not empty.
        """
        if not alt.strip():
            raise ValueError(f"the plot {caption!r} has no alt text")
        source = f"data:image/svg+xml;base64,{base64.b64encode(image).decode('ascii')}"
        return self.add("plot", source, caption, alt)

    def add(self, macro: str, *values: Any, template: str = "blocks.html") -> Report:
        """Append the HTML that a Jinja macro renders to the page, if it is not empty.

        Args:
            macro: name of the macro.
            values: arguments of the macro.
            template: file in `templates/`.
        """
        if block := getattr(load_report_templates().get_template(template).module, macro)(*values):
            self.blocks.append(block)
        return self

    def html(self) -> str:
        """Return the whole page as HTML text."""
        template = load_report_templates().get_template("page.html")
        page = template.render(
            policy=POLICY, title=self.title, subtitle=self.subtitle, refresh=self.refresh, blocks=self.blocks
        )
        return f"{page}\n"

    def write(self, path: Path, field: str = "") -> Path:
        """Write the page to a file atomically, replacing an older one, and return the path.

        Args:
            field: the setting that names the file, for a page outside a run's folder. Such a page gets a seal and
                replaces only a page with a valid seal.

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


def shorten_prompt(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Split a conversation for display into `text`, its last turn, `earlier`, a list of (role, text), and a `summary`.

    The earlier turns are shown folded under the summary. Long texts are truncated.
    """
    *earlier, last = messages
    n_system = sum(message["role"] == "system" for message in earlier)
    n_others = len(earlier) - n_system
    system_turn = "system turn" if n_system else ""
    other_turns = pluralize(n_others, "earlier turn") if n_others else ""
    return {
        "summary": " and ".join(filter(None, (system_turn, other_turns))),
        "earlier": [(message["role"], shorten_text(format_turn(message))) for message in earlier],
        "text": shorten_text(format_turn(last)),
    }


def shorten_text(text: str) -> str:
    """Truncate a text to LONGEST_TEXT characters and append its full length. A blank text becomes "(empty)"."""
    if not text.strip():
        return "(empty)"
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}… ({len(text):,} characters)"


def split_trained_spans(row: str | Sequence[Part | Mapping[str, Any]]) -> list[tuple[bool, list[Part | str]]]:
    """Group the pieces of a training row into consecutive (is_trained, pieces) spans, to mark the tokens under the
    loss.

    The middle of a long row is left out.

    Args:
        row: pieces, or their JSON form; or a plain text.
    """
    raw_parts = [Part(row, trained=False, special=False)] if isinstance(row, str) else row
    parts = [part if isinstance(part, Part) else Part(**part) for part in raw_parts]
    spans = groupby(truncate_middle(parts, LONGEST_TEXT), lambda piece: isinstance(piece, Part) and piece.trained)
    return [(is_trained, list(span)) for is_trained, span in spans]


def truncate_middle(parts: Sequence[Part], max_characters: int) -> Iterator[Part | str]:
    """Yield the pieces of a training row, with the middle replaced by a note if it is longer than `max_characters`."""
    total = sum(len(part.text) for part in parts)
    if total <= max_characters:
        yield from parts
        return
    start = (max_characters + 1) // 2
    stop = total - max_characters // 2
    offset = 0
    for part in parts:
        end = offset + len(part.text)
        if offset < start:
            yield part._replace(text=part.text[: start - offset])
        if offset <= start < end:
            yield f" … {stop - start:,} characters are left out here … "
        if stop < end:
            yield part._replace(text=part.text[max(0, stop - offset) :])
        offset = end


def parse_paragraphs(markdown: str) -> Iterator[tuple[Literal["list", "text"], Any]]:
    """Yield ("list", items) or ("text", paragraph) as HTML for each block of a text between blank lines."""
    for block in re.split(r"\n\s*\n", markdown.strip()):
        lines = [line.strip() for line in block.splitlines()]
        if all(line.startswith("- ") for line in lines):
            yield "list", [convert_markup(line[2:]) for line in lines]
        else:
            yield "text", convert_markup(" ".join(lines))


def convert_markup(text: str) -> Markup:
    """Escape a text, and then convert `**bold**` and backticks in it to HTML."""
    with_code = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", with_code))
