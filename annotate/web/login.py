"""The pages for logging in and out, accepting an invitation and changing a password: plain forms without scripts."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from align.annotate.accounts import SESSION_S, Accounts, Invitation, Person
from align.annotate.web.templating import UI_TEXTS, render
from align.core.errors import InputError, StorageError
from align.web.credentials import AccessRefused, format_session_cookie
from align.web.throttle import ServerBusy


async def read_form_fields(request: Request) -> dict[str, str]:
    """Parse the form in a request's body, and return its text fields by name."""
    form = await request.form(max_files=0, max_fields=10)
    return {name: value for name, value in form.items() if isinstance(value, str)}


FormFields = Annotated[dict[str, str], Depends(read_form_fields)]


def build_login_routes(accounts: Accounts, cookie: str) -> APIRouter:
    """Return the routes to log in and out, accept an invitation, and change a password.

    Args:
        cookie: name of the session cookie.
    """
    router = APIRouter()

    @router.get("/login")
    def login_page(request: Request, invite: str = "", project: str = "") -> Response:
        if request.scope["person"] is not None:
            return redirect(get_redirect_target(invite, project))
        return render_page("login", "log_in", invite=invite, project=project, name="")

    @router.post("/login")
    def log_in(request: Request, form: FormFields) -> Response:
        invite = form.get("invite", "")
        project = form.get("project", "")
        name = form.get("name", "")
        address = request.client.host if request.client else ""
        try:
            session = accounts.log_in(name, form.get("password", ""), address)
        except InputError as error:
            return render_page("login", "log_in", error, invite=invite, project=project, name=name)
        return redirect(
            get_redirect_target(invite, project),
            format_session_cookie(cookie, session, request.scope["origin"], SESSION_S),
        )

    @router.post("/logout")
    def log_out(request: Request, form: FormFields) -> Response:
        accounts.log_out(request.cookies.get(cookie, ""))
        target = f"/invite?token={quote(invite)}" if (invite := form.get("invite", "")) else "/login"
        return redirect(target, format_session_cookie(cookie, "", request.scope["origin"], 0))

    @router.get("/invite")
    def invitation_page(request: Request, token: str = "") -> Response:
        invitation = accounts.find_invitation(token)
        if invitation is None:
            refusal = AccessRefused("token", "(not shown)", UI_TEXTS["no_invitation"], UI_TEXTS["ask_again"])
            return render_invitation_page(None, token, None, error=refusal)
        return render_invitation_page(invitation, token, request.scope["person"])

    @router.post("/invite")
    def accept(request: Request, form: FormFields) -> Response:
        token = form.get("token", "")
        name = form.get("name", "")
        person: Person | None = request.scope["person"]
        invitation = accounts.find_invitation(token)
        try:
            if "join" in form and person is not None:
                accounts.join(token, person)
                return redirect("/")
            session = accounts.accept(token, name, read_new_password(form))
        except InputError as error:
            return render_invitation_page(invitation, token, person, name, error)
        return redirect("/", format_session_cookie(cookie, session, request.scope["origin"], SESSION_S))

    @router.get("/password")
    def password_page() -> Response:
        return render_page("password", "change_password")

    @router.post("/password")
    def change_password(request: Request, form: FormFields) -> Response:
        try:
            accounts.change_password(request.cookies.get(cookie, ""), form.get("old", ""), read_new_password(form))
        except InputError as error:
            return render_page("password", "change_password", error)
        return redirect("/")

    return router


def redirect(target: str, cookie: str | None = None) -> Response:
    """Return a response that redirects the browser to another page, by status 303.

    Args:
        cookie: a Set-Cookie header, which sets or deletes the session.
    """
    return RedirectResponse(target, 303, headers=None if cookie is None else {"set-cookie": cookie})


def read_new_password(form: dict[str, str]) -> str:
    """Return the new password in the fields of a form, or raise InputError if its repetition differs."""
    password = form.get("password", "")
    if password != form.get("again", ""):
        raise InputError("password", "(not shown)", "the two passwords differ", "Type the new password twice.")
    return password


def render_page(template: str, title: str, error: InputError | None = None, **values: Any) -> Response:
    """Render a template as an HTML response, with the error, if there is one, above its form.

    The status is 200 without an error, else 403, 422 or 503. Raises a StorageError again, except ServerBusy.

    Args:
        template: its file name without `.html`.
        title: a key of `UI_TEXTS`.
        values: of the template's variables.
    """
    if isinstance(error, StorageError) and not isinstance(error, ServerBusy):
        raise error  # which the app explains, to strangers without what the database says
    status = (
        200
        if error is None
        else 403
        if isinstance(error, AccessRefused)
        else 503
        if isinstance(error, ServerBusy)
        else 422
    )
    problem = format_error(error) if error else ""
    return HTMLResponse(render(f"{template}.html", title=UI_TEXTS[title], problem=problem, **values), status)


def render_invitation_page(
    invitation: Invitation | None, token: str, person: Person | None, name: str = "", error: InputError | None = None
) -> Response:
    """Render the page that accepts an invitation: create an account, set its password, or join the project.

    Without an invitation it shows only the error.
    """
    greeting = ""
    if invitation is not None:
        text_name = "resets" if invitation.has_account and invitation.resets else "invited"
        role = UI_TEXTS[f"role_{invitation.role}"]
        greeting = UI_TEXTS[text_name].format(project=invitation.project, role=role, name=invitation.name)
    values = {"invitation": invitation, "token": token, "person": person, "name": name, "greeting": greeting}
    return render_page("invitation", "invitation", error, **values)


def format_error(error: InputError) -> str:
    """Return an error's message with its field, and with its value unless that is secret."""
    value = error.value if isinstance(error.value, str) and error.value != "(not shown)" else ""
    label = f"{UI_TEXTS.get(error.field, error.field)}: " if not isinstance(error, AccessRefused) else ""
    return f"{label}{f'{value[:80]}: ' if label and value else ''}{error.problem}. {error.remedy}"


def get_redirect_target(invite: str, project: str) -> str:
    """Return the path of the page to open after a login: of the invitation token, else of the project, else `/`."""
    return f"/invite?token={quote(invite)}" if invite else f"/?project={quote(project, safe='')}" if project else "/"
