"""The pages for reviewers and admins: figures, members, settings and guidelines of a project.

They are a Gradio app, separate from the annotators' page. The visitor is authenticated by cookie at every event,
because their role may change while a page is open.
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
from align.annotate.figures.alarms import assess_annotators
from align.annotate.figures.project import read_view
from align.annotate.store import ProjectSettings, Store, configure_project, publish_guidelines
from align.annotate.store.ledger import read_quarantined
from align.annotate.store.projects import ORDERS, STATES, read_guidelines, read_settings, read_state
from align.annotate.store.quarantine import quarantine_annotator, release_annotator
from align.annotate.store.vote_selection import read_identities, read_pseudonyms
from align.annotate.web.dashboard import render_assessments, render_figures
from align.annotate.web.templating import UI_TEXTS, render_table
from align.core.errors import InputError, require
from align.web.auth import Authenticator

MANAGE_HEAD = """<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="/align/manage.css">"""
REMOVE = "out"
"""The value in the dropdown of roles that removes a person from the project."""
SETTINGS = tuple(field.name for field in fields(ProjectSettings))


class Manager:
    """Gradio's event handlers for a project's figures, settings, state and guidelines, for reviewers and admins.

    Gradio names each endpoint after its method.

    Args:
        accounts: None if there are no accounts and one person uses a link with a key.
        url: public URL of the server.
    """

    def __init__(self, store: Store, accounts: Accounts | None, authenticator: Authenticator[Person], url: str) -> None:
        self.store = store
        self.accounts = accounts
        self.authenticator = authenticator
        self.url = url

    def require_role(self, request: gradio.Request, project: str, role: str) -> Person:
        """Return the visitor, or raise a Gradio error, which the page shows, if they lack a role in a project."""
        person = self.authenticator.find_visitor(dict(request.cookies))
        if person is None or not person.has_role(project, role):
            raise gradio.Error(UI_TEXTS["not_yours"], print_exception=False)
        return person

    def is_admin(self, request: gradio.Request, project: str) -> bool:
        """Return whether the visitor is an admin of the project."""
        person = self.authenticator.find_visitor(dict(request.cookies))
        return person is not None and person.has_role(project, "admin")

    def projects(self, request: gradio.Request) -> Any:
        """Return the Gradio dropdown of the projects in which the visitor is a reviewer or admin."""
        person = self.authenticator.find_visitor(dict(request.cookies))
        managed_projects = (
            [] if person is None else [name for name in person.roles if person.has_role(name, "reviewer")]
        )
        preselected = request.query_params.get("project", "")
        return gradio.Dropdown(
            choices=managed_projects,
            value=preselected if preselected in managed_projects else next(iter(managed_projects), None),
        )

    def figures(self, project: str, request: gradio.Request) -> str:
        self.require_role(request, project, "reviewer")
        return render_figures(self.store, project)

    def tabs(self, project: str, request: gradio.Request) -> list[Any]:
        """Return Gradio updates that show the tabs of members and settings and the fields for quarantine to an admin,
        and hide them from others."""
        is_admin = self.is_admin(request, project)
        return [
            gradio.Tab(visible=is_admin and self.accounts is not None),
            gradio.Tab(visible=is_admin),
            gradio.Row(visible=is_admin),
        ]

    # Alarms

    def annotators(self, project: str, request: gradio.Request) -> list[Any]:
        """Return an empty table of alarms, and a dropdown of all annotators of the project."""
        self.require_role(request, project, "reviewer")
        return ["", self.build_annotator_choice(project)]

    def build_annotator_choice(self, project: str) -> gradio.Dropdown:
        with self.store.reading() as db:
            names = read_identities(db, project)
            quarantined = read_quarantined(db, project)
            pseudonyms = sorted(set(read_pseudonyms(db, project).values()))
        choices = []
        for pseudonym in pseudonyms:
            note = f", {UI_TEXTS['quarantined']}" if pseudonym in quarantined else ""
            choices.append((f"{names.get(pseudonym, UI_TEXTS['erased'])} ({pseudonym}{note})", pseudonym))
        return gradio.Dropdown(choices, value=None)

    def alarms(self, project: str, request: gradio.Request) -> str:
        """Return an HTML table of the annotators' traits and alarms.

        It fits the model of annotators to all rankings, which takes seconds to minutes.
        """
        self.require_role(request, project, "reviewer")
        view = read_view(self.store, project)
        return render_assessments(assess_annotators(view), view.identities)

    def quarantine(self, project: str, annotator: str | None, request: gradio.Request) -> Any:
        self.require_role(request, project, "admin")
        quarantine_annotator(self.store, project, str(annotator or ""))
        gradio.Info(UI_TEXTS["is_quarantined"])
        return self.build_annotator_choice(project)

    def release(self, project: str, annotator: str | None, request: gradio.Request) -> Any:
        self.require_role(request, project, "admin")
        release_annotator(self.store, project, str(annotator or ""))
        gradio.Info(UI_TEXTS["is_released"])
        return self.build_annotator_choice(project)

    # The project

    def project(self, project: str, request: gradio.Request) -> list[Any]:
        """Return a project's state, guidelines and settings for the page's fields, or no updates for a non-admin."""
        if not self.is_admin(request, project):
            return [gradio.skip()] * (2 + len(SETTINGS))
        with self.store.reading() as db:
            settings = read_settings(db, project)
            state = read_state(db, project)
            published = read_guidelines(db, project)
        values = asdict(settings) | {"attributes": ", ".join(settings.attributes)}
        return [state, "" if published is None else published.text, *(values[name] for name in SETTINGS)]

    def save(self, project: str, state: str, request: gradio.Request, *values: Any) -> list[Any]:
        """Save a project's settings and state, and return the saved values for the page's fields.

        Raises a Gradio error if the visitor is not an admin.

        Args:
            values: of the settings, in the order of `SETTINGS`.
        """
        self.require_role(request, project, "admin")
        new_settings = dict(zip(SETTINGS, values, strict=True))
        new_settings["attributes"] = [name for part in new_settings["attributes"].split(",") if (name := part.strip())]
        configure_project(self.store, project, new_settings, state)
        gradio.Info(UI_TEXTS["saved"])
        [state, _, *settings] = self.project(project, request)
        return [state, *settings]

    def publish(self, project: str, text: str, request: gradio.Request) -> None:
        self.require_role(request, project, "admin")
        gradio.Info(UI_TEXTS["published"].format(version=publish_guidelines(self.store, project, text)))


class Members:
    """Gradio's event handlers by which admins manage a project's members and invitations.

    Gradio names each endpoint after its method.
    """

    def __init__(self, manager: Manager, accounts: Accounts) -> None:
        self.manager = manager
        self.accounts = accounts

    def overview(self, project: str, request: gradio.Request) -> list[Any]:
        """Return HTML tables of a project's members and pending invitations, and a dropdown of the invitations' ids.

        Updates nothing on the page if the visitor is not an admin.
        """
        if not self.manager.is_admin(request, project):
            return [gradio.skip()] * 3
        rows = [[name, UI_TEXTS[f"role_{role}"]] for name, role in self.accounts.list_members(project).items()]
        members = render_table(UI_TEXTS["people"], [UI_TEXTS["name"], UI_TEXTS["role"]], rows)
        pending_invitations = self.accounts.list_invitations(project)
        invitation_rows = [
            [
                invitation.name or UI_TEXTS["link_anybody"],
                UI_TEXTS[f"role_{invitation.role}"],
                invitation.made_by or UI_TEXTS["link_operator"],
                datetime.fromtimestamp(invitation.expires_at, UTC).strftime("%Y-%m-%d %H:%M UTC"),
                invitation.id,
            ]
            for invitation in pending_invitations
        ]
        headers = [UI_TEXTS[f"link_{column}"] for column in ("name", "role", "by", "until", "id")]
        invitations = render_table(UI_TEXTS["links"], headers, invitation_rows)
        return [
            members,
            invitations,
            gradio.Dropdown([invitation.id for invitation in pending_invitations], value=None),
        ]

    def invite(self, project: str, role: str, name: str, request: gradio.Request) -> list[Any]:
        admin = self.manager.require_role(request, project, "admin")
        link = f"{self.manager.url}/invite?token={self.accounts.invite(project, role, name.strip(), inviter=admin)}"
        return [link, *self.overview(project, request)]

    def revoke(self, project: str, link: str | None, request: gradio.Request) -> list[Any]:
        self.manager.require_role(request, project, "admin")
        require(bool(link), "link", "", "no link was chosen", "Choose one from the list.")
        self.accounts.revoke(project, link or "")
        return self.overview(project, request)

    def change(self, project: str, name: str, role: str, request: gradio.Request) -> list[Any]:
        self.manager.require_role(request, project, "admin")
        self.accounts.set_role(project, name, None if role == REMOVE else role)
        return self.overview(project, request)


def show_errors(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return an endpoint that raises its InputError as a Gradio error, which the page shows. The message is escaped."""

    @wraps(endpoint)
    def call_endpoint(*args: Any, **kwargs: Any) -> Any:
        try:
            return endpoint(*args, **kwargs)
        except InputError as error:
            label = UI_TEXTS.get(f"setting_{error.field}") or UI_TEXTS.get(error.field) or error.field
            value = str(error.value) if len(str(error.value)) <= 80 else f"{str(error.value)[:79]}…"
            message = f"{label}: {value}: {error.problem}. {error.remedy}"
            raise gradio.Error(escape(message), duration=None, print_exception=False) from error

    return call_endpoint


