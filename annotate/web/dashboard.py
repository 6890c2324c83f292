"""A project's figures for reviewers and admins: HTML for the managers' page, and files for download."""

from __future__ import annotations

import base64
import threading
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from align.annotate.accounts import Person
from align.annotate.figures import build_people_csv, compute_figures, plots
from align.annotate.figures.alarms import ALARMS, AnnotatorAssessment
from align.annotate.store import Store
from align.annotate.web.access import MANAGE
from align.annotate.web.templating import UI_TEXTS, render, render_table
from align.report import note_small_sample

PLOTS = ("per_day", "seconds", "position", "length")
PERSON_COLUMNS = (
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
ASSESSMENT_COLUMNS = ("rankings", "accuracy", "first", "ties", "alarms")
MAX_DISAGREEMENTS = 200
"""Maximum disagreements on the page; the JSON has all."""
PLOT_LOCK = threading.Lock()
"""Lock that is held while plotting, because matplotlib's settings are global."""


def build_figure_routes(store: Store) -> APIRouter:
    """Return the routes by which reviewers download a project's figures as JSON and its annotators' as CSV."""
    router = APIRouter(prefix=MANAGE)

    def check_reviewer(request: Request, project: str) -> None:
        person: Person = request.scope["person"]
        if not person.has_role(project, "reviewer"):
            raise HTTPException(403, "this is for reviewers and admins of the project")

    @router.get("/figures.json", dependencies=[Depends(check_reviewer)])
    def get_figures(project: str) -> Response:
        return JSONResponse(compute_figures(store, project))

    @router.get("/people.csv", dependencies=[Depends(check_reviewer)])
    def get_people_csv(project: str) -> Response:
        headers = {"content-disposition": 'attachment; filename="people.csv"'}
        return Response(build_people_csv(store, project), media_type="text/csv; charset=utf-8", headers=headers)

    return router


def render_figures(store: Store, project: str) -> str:
    """Compute a project's figures, and return them as HTML: tables, plots, disagreements and links to downloads."""
    project_figures = compute_figures(store, project)
    with PLOT_LOCK:
        images = {UI_TEXTS[f"plot_{name}"]: getattr(plots, f"plot_{name}")(project_figures) for name in PLOTS}
    return render(
        "figures.html",
        figures=build_figure_rows(project_figures),
        downloads=[
            (UI_TEXTS[f"file_{name}"], f"{MANAGE}/{file}?project={quote(project)}")
            for name, file in (("json", "figures.json"), ("csv", "people.csv"))
        ],
        plots=[(alt, f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}") for alt, svg in images.items()],
        people_headers=[
            UI_TEXTS["name"],
            UI_TEXTS["pseudonym"],
            *(UI_TEXTS[f"person_{name}"] for name in PERSON_COLUMNS),
        ],
        people=[build_person_row(row) for row in project_figures["people"]],
        disagreements=[
            [row["item"], str(row["contradictions"]), ", ".join(vote["annotator"] for vote in row["votes"])]
            for row in project_figures["disagreements"][:MAX_DISAGREEMENTS]
        ],
    )


def render_assessments(assessments: Sequence[AnnotatorAssessment], identities: Mapping[str, str]) -> str:
    """Return an HTML table of annotators with their traits and alarms.

    Args:
        identities: name by pseudonym.
    """
    rows = [
        [
            identities.get(assessment.pseudonym, UI_TEXTS["erased"]),
            assessment.pseudonym,
            f"{assessment.rankings:,}",
            *(f"{share:.2f}" for share in (assessment.accuracy, assessment.first_share, assessment.tie_share)),
            "; ".join(f"{ALARMS[alarm.kind]} ({alarm.evidence})" for alarm in assessment.alarms) or UI_TEXTS["none"],
        ]
        for assessment in assessments
    ]
    headers = [UI_TEXTS["name"], UI_TEXTS["pseudonym"]]
    headers += [UI_TEXTS[f"assessment_{column}"] for column in ASSESSMENT_COLUMNS]
    return render_table(UI_TEXTS["annotators"], headers, rows)


def build_figure_rows(project_figures: Mapping[str, Any]) -> list[list[str]]:
    """Return a project's figures, as `compute_figures` gives them, as table rows of label and formatted value."""
    totals = project_figures["totals"]
    agreement = project_figures["agreement"]
    seconds = project_figures["seconds"]
    rows = {
        "rankings": f"{totals['by_people']:,}",
        "simulated": f"{totals['simulated']:,}",
        "done": f"{totals['items_done']:,} / {totals['items']:,}",
        "skips": format_skips(totals["skips"]),
        "ties": format_figure(totals["ties"]),
        "retracted": f"{totals['retracted']:,}",
        "flagged": f"{totals['flagged']:,}",
        "hours": f"{project_figures['hours']['total']:.1f}",
        "seconds": " – ".join(format_figure(seconds[name]) for name in ("lower_quartile", "median", "upper_quartile")),
        "alpha": format_figure(agreement["alpha"]),
        "alpha_strength": format_figure(agreement["alpha_strength"]),
        "raw": format_figure(agreement["raw"]),
        "kappa": "; ".join(format_kappa(pair_agreement) for pair_agreement in agreement["kappas"][:20]),
        "position": format_figure(project_figures["position"]["share"]),
        "length": format_figure(project_figures["length"]["share"]),
    }
    return [[UI_TEXTS[f"figure_{name}"], value or "–"] for name, value in rows.items()]


def build_person_row(row: Mapping[str, Any]) -> list[str]:
    values = dict(row) | {"position": row["position"]["share"], "last": (row["last"] or "–")[:16].replace("T", " ")}
    values["skips"] = format_skips(row["skips"])
    note = f" ({UI_TEXTS['quarantined']})" if row["quarantined"] else ""
    return [
        (row["identity"] or UI_TEXTS["erased"]) + note,
        row["pseudonym"],
        *(format_figure(values[name]) for name in PERSON_COLUMNS),
    ]


def format_figure(value: Mapping[str, Any] | float | str) -> str:
    """Format a figure as text: an estimate with its interval and count, a number, or the reason why it is undefined."""
    if isinstance(value, Mapping):
        interval = "" if value["low"] is None else f" [{value['low']:.2f}, {value['high']:.2f}]"
        return f"{value['value']:.2f}{interval} ({value['n']:,}{note_small_sample(value['n'])})"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def format_kappa(agreement: Mapping[str, Any]) -> str:
    """Format Cohen's kappa of two annotators, with their names and the number of shared items."""
    value = agreement["direction"]
    kappa_text = f"{value:.2f}" if isinstance(value, float) else value
    items = agreement["items"]
    return f"{' – '.join(agreement['annotators'])}: {kappa_text} ({items:,}{note_small_sample(items)})"


def format_skips(skips: Mapping[str, int]) -> str:
    """Format the number of skips by reason as text: the total, and the reasons with their numbers in brackets."""
    reasons = ", ".join(f"{UI_TEXTS[f'skip_{reason}']}: {number}" for reason, number in skips.items() if number)
    return f"{sum(skips.values())}{f' ({reasons})' if reasons else ''}"
