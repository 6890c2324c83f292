"""What the votes of a project say, for reviewers and admins: HTML for the managers' page, and the numbers as files."""

from __future__ import annotations

import base64
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from align.annotate.accounts import Person
from align.annotate.figures import figures, people_csv, plots
from align.annotate.store import Store
from align.annotate.web.access import MANAGE
from align.annotate.web.templating import WORDS, render
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
    """Return the routes of the numbers as JSON, and of a row an annotator as CSV."""
    router = APIRouter(prefix=MANAGE)

    def check_reviewer(request: Request, project: str) -> None:
        person: Person = request.scope["person"]
        if not person.may(project, "reviewer"):
            raise HTTPException(403, "this is for reviewers and admins of the project")

    @router.get("/figures.json", dependencies=[Depends(check_reviewer)])
    def numbers(project: str) -> Response:
        return JSONResponse(figures(store, project))

    @router.get("/people.csv", dependencies=[Depends(check_reviewer)])
    def hours(project: str) -> Response:
        named = {"content-disposition": 'attachment; filename="people.csv"'}
        return Response(people_csv(store, project), media_type="text/csv; charset=utf-8", headers=named)

    return router


def figures_page(store: Store, project: str) -> str:
    """Return all figures of a project as HTML."""
    found = figures(store, project)
    with DRAWING:
        images = {WORDS[f"plot_{name}"]: getattr(plots, name)(found) for name in PLOTS}
    return render(
        "figures.html",
        figures=figure_rows(found),
        downloads=[
            (WORDS[f"file_{name}"], f"{MANAGE}/{file}?project={quote(project)}")
            for name, file in (("json", "figures.json"), ("csv", "people.csv"))
        ],
        plots=[(alt, f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}") for alt, svg in images.items()],
        people_headers=[WORDS["name"], WORDS["pseudonym"], *(WORDS[f"person_{name}"] for name in PEOPLE)],
        people=[person_cells(row) for row in found["people"]],
        disagreements=[
            [row["item"], str(row["contradictions"]), ", ".join(vote["annotator"] for vote in row["votes"])]
            for row in found["disagreements"][:SHOWN]
        ],
    )


def figure_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row a figure of the whole project."""
    totals = found["totals"]
    agreement = found["agreement"]
    seconds = found["seconds"]
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


def person_cells(row: Mapping[str, Any]) -> list[str]:
    values = dict(row) | {"position": row["position"]["share"], "last": (row["last"] or "–")[:16].replace("T", " ")}
    values["skips"] = counted(row["skips"])
    return [row["identity"] or WORDS["erased"], row["pseudonym"], *(in_words(values[name]) for name in PEOPLE)]


def in_words(value: Any) -> str:
    """Describe a figure in words: an estimate with its interval and number, or why there is none."""
    if isinstance(value, Mapping):
        interval = "" if value["low"] is None else f" [{value['low']:.2f}, {value['high']:.2f}]"
        return f"{value['value']:.2f}{interval} ({value['n']:,}{few(value['n'])})"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def kappa(two: Mapping[str, Any]) -> str:
    """Describe the agreement of two annotators."""
    value = two["direction"]
    agreed = f"{value:.2f}" if isinstance(value, float) else value
    return f"{' – '.join(two['annotators'])}: {agreed} ({two['items']:,}{few(two['items'])})"


def counted(skips: Mapping[str, int]) -> str:
    """Say how many were skipped, and why."""
    why = ", ".join(f"{WORDS[f'skip_{reason}']}: {number}" for reason, number in skips.items() if number)
    return f"{sum(skips.values())}{f' ({why})' if why else ''}"
