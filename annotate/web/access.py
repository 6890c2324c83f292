"""Access to the annotation pages: the rules that `align.web.auth` applies.

A request that changes something is refused unless a page of ours sends it: JSON with the header X-Align, which a form
of another site cannot send, or one of our own forms, which comes with our own Origin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp

from align.annotate.accounts import Accounts, Person
from align.annotate.web.templating import UI_TEXTS
from align.web.auth import Authenticator, AuthMiddleware, build_error_response
from align.web.gradio_pages import CLOSED_PATHS, POLICY

BODY_LIMIT = 1_000_000
"""Maximum bytes of a JSON request."""
FORM_LIMIT = 20_000
"""Maximum bytes of a form."""
STREAMS = 8
"""Maximum open event streams per person. The page for managers has one while it waits for figures."""
FORMS = ("/login", "/logout", "/invite", "/password")
MANAGE = "/manage"


class AccountAuthenticator:
    """An authenticator that finds a visitor's account by the session token in a cookie."""

    def __init__(self, accounts: Accounts, cookie: str) -> None:
        self.accounts = accounts
        self.cookie = cookie

    def find_visitor(self, cookies: Mapping[str, str]) -> Person | None:
        session = cookies.get(self.cookie, "")
        return self.accounts.authenticate_session(session) if session else None

    def create_link_cookie(self, key: str) -> str | None:
        return None

    def refuse_unknown_visitor(self, path: str, query: Mapping[str, str]) -> Response | None:
        if path in ("/login", "/invite", "/align/app.css"):
            return None
        if path in ("/", MANAGE, f"{MANAGE}/", "/password", "/logout"):
            project = query.get("project", "") if path == "/" else ""
            return RedirectResponse(f"/login?project={quote(project, safe='')}" if project else "/login", 303)
        return build_error_response(401, UI_TEXTS["session_over"] if path.startswith(MANAGE) else "Log in.")


def require_login(
    app: ASGIApp, authenticator: Authenticator[Person], origins: Sequence[str], streams: int = 256
) -> AuthMiddleware:
    """Wrap an app in the middleware that authenticates each request and refuses requests from pages of other sites.

    Args:
        streams: maximum open event streams of all people together.
    """
    return AuthMiddleware(
        app,
        authenticator,
        origins,
        check_request,
        policy=POLICY,
        closed_paths=CLOSED_PATHS,
        max_streams=streams,
        max_streams_each=STREAMS,
    )


def check_request(person: Person | None, method: str, path: str, headers: Headers) -> Response | None:
    """Return the error response for a request that is not allowed, or None if the request may pass.

    The managers' page is refused with 403 to anyone but reviewers and admins, and a request that cannot come from one
    of our own pages with 415.
    """
    if path.startswith(MANAGE) and not (person and is_manager(person)):
        return build_error_response(403, "This page is for reviewers and admins.")
    problem = find_request_problem(method, path, headers)
    return build_error_response(415, problem) if problem else None


def is_manager(person: Person) -> bool:
    """Return whether a person is a reviewer or an admin of at least one project."""
    return any(person.has_role(project, "reviewer") for project in person.roles)


def find_request_problem(method: str, path: str, headers: Headers) -> str:
    """Return a message if a request cannot come from one of our own pages, by its headers, or else an empty string."""
    if method in ("GET", "HEAD"):
        return ""
    content_type = headers.get("content-type", "")
    limit = BODY_LIMIT
    if path in FORMS:
        limit = FORM_LIMIT
        if not content_type.startswith("application/x-www-form-urlencoded") or "origin" not in headers:
            return "Send the form from its own page."
    elif path.startswith("/api/"):
        if not content_type.startswith("application/json") or "x-align" not in headers:
            return "Send JSON, with the header X-Align."
    elif path.startswith(f"{MANAGE}/gradio_api/queue/"):
        if not content_type.startswith("application/json") or "origin" not in headers:
            return "Send JSON from the page itself."
    else:  # Gradio's other endpoints, such as uploads, which no page needs
        return "This page is read-only."
    length = headers.get("content-length", "") if "transfer-encoding" not in headers else ""
    return "" if length.isdigit() and int(length) <= limit else f"Send at most {limit} bytes, with Content-Length."
