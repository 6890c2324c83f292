"""Rendering of the registry's Jinja templates, in which every value is escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment
from markupsafe import Markup

from align.registry import formatting
from align.registry.record import describe_alteration
from align.report.page import TEMPLATES as REPORT_TEMPLATES
from align.report.page import create_template_environment


@cache
def get_template_environment() -> Environment:
    """Return the cached Jinja environment of the registry's templates, with the filters and functions that they
    call."""
    environment = create_template_environment(Path(__file__).parent / "templates", REPORT_TEMPLATES)
    environment.filters["clean"] = formatting.clean_text
    environment.globals |= {
        "view_url": build_view_url,
        "altered_in": describe_alteration,
        "age": formatting.format_age,
        "base_of": formatting.format_base,
        "method_in": formatting.format_method,
        "data_in": formatting.format_data,
        "kl_in": formatting.format_kl,
        "parents_in": formatting.format_parents,
    }
    return environment


def render(template: str, **values: Any) -> Markup:
    """Render a template from `templates/` to HTML, with `values` escaped unless they are Markup."""
    return Markup(get_template_environment().get_template(template).render(**values))


def render_alert(text: str) -> Markup:
    return get_template_environment().get_template("pieces.html").module.alert(text)  # pyright: ignore[reportAttributeAccessIssue]


def build_view_url(view: str, **query: Any) -> str:
    """Return the query string that opens a view of the registry's page, such as `?view=run&run=ppo%3Afirst`.

    A list repeats its name. None and empty values are left out.
    """
    parameters = {name: value for name, value in query.items() if value not in (None, "", [])}
    return f"?{urlencode({'view': view, **parameters}, doseq=True)}"