def build_manage_page(manager: Manager) -> gradio.Blocks:
    with gradio.Blocks(title=f"align: {UI_TEXTS['manage']}", analytics_enabled=False, fill_width=True) as blocks:
        gradio.HTML(f'<h1>{UI_TEXTS["manage"]}</h1><p><a href="/">{UI_TEXTS["to_items"]}</a></p>')
        project = gradio.Dropdown(label=UI_TEXTS["project"], allow_custom_value=True)
        with gradio.Tab(UI_TEXTS["figures"]):
            refresh = gradio.Button(UI_TEXTS["refresh"])
            figures = gradio.HTML()
            for event in (project.change, refresh.click):
                event(show_errors(manager.figures), project, figures)
        with gradio.Tab(UI_TEXTS["alarms"]):
            quarantine_row = build_alarms_tab(manager, project)
        with gradio.Tab(UI_TEXTS["people"], visible=False) as people:
            if manager.accounts is not None:
                build_people_tab(Members(manager, manager.accounts), project)
        with gradio.Tab(UI_TEXTS["project"], visible=False) as settings:
            build_project_tab(manager, project)
        project.change(manager.tabs, project, [people, settings, quarantine_row])
        blocks.load(manager.projects, outputs=project)
    return blocks


def build_alarms_tab(manager: Manager, project: gradio.Dropdown) -> gradio.Row:
    """Build the tab of alarms, and return its row of fields for quarantine, which only admins see."""
    gradio.Markdown(UI_TEXTS["alarms_told"])
    assess = gradio.Button(UI_TEXTS["assess"])
    table = gradio.HTML()
    with gradio.Row(visible=False) as quarantine_row:
        # Custom values are allowed so that we validate the value, not Gradio.
        annotator = gradio.Dropdown(label=UI_TEXTS["stage.annotator"], allow_custom_value=True)
        quarantine = gradio.Button(UI_TEXTS["quarantine"])
        release = gradio.Button(UI_TEXTS["release"])
    project.change(show_errors(manager.annotators), project, [table, annotator])
    assess.click(show_errors(manager.alarms), project, table)
    quarantine.click(show_errors(manager.quarantine), [project, annotator], annotator)
    release.click(show_errors(manager.release), [project, annotator], annotator)
    return quarantine_row


