"""The pages at the door: log in, accept an invitation, set another password, leave. Plain forms, without a script."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from align.annotate.accounts import SESSION_S, Accounts, Invitation, Person
from align.annotate.web.templating import WORDS, render
from align.core.errors import InputError, StorageError
from align.web.credentials import Refused, session_cookie
from align.web.throttle import Busy


async def form_fields(request: Request) -> dict[str, str]:
    """Return what a form of ours says."""
    form = await request.form(max_files=0, max_fields=10)
    return {name: value for name, value in form.items() if isinstance(value, str)}


Given = Annotated[dict[str, str], Depends(form_fields)]


def login_routes(accounts: Accounts, cookie: str) -> APIRouter:
    """Return the routes, for people with accounts.

    Args:
        cookie: the name of the session's.
    """
    router = APIRouter()

    @router.get("/login")
    def login_page(request: Request, invite: str = "", project: str = "") -> Response:
        if request.scope["person"] is not None:
            return go(redirect_target(invite, project))
        return page("login", "log_in", invite=invite, project=project, name="")

    @router.post("/login")
    def log_in(request: Request, given: Given) -> Response:
        invite = given.get("invite", "")
        project = given.get("project", "")
        name = given.get("name", "")
        address = request.client.host if request.client else ""
        try:
            session = accounts.log_in(name, given.get("password", ""), address)
        except InputError as error:
            return page("login", "log_in", error, invite=invite, project=project, name=name)
        return go(redirect_target(invite, project), session_cookie(cookie, session, request.scope["origin"], SESSION_S))

    @router.post("/logout")
    def log_out(request: Request, given: Given) -> Response:
        accounts.log_out(request.cookies.get(cookie, ""))
        to = f"/invite?token={quote(invite)}" if (invite := given.get("invite", "")) else "/login"
        return go(to, session_cookie(cookie, "", request.scope["origin"], 0))

    @router.get("/invite")
    def invitation_page(request: Request, token: str = "") -> Response:
        invitation = accounts.invited(token)
        if invitation is None:
            refusal = Refused("token", "(not shown)", WORDS["no_invitation"], WORDS["ask_again"])
            return invitation_page_of(None, token, None, error=refusal)
        return invitation_page_of(invitation, token, request.scope["person"])

    @router.post("/invite")
    def accept(request: Request, given: Given) -> Response:
        token = given.get("token", "")
        name = given.get("name", "")
        person: Person | None = request.scope["person"]
        invitation = accounts.invited(token)
        try:
            if "join" in given and person is not None:
                accounts.join(token, person)
                return go("/")
            session = accounts.accept(token, name, new_password(given))
        except InputError as error:
            return invitation_page_of(invitation, token, person, name, error)
        return go("/", session_cookie(cookie, session, request.scope["origin"], SESSION_S))

    @router.get("/password")
    def password_page() -> Response:
        return page("password", "change_password")

    @router.post("/password")
    def change_password(request: Request, given: Given) -> Response:
        try:
            accounts.change_password(request.cookies.get(cookie, ""), given.get("old", ""), new_password(given))
        except InputError as error:
            return page("password", "change_password", error)
        return go("/")

    return router


def go(to: str, cookie: str | None = None) -> Response:
    """Send the browser to another page, with a cookie to keep or to forget."""
    return RedirectResponse(to, 303, headers=None if cookie is None else {"set-cookie": cookie})


def new_password(given: dict[str, str]) -> str:
    """Return the new password of a form. Raises InputError if it was not typed the same twice."""
    password = given.get("password", "")
    if password != given.get("again", ""):
        raise InputError("password", "(not shown)", "the two passwords differ", "Type the same one twice.")
    return password


def page(template: str, title: str, error: InputError | None = None, **values: Any) -> Response:
    """Return a page with the error, if there is one, over its form.

    Args:
        title: a key of `WORDS`.
    """
    if isinstance(error, StorageError) and not isinstance(error, Busy):
        raise error  # which the app explains, to strangers without what the database says
    status = 200 if error is None else 403 if isinstance(error, Refused) else 503 if isinstance(error, Busy) else 422
    problem = message_of(error) if error else ""
    return HTMLResponse(render(f"{template}.html", title=WORDS[title], problem=problem, **values), status)


def invitation_page_of(
    invitation: Invitation | None, token: str, person: Person | None, name: str = "", error: InputError | None = None
) -> Response:
    """Return the page that makes an account, sets its password, or joins a project. Without an invitation it shows the
    error alone."""
    greeting = ""
    if invitation is not None:
        kind = "resets" if invitation.known and invitation.resets else "invited"
        role = WORDS[f"role_{invitation.role}"]
        greeting = WORDS[kind].format(project=invitation.project, role=role, name=invitation.name)
    values = {"invitation": invitation, "token": token, "person": person, "name": name, "greeting": greeting}
    return page("invitation", "invitation", error, **values)


def message_of(error: InputError) -> str:
    """Return an error's text with the field, and its value if that is no secret."""
    value = error.value if isinstance(error.value, str) and error.value != "(not shown)" else ""
    named = f"{WORDS.get(error.field, error.field)}: " if not isinstance(error, Refused) else ""
    return f"{named}{f'{value[:80]}: ' if named and value else ''}{error.problem}. {error.remedy}"


def redirect_target(invite: str, project: str) -> str:
    """Return where somebody goes who has logged in: to the invitation that they came with, or to the items."""
    return f"/invite?token={quote(invite)}" if invite else f"/?project={quote(project, safe='')}" if project else "/"
