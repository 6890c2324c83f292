"""Who may use the annotation pages, and which requests those pages send: the rules that `align.web.auth` applies.

What changes something is refused unless a page of ours sends it: JSON with the header X-Align, which a form of another
site cannot send, or one of our own forms, which comes with our own Origin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp

from align.annotate.accounts import Accounts, Person
from align.annotate.web.templating import WORDS
from align.web.auth import Authenticator, AuthMiddleware, refusal
from align.web.gradio_pages import POLICY, UNUSED

BODY_LIMIT, FORM_LIMIT = 1_000_000, 20_000
"""Bytes of a request: of JSON, of a form."""
STREAMS = 8
"""Answers without an end that one person may have at once: a manager's page has one while it waits for figures."""
FORMS = ("/login", "/logout", "/invite", "/password")
MANAGE = "/manage"


class AccountAuthenticator:
    """Whoever has an account, and a session of it in a cookie."""

    def __init__(self, accounts: Accounts, cookie: str) -> None:
        self.accounts, self.cookie = accounts, cookie

    def who(self, cookies: Mapping[str, str]) -> Person | None:
        session = cookies.get(self.cookie, "")
        return self.accounts.who(session) if session else None

    def cookie_of_link(self, key: str) -> str | None:
        return None

    def unauthenticated(self, path: str, query: Mapping[str, str]) -> Response | None:
        if path in ("/login", "/invite", "/align/app.css"):
            return None
        if path in ("/", MANAGE, f"{MANAGE}/", "/password", "/logout"):
            project = query.get("project", "") if path == "/" else ""
            return RedirectResponse(f"/login?project={quote(project, safe='')}" if project else "/login", 303)
        return refusal(401, WORDS["session_over"] if path.startswith(MANAGE) else "Log in.")


def require_login(
    app: ASGIApp, authenticator: Authenticator[Person], origins: Sequence[str], streams: int = 256
) -> AuthMiddleware:
    """Return the app behind authentication.

    Args:
        streams: answers without an end that all people together may have at once.
    """
    return AuthMiddleware(
        app, authenticator, origins, check, policy=POLICY, unused=UNUSED, streams=streams, streams_each=STREAMS
    )


def check(person: Person | None, method: str, path: str, headers: Headers) -> Response | None:
    """Return the answer to a request that is refused. Returns None if it may pass."""
    if path.startswith(MANAGE) and not (person and manages(person)):
        return refusal(403, "This page is for reviewers and admins.")
    problem = request_problem(method, path, headers)
    return refusal(415, problem) if problem else None


def manages(person: Person) -> bool:
    """Whether there is a project of which they see more than its items."""
    return any(person.may(project, "reviewer") for project in person.roles)


def request_problem(method: str, path: str, headers: Headers) -> str:
    """What keeps a request from being one of our own pages'; empty where nothing does."""
    if method in ("GET", "HEAD"):
        return ""
    sent, most = headers.get("content-type", ""), BODY_LIMIT
    if path in FORMS:
        most = FORM_LIMIT
        if not sent.startswith("application/x-www-form-urlencoded") or "origin" not in headers:
            return "Send the form from its own page."
    elif path.startswith("/api/"):
        if not sent.startswith("application/json") or "x-align" not in headers:
            return "Send JSON, with the header X-Align."
    elif path.startswith(f"{MANAGE}/gradio_api/queue/"):
        if not sent.startswith("application/json") or "origin" not in headers:
            return "Send JSON from the page itself."
    else:  # Gradio's own, such as uploads, which no page has a use for
        return "There is nothing here that could be changed."
    length = headers.get("content-length", "") if "transfer-encoding" not in headers else ""
    return "" if length.isdigit() and int(length) <= most else f"Send at most {most} bytes, and say so."
