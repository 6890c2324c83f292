"""What the votes of a project say, for reviewers and admins: a tab of the managers' page, and the numbers as files."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import gradio
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from align.annotate.accounts import Person
from align.annotate.figures import figures, people_csv, plots
from align.annotate.store import Store
from align.annotate.web.access import MANAGE
from align.annotate.web.templating import render
from align.annotate.web.words import WORDS
from align.report import few

PLOTS = ("per_day", "seconds", "position", "length")
PEOPLE = (
    "rankings",
    "skips",
    "retracted",
    "flagged",
    "ties",
    "seconds",
    "hours",
    "gold",
    "repeats",
    "position",
    "last",
)
SHOWN = 200
"""Disagreements on the page; the JSON has all."""
DRAWING = threading.Lock()
"""matplotlib's settings are the process's."""


def files(store: Store) -> APIRouter:
    """The numbers as JSON, and a row an annotator as CSV."""
    router = APIRouter(prefix=MANAGE)

    def allowed(request: Request, project: str) -> None:
        person: Person = request.scope["person"]
        if not person.may(project, "reviewer"):
            raise HTTPException(403, "this is for reviewers and admins of the project")

    @router.get("/figures.json")
    def numbers(request: Request, project: str) -> Response:
        allowed(request, project)
        return JSONResponse(figures(store, project))

    @router.get("/people.csv")
    def hours(request: Request, project: str) -> Response:
        allowed(request, project)
        named = {"content-disposition": 'attachment; filename="people.csv"'}
        return Response(people_csv(store, project), media_type="text/csv; charset=utf-8", headers=named)

    return router


def figures_page(store: Store, project: str) -> str:
    """Return all figures of a project as HTML."""
    found = figures(store, project)
    with DRAWING:
        images = {WORDS[f"plot_{name}"]: getattr(plots, name)(found, transparent=True) for name in PLOTS}
    return render(
        "figures.html",
        figures=about(found),
        downloads=[
            (WORDS[f"file_{name}"], f"{MANAGE}/{file}?project={quote(project)}")
            for name, file in (("json", "figures.json"), ("csv", "people.csv"))
        ],
        plots=[(alt, f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}") for alt, svg in images.items()],
        people_headers=[WORDS["name"], WORDS["pseudonym"], *(WORDS[f"person_{name}"] for name in PEOPLE)],
        people=[person(row) for row in found["people"]],
        disagreements=[contradicted(row) for row in found["disagreements"][:SHOWN]],
    )


def about(found: Mapping[str, Any]) -> list[list[str]]:
    """A row a figure of the whole project."""
    totals, agreement, seconds = found["totals"], found["agreement"], found["seconds"]
    rows = {
        "rankings": f"{totals['by_people']:,}",
        "simulated": f"{totals['simulated']:,}",
        "done": f"{totals['items_done']:,} / {totals['items']:,}",
        "skips": counted(totals["skips"]),
        "ties": in_words(totals["ties"]),
        "retracted": f"{totals['retracted']:,}",
        "flagged": f"{totals['flagged']:,}",
        "hours": f"{found['hours']['total']:.1f}",
        "seconds": " – ".join(in_words(seconds[name]) for name in ("lower_quartile", "median", "upper_quartile")),
        "alpha": in_words(agreement["alpha"]),
        "alpha_strength": in_words(agreement["alpha_strength"]),
        "raw": in_words(agreement["raw"]),
        "kappa": "; ".join(kappa(two) for two in agreement["kappas"][:20]),
        "position": in_words(found["position"]["share"]),
        "length": in_words(found["length"]["share"]),
    }
    return [[WORDS[f"figure_{name}"], value or "–"] for name, value in rows.items()]


def person(row: Mapping[str, Any]) -> list[str]:
    values = dict(row) | {"position": row["position"]["share"], "last": (row["last"] or "–")[:16].replace("T", " ")}
    values["skips"] = counted(row["skips"])
    return [row["identity"] or WORDS["erased"], row["pseudonym"], *(in_words(values[name]) for name in PEOPLE)]


def contradicted(row: Mapping[str, Any]) -> list[str]:
    return [row["item"], str(row["contradictions"]), ", ".join(vote["annotator"] for vote in row["votes"])]


def in_words(value: Any) -> str:
    """A figure in words: an estimate with its interval and number, or why there is none."""
    if isinstance(value, Mapping):
        interval = "" if value["low"] is None else f" [{value['low']:.2f}, {value['high']:.2f}]"
        return f"{value['value']:.2f}{interval} ({value['n']:,}{few(value['n'])})"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def kappa(two: Mapping[str, Any]) -> str:
    """Of two annotators."""
    value, items = two["direction"], two["items"]
    agreed = f"{value:.2f}" if isinstance(value, float) else value
    return f"{' – '.join(two['annotators'])}: {agreed} ({items:,}{few(items)})"


def counted(skips: Mapping[str, int]) -> str:
    """How many, and why."""
    why = ", ".join(f"{WORDS[f'skip_{reason}']}: {number}" for reason, number in skips.items() if number)
    return f"{sum(skips.values())}{f' ({why})' if why else ''}"


def dashboard_tab(read: Callable[..., str], project: gradio.Dropdown) -> None:
    """The tab; `read` gives what `figures_page` does for a project, to whoever may see it."""
    again = gradio.Button(WORDS["refresh"])
    drawn = gradio.HTML()
    for event in (project.change, again.click):
        event(read, project, drawn)
