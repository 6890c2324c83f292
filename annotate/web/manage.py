"""The pages of those who run a project: what its votes say, who is in it, how its items are given out, its guidelines.

A Gradio app of its own, beside the annotators' page. Whoever asks is known by their cookie at each event, for a page
that was opened once may ask again when its reader is an admin no more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from datetime import UTC, datetime
from functools import wraps
from html import escape
from typing import Any

import gradio

from align.annotate.accounts import ROLES, Accounts, Person
from align.annotate.store import Settings, Store, configure, publish_guidelines
from align.annotate.store.projects import ORDERS, STATES, guidelines_of, settings_of, state_of
from align.annotate.web.dashboard import figures_page
from align.annotate.web.templating import WORDS, render_table
from align.core.errors import InputError, require
from align.web.auth import Authenticator

MANAGE_HEAD = """<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="/align/manage.css">"""
OUT = "out"
"""The choice that takes somebody out of a project, where a role may be chosen."""
SETTINGS = tuple(field.name for field in fields(Settings))


class Manager:
    """What the pages ask of a store, for whoever may. Gradio calls each endpoint as its method is called.

    Args:
        accounts: None where there are none, for one person has the link.
        url: of the server, as people are told it.
    """

    def __init__(self, store: Store, accounts: Accounts | None, authenticator: Authenticator[Person], url: str) -> None:
        self.store = store
        self.accounts = accounts
        self.authenticator = authenticator
        self.url = url

    def require_role(self, request: gradio.Request, project: str, role: str) -> Person:
        """Return the visitor. Raises an error that the page shows unless they have the role."""
        person = self.authenticator.who(dict(request.cookies))
        if person is None or not person.may(project, role):
            raise gradio.Error(WORDS["not_yours"], print_exception=False)
        return person

    def is_admin(self, request: gradio.Request, project: str) -> bool:
        """Return whether the visitor is an admin. The page is loaded for all who may open it."""
        person = self.authenticator.who(dict(request.cookies))
        return person is not None and person.may(project, "admin")

    def projects(self, request: gradio.Request) -> Any:
        """List the projects of which the visitor sees more than the items."""
        person = self.authenticator.who(dict(request.cookies))
        mine = [] if person is None else [name for name in person.roles if person.may(name, "reviewer")]
        asked = request.query_params.get("project", "")
        return gradio.Dropdown(choices=mine, value=asked if asked in mine else next(iter(mine), None))

    def figures(self, project: str, request: gradio.Request) -> str:
        self.require_role(request, project, "reviewer")
        return figures_page(self.store, project)

    def tabs(self, project: str, request: gradio.Request) -> list[Any]:
        """Show the tabs for admins to them."""
        admin = self.is_admin(request, project)
        return [gradio.Tab(visible=admin and self.accounts is not None), gradio.Tab(visible=admin)]

    # The project

    def project(self, project: str, request: gradio.Request) -> list[Any]:
        """Return state, guidelines, and the settings in their order; nothing for who may not see them."""
        if not self.is_admin(request, project):
            return [gradio.skip()] * (2 + len(SETTINGS))
        with self.store.reading() as db:
            settings = settings_of(db, project)
            state = state_of(db, project)
            text = guidelines_of(db, project)
        values = asdict(settings) | {"attributes": ", ".join(settings.attributes)}
        return [state, "" if text is None else text[1], *(values[name] for name in SETTINGS)]

    def save(self, project: str, state: str, request: gradio.Request, *values: Any) -> list[Any]:
        """Keep settings and state. Returns them as they are then."""
        self.require_role(request, project, "admin")
        given = dict(zip(SETTINGS, values, strict=True))
        given["attributes"] = [name for part in given["attributes"].split(",") if (name := part.strip())]
        configure(self.store, project, given, state)
        gradio.Info(WORDS["saved"])
        [state, _, *settings] = self.project(project, request)
        return [state, *settings]

    def publish(self, project: str, text: str, request: gradio.Request) -> None:
        self.require_role(request, project, "admin")
        gradio.Info(WORDS["published"].format(version=publish_guidelines(self.store, project, text)))


class Members:
    """Who is in a project, for its admins. Gradio calls each endpoint as its method is called."""

    def __init__(self, manager: Manager, accounts: Accounts) -> None:
        self.manager = manager
        self.accounts = accounts

    def overview(self, project: str, request: gradio.Request) -> list[Any]:
        """Return who is in it, the links that are out, and the choice of one; nothing for who may not see them."""
        if not self.manager.is_admin(request, project):
            return [gradio.skip()] * 3
        rows = [[name, WORDS[f"role_{role}"]] for name, role in self.accounts.members(project).items()]
        people = render_table(WORDS["people"], [WORDS["name"], WORDS["role"]], rows)
        links = self.accounts.pending(project)
        out = [
            [
                link.name or WORDS["link_anybody"],
                WORDS[f"role_{link.role}"],
                link.made_by or WORDS["link_operator"],
                datetime.fromtimestamp(link.expires_at, UTC).strftime("%Y-%m-%d %H:%M UTC"),
                link.id,
            ]
            for link in links
        ]
        heads = [WORDS[f"link_{column}"] for column in ("name", "role", "by", "until", "id")]
        pending = render_table(WORDS["links"], heads, out)
        return [people, pending, gradio.Dropdown([link.id for link in links], value=None)]

    def invite(self, project: str, role: str, name: str, request: gradio.Request) -> list[Any]:
        by = self.manager.require_role(request, project, "admin")
        link = f"{self.manager.url}/invite?token={self.accounts.invite(project, role, name.strip(), by=by)}"
        return [link, *self.overview(project, request)]

    def revoke(self, project: str, link: str | None, request: gradio.Request) -> list[Any]:
        self.manager.require_role(request, project, "admin")
        require(bool(link), "link", "", "none was chosen", "Choose one of the list.")
        self.accounts.revoke(project, link or "")
        return self.overview(project, request)

    def change(self, project: str, name: str, role: str, request: gradio.Request) -> list[Any]:
        self.manager.require_role(request, project, "admin")
        self.accounts.set_role(project, name, None if role == OUT else role)
        return self.overview(project, request)


def errors_in_page(act: Callable[..., Any]) -> Callable[..., Any]:
    """Turn an error of ours into one that Gradio shows, its text as text."""

    @wraps(act)
    def acting(*given: Any, **named: Any) -> Any:
        try:
            return act(*given, **named)
        except InputError as error:
            label = WORDS.get(f"setting_{error.field}") or WORDS.get(error.field) or error.field
            value = str(error.value) if len(str(error.value)) <= 80 else f"{str(error.value)[:79]}…"
            message = f"{label}: {value}: {error.problem}. {error.remedy}"
            raise gradio.Error(escape(message), duration=None, print_exception=False) from error

    return acting


def manage_page(manager: Manager) -> gradio.Blocks:
    with gradio.Blocks(title=f"align: {WORDS['manage']}", analytics_enabled=False, fill_width=True) as blocks:
        gradio.HTML(f'<h1>{WORDS["manage"]}</h1><p><a href="/">{WORDS["to_items"]}</a></p>')
        project = gradio.Dropdown(label=WORDS["project"], allow_custom_value=True)
        with gradio.Tab(WORDS["figures"]):
            again = gradio.Button(WORDS["refresh"])
            drawn = gradio.HTML()
            for event in (project.change, again.click):
                event(errors_in_page(manager.figures), project, drawn)
        with gradio.Tab(WORDS["people"], visible=False) as people:
            if manager.accounts is not None:
                people_tab(Members(manager, manager.accounts), project)
        with gradio.Tab(WORDS["project"], visible=False) as settings:
            project_tab(manager, project)
        project.change(manager.tabs, project, [people, settings])
        blocks.load(manager.projects, outputs=project)
    return blocks


def people_tab(members: Members, project: gradio.Dropdown) -> None:
    roles = [(WORDS[f"role_{role}"], role) for role in ROLES]
    everyone = gradio.HTML()
    gradio.Markdown(f"## {WORDS['invite']}\n{WORDS['invite_told']}")
    with gradio.Row():
        name = gradio.Textbox(label=WORDS["name_for"], max_length=100)
        role = gradio.Dropdown(roles, value="annotator", label=WORDS["role"])
    invite = gradio.Button(WORDS["invite"])
    link = gradio.Textbox(label=WORDS["link"], interactive=False, buttons=["copy"])
    links = gradio.HTML()
    one = gradio.Dropdown(label=WORDS["link_id"], allow_custom_value=True)  # so that ours is the check
    revoke = gradio.Button(WORDS["revoke"])
    gradio.Markdown(f"## {WORDS['change_role']}")
    with gradio.Row():
        who = gradio.Textbox(label=WORDS["name"], max_length=100)
        to = gradio.Dropdown([*roles, (WORDS["take_out"], OUT)], value="annotator", label=WORDS["role"])
    change = gradio.Button(WORDS["change_role"])
    listed = [everyone, links, one]
    project.change(errors_in_page(members.overview), project, listed)
    invite.click(errors_in_page(members.invite), [project, role, name], [link, *listed])
    revoke.click(errors_in_page(members.revoke), [project, one], listed)
    change.click(errors_in_page(members.change), [project, who, to], listed)


def project_tab(manager: Manager, project: gradio.Dropdown) -> None:
    state = gradio.Radio([(WORDS[f"state_{name}"], name) for name in STATES], label=WORDS["state"])
    with gradio.Row():
        settings = [setting(name, getattr(Settings(), name)) for name in SETTINGS]
    gradio.Button(WORDS["save"]).click(errors_in_page(manager.save), [project, state, *settings], [state, *settings])
    text = gradio.Textbox(label=WORDS["guidelines_text"], lines=12)
    gradio.Button(WORDS["publish"]).click(errors_in_page(manager.publish), [project, text])
    project.change(errors_in_page(manager.project), project, [state, text, *settings])


def setting(name: str, default: Any) -> Any:
    """Return the field of a setting, by the type of its default."""
    label = WORDS[f"setting_{name}"]
    if isinstance(default, bool):
        return gradio.Checkbox(label=label, min_width=320)
    if isinstance(default, int | float):
        return gradio.Number(label=label, precision=0 if isinstance(default, int) else None, min_width=320)
    if name == "order":
        return gradio.Dropdown([(WORDS[f"order_{order}"], order) for order in ORDERS], label=label, min_width=320)
    return gradio.Textbox(label=label, min_width=320)
