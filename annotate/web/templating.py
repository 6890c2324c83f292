"""The templates of the pages, which escape every value, and the texts of the interface."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from align.report.page import create_template_environment
from align.web.credentials import MIN_PASSWORD_LENGTH

STATIC = Path(__file__).parent / "static"
UI_TEXTS: dict[str, str] = json.loads((STATIC / "strings.json").read_text(encoding="utf-8"))


@cache
def load_templates() -> Environment:
    environment = create_template_environment(Path(__file__).parent / "templates")
    environment.globals |= {"words": UI_TEXTS, "shortest_password": MIN_PASSWORD_LENGTH}
    return environment


def render(template: str, **values: Any) -> Markup:
    return Markup(load_templates().get_template(template).render(**values))


def render_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    return load_templates().get_template("table.html").module.table(title, headers, rows)  # pyright: ignore