def build_people_tab(members: Members, project: gradio.Dropdown) -> None:
    roles = [(UI_TEXTS[f"role_{role}"], role) for role in ROLES]
    member_table = gradio.HTML()
    gradio.Markdown(f"## {UI_TEXTS['invite']}\n{UI_TEXTS['invite_told']}")
    with gradio.Row():
        name = gradio.Textbox(label=UI_TEXTS["name_for"], max_length=100)
        role = gradio.Dropdown(roles, value="annotator", label=UI_TEXTS["role"])
    invite = gradio.Button(UI_TEXTS["invite"])
    link = gradio.Textbox(label=UI_TEXTS["link"], interactive=False, buttons=["copy"])
    invitation_table = gradio.HTML()
    # Custom values are allowed so that we validate the value, not Gradio.
    invitation_choice = gradio.Dropdown(label=UI_TEXTS["link_id"], allow_custom_value=True)
    revoke = gradio.Button(UI_TEXTS["revoke"])
    gradio.Markdown(f"## {UI_TEXTS['change_role']}")
    with gradio.Row():
        member_name = gradio.Textbox(label=UI_TEXTS["name"], max_length=100)
        new_role = gradio.Dropdown([*roles, (UI_TEXTS["take_out"], REMOVE)], value="annotator", label=UI_TEXTS["role"])
    change = gradio.Button(UI_TEXTS["change_role"])
    overview = [member_table, invitation_table, invitation_choice]
    project.change(show_errors(members.overview), project, overview)
    invite.click(show_errors(members.invite), [project, role, name], [link, *overview])
    revoke.click(show_errors(members.revoke), [project, invitation_choice], overview)
    change.click(show_errors(members.change), [project, member_name, new_role], overview)


def build_project_tab(manager: Manager, project: gradio.Dropdown) -> None:
    state = gradio.Radio([(UI_TEXTS[f"state_{name}"], name) for name in STATES], label=UI_TEXTS["state"])
    with gradio.Row():
        settings = [build_setting_field(name, getattr(ProjectSettings(), name)) for name in SETTINGS]
    gradio.Button(UI_TEXTS["save"]).click(show_errors(manager.save), [project, state, *settings], [state, *settings])
    text = gradio.Textbox(label=UI_TEXTS["guidelines_text"], lines=12)
    gradio.Button(UI_TEXTS["publish"]).click(show_errors(manager.publish), [project, text])
    project.change(show_errors(manager.project), project, [state, text, *settings])


def build_setting_field(name: str, default: Any) -> Any:
    """Return the Gradio input component for a project setting, chosen by the type of its default."""
    label = UI_TEXTS[f"setting_{name}"]
    if isinstance(default, bool):
        return gradio.Checkbox(label=label, min_width=320)
    if isinstance(default, int | float):
        return gradio.Number(label=label, precision=0 if isinstance(default, int) else None, min_width=320)
    if name == "order":
        return gradio.Dropdown([(UI_TEXTS[f"order_{order}"], order) for order in ORDERS], label=label, min_width=320)
    return gradio.Textbox(label=label, min_width=320)
