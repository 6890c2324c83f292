"""The pages at the door: log in, accept an invitation, set another password, leave. Plain forms, without a script."""

from __future__ import annotations

from html import escape
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from align.annotate.accounts import SESSION_S, Accounts, Invitation, Person
from align.annotate.web.words import WORDS
from align.errors import InputError, StorageError
from align.web.credentials import SHORTEST_PASSWORD, Refused, session_cookie
from align.web.fair_queue import Busy

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>align: {title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="stylesheet" href="/align/app.css">
</head><body class="entrance"><main id="align-app"><h1>{title}</h1>{problem}{content}</main></body></html>"""


async def fields(request: Request) -> dict[str, str]:
    """What a form of ours says."""
    form = await request.form(max_files=0, max_fields=10)
    return {name: value for name, value in form.items() if isinstance(value, str)}


Given = Annotated[dict[str, str], Depends(fields)]


def login_routes(accounts: Accounts, cookie: str) -> APIRouter:
    """The routes, for people with accounts.

    Args:
        cookie: the name of the session's.
    """
    router = APIRouter()
    for add in (add_login, add_invitation, add_password):
        add(router, accounts, cookie)
    return router


def add_login(router: APIRouter, accounts: Accounts, cookie: str) -> None:
    @router.get("/login")
    def login_page(request: Request, invite: str = "", project: str = "") -> Response:
        known = request.scope["person"] is not None
        return go(redirect_target(invite, project)) if known else page("log_in", login_form(invite, project))

    @router.post("/login")
    def log_in(request: Request, given: Given) -> Response:
        invite, project = given.get("invite", ""), given.get("project", "")
        address = request.client.host if request.client else ""
        try:
            session = accounts.log_in(given.get("name", ""), given.get("password", ""), address)
        except InputError as error:
            return page("log_in", login_form(invite, project, given.get("name", "")), error)
        return go(redirect_target(invite, project), session_cookie(cookie, session, request.scope["origin"], SESSION_S))

    @router.post("/logout")
    def log_out(request: Request, given: Given) -> Response:
        accounts.log_out(request.cookies.get(cookie, ""))
        to = f"/invite?token={quote(invite)}" if (invite := given.get("invite", "")) else "/login"
        return go(to, session_cookie(cookie, "", request.scope["origin"], 0))


def add_invitation(router: APIRouter, accounts: Accounts, cookie: str) -> None:
    @router.get("/invite")
    def invitation_page(request: Request, token: str = "") -> Response:
        invitation = accounts.invited(token)
        if invitation is None:
            return page("invitation", "", Refused("token", "(not shown)", WORDS["no_invitation"], WORDS["ask_again"]))
        return page("invitation", invitation_form(invitation, token, request.scope["person"]))

    @router.post("/invite")
    def accept(request: Request, given: Given) -> Response:
        token, name = given.get("token", ""), given.get("name", "")
        person: Person | None = request.scope["person"]
        invitation = accounts.invited(token)
        try:
            if "join" in given and person is not None:
                accounts.join(token, person)
                return go("/")
            session = accounts.accept(token, name, new_password(given))
        except InputError as error:
            again = "" if invitation is None else invitation_form(invitation, token, person, name)
            return page("invitation", again, error)
        return go("/", session_cookie(cookie, session, request.scope["origin"], SESSION_S))


def add_password(router: APIRouter, accounts: Accounts, cookie: str) -> None:
    @router.get("/password")
    def password_page() -> Response:
        return page("change_password", password_form())

    @router.post("/password")
    def change_password(request: Request, given: Given) -> Response:
        try:
            accounts.change_password(request.cookies.get(cookie, ""), given.get("old", ""), new_password(given))
        except InputError as error:
            return page("change_password", password_form(), error)
        return go("/")


def go(to: str, cookie: str | None = None) -> Response:
    """To another page, with a cookie to keep or to forget."""
    answer = RedirectResponse(to, 303)
    if cookie is not None:
        answer.headers["set-cookie"] = cookie
    return answer


def new_password(given: dict[str, str]) -> str:
    """Raises: InputError: it was not typed the same twice."""
    password = given.get("password", "")
    if password != given.get("again", ""):
        raise InputError("password", "(not shown)", "the two passwords differ", "Type the same one twice.")
    return password


def page(title: str, content: str, error: InputError | None = None) -> Response:
    problem = "" if error is None else f'<p class="warn" role="alert">{escape(message_of(error))}</p>'
    if isinstance(error, StorageError) and not isinstance(error, Busy):
        raise error  # which the app explains, to strangers without what the database says
    status = 200 if error is None else 403 if isinstance(error, Refused) else 503 if isinstance(error, Busy) else 422
    return HTMLResponse(PAGE.format(title=escape(WORDS[title]), problem=problem, content=content), status)


def message_of(error: InputError) -> str:
    """With the field, and its value where that is no secret."""
    value = error.value if isinstance(error.value, str) and error.value != "(not shown)" else ""
    named = f"{WORDS.get(error.field, error.field)}: " if not isinstance(error, Refused) else ""
    return f"{named}{f'{value[:80]}: ' if named and value else ''}{error.problem}. {error.remedy}"


def redirect_target(invite: str, project: str) -> str:
    """Where somebody goes who has logged in: to the invitation that they came with, or to the items."""
    return f"/invite?token={quote(invite)}" if invite else f"/?project={quote(project, safe='')}" if project else "/"


def login_form(invite: str, project: str, name: str = "") -> str:
    return form(
        "/login", named_field(name), password_field("password", "current-password"), send("log_in"),
        hidden("invite", invite), hidden("project", project),
    )  # fmt: skip


def invitation_form(invitation: Invitation, token: str, person: Person | None, name: str = "") -> str:
    """To make an account or set its password; to join, for somebody who has one and is logged in."""
    kind = "resets" if invitation.known and invitation.resets else "invited"
    words = WORDS[kind].format(project=invitation.project, role=WORDS[f"role_{invitation.role}"], name=invitation.name)
    parts = [f"<p>{escape(words)}</p>"]
    if person is not None and invitation.name in ("", person.name):
        joined = send("join").format(name=escape(person.name))
        parts.append(form("/invite", hidden("token", token), hidden("join", "yes"), joined))
    if person is not None and invitation.name != person.name:
        parts.append(form("/logout", hidden("invite", token), send("somebody_else").format(name=escape(person.name))))
    if invitation.resets and (person is None or invitation.name == person.name):
        named = named_field(invitation.name or name, fixed=bool(invitation.name))
        parts.append(form("/invite", hidden("token", token), named, *new_password_fields(), send("accept")))
    if person is None:
        parts.append(f'<p><a href="/login?invite={quote(token)}">{escape(WORDS["have_account"])}</a></p>')
    return "".join(parts)


def password_form() -> str:
    return form(
        "/password", password_field("old", "current-password", "old_password"), *new_password_fields(),
        send("change_password"),
    )  # fmt: skip


def form(action: str, *parts: str) -> str:
    return f'<form method="post" action="{action}">{"".join(parts)}</form>'


def hidden(name: str, value: str) -> str:
    return f'<input type="hidden" name="{name}" value="{escape(value)}">'


def named_field(value: str, fixed: bool = False) -> str:
    more = "readonly" if fixed else "autofocus"
    return labelled("name", f'type="text" autocomplete="username" maxlength="100" value="{escape(value)}" {more}')


def new_password_fields() -> tuple[str, str]:
    return (
        password_field("password", "new-password", "new_password", SHORTEST_PASSWORD),
        password_field("again", "new-password", "password_again", SHORTEST_PASSWORD),
    )


def password_field(name: str, autocomplete: str, label: str = "password", shortest: int = 0) -> str:
    least = f' minlength="{shortest}"' if shortest else ""
    return labelled(name, f'type="password" autocomplete="{autocomplete}" maxlength="1000"{least}', label)


def labelled(name: str, attributes: str, label: str = "name") -> str:
    words = escape(WORDS[label].format(shortest=SHORTEST_PASSWORD))
    return f'<p><label for="{name}">{words}</label><input id="{name}" name="{name}" required {attributes}></p>'


def send(label: str) -> str:
    return f'<p><button type="submit" class="main">{escape(WORDS[label])}</button></p>'
