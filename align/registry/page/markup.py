"""Pieces of HTML that several views show. Every text in them is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from align.registry.record import Record, altered_in
from align.registry.shown import clean
from align.report.page import escape

HTML = str


def address(view: str, **query: Any) -> str:
    """Where a view is, relative to the page; a list is a name several times, and what is None or empty is left out."""
    given = {name: value for name, value in query.items() if value not in (None, "", [])}
    return f"?{urlencode({'view': view, **given}, doseq=True)}"


def link(text: str, href: str, **attributes: str) -> HTML:
    further = "".join(f' {name.strip("_")}="{escape(value)}"' for name, value in attributes.items())
    return f'<a href="{escape(href)}"{further}>{escape(text)}</a>'


def run_link(run: str) -> HTML:
    return link(clean(run, longest=None), address("run", run=run))


def alias_links(aliases: Iterable[str]) -> HTML:
    return " ".join(link(f"@{alias}", address("aliases", alias=alias), class_="alias") for alias in aliases)


def status_mark(record: Mapping[str, Any]) -> HTML:
    """A run's status: a word, and a dot in its colour; and whether it is stale."""
    status = escape(clean(str(record["status"])))
    return f'<span class="status {status}">{status}</span>{stale_mark(record)}'


def stale_mark(record: Mapping[str, Any]) -> HTML:
    """Return the marks of a run that is stale, or whose figures are altered; empty for any other."""
    marks = ("stale" if record.get("stale") else "", "altered" if altered_in(record) else "")
    return "".join(f' <span class="stale">{mark}</span>' for mark in marks if mark)


def interval_mark(record: Record) -> HTML:
    """Where a share and its interval lie between 0 and 1; nothing for other scores."""
    score = record.get("score") or {}
    bounds = [score.get(key) for key in ("value", "low", "high")]
    if not all(isinstance(x, int | float) and 0 <= x <= 1 for x in bounds):
        return ""
    at, left, right = (float(x) * 60 for x in bounds if x is not None)
    return (
        '<svg class="interval" viewBox="0 0 60 10" width="60" height="10" aria-hidden="true">'
        '<path class="whole" d="M0 5H60M30 2V8"/>'
        f'<path class="part" d="M{left:.1f} 5H{right:.1f}"/><circle cx="{at:.1f}" cy="5" r="3"/></svg>'
    )


def table(
    name: str, heads: Sequence[HTML], rows: Iterable[Sequence[HTML]], *, naming: int = 0, shape: str = ""
) -> HTML:
    """Cells and heads are HTML. A region that scrolls is reached by keys.

    Args:
        naming: which cell of a row names it.
        shape: a further class.
    """

    def cell(i: int, value: HTML) -> HTML:
        return f'<th scope="row">{value}</th>' if i == naming else f"<td>{value}</td>"

    head = "".join(one if one.startswith("<th") else f'<th scope="col">{one}</th>' for one in heads)
    body = "".join(f"<tr>{''.join(cell(i, value) for i, value in enumerate(row))}</tr>" for row in rows)
    return (
        f'<div class="scroll {shape}" role="region" tabindex="0" aria-label="{escape(name)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def alert(text: str) -> HTML:
    return f'<p class="alert" role="alert">{escape(text)}</p>'
