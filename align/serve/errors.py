"""Exceptions for refused requests, which become error responses in OpenAI's form."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse

from align.core.errors import AlignError, InputError, make_printable

INVALID = "invalid_request_error"
SERVER = "server_error"
RETRY_S = 10
"""Seconds after which a client may retry a request that the server could not handle."""


class Refusal(AlignError):
    """An exception that the server sends to the client as an error response in OpenAI's form.

    Args:
        message: for the client; without keys, prompts and paths.
        param: the parameter at fault.
        retry_after_s: seconds for the `Retry-After` header.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = make_printable(message)
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """Convert the exception to an HTTP response with its JSON body and status, and `Retry-After` if it is set."""
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return JSONResponse(self.body, self.status, headers)


def not_supported(param: str, message: str) -> Refusal:
    """Return a Refusal with status 400 for a request parameter that this server does not support."""
    return Refusal(400, message, param=param, code="unsupported_parameter")


def invalid_request(param: str | None, message: str, code: str | None = None) -> Refusal:
    """Return a Refusal with status 400 for a request with an invalid parameter."""
    return Refusal(400, message, param=param, code=code)


def as_refusal(error: InputError) -> Refusal:
    """Convert an InputError to a Refusal with status 400, without the error's value, which may be a prompt."""
    message = f"{error.problem[:1].upper()}{error.problem[1:]}. {error.remedy}"
    return invalid_request(error.field, message, "context_length_exceeded" if error.field == "max_tokens" else None)


def internal_error() -> Refusal:
    """Return a Refusal with status 500, which refers to the server's log for details."""
    return Refusal(500, "The server had an error while it answered. Its log says more.", type=SERVER)


def shutting_down() -> Refusal:
    """Return a Refusal with status 503 for a request that arrives while the server shuts down."""
    message = "The server is shutting down, and takes no new requests."
    return Refusal(503, message, type=SERVER, code="shutting_down", retry_after_s=RETRY_S)


class UnknownModel(Refusal):
    """A 404 response for a model name that does not exist, or that the tenant may not use.

    The message is the same for both, so that a tenant does not learn other tenants' names.
    """

    def __init__(self, model: str) -> None:
        message = f"The model '{model[:120]}' does not exist, or you may not use it."
        super().__init__(404, message, param="model", code="model_not_found")


class RateLimited(Refusal):
    """A 429 response for a request over one of its tenant's rate limits, with the seconds until a retry."""

    def __init__(self, limit: str, retry_after_s: float) -> None:
        message = f"this limit of your key is used up for now. Try again in {math.ceil(retry_after_s)} s."
        kind = "rate_limit_error"
        code = "rate_limit_exceeded"
        super().__init__(429, message, type=kind, param=limit, code=code, retry_after_s=retry_after_s)


class BudgetSpent(Refusal):
    """A 429 response for a request that may use more tokens than are left of its tenant's budget.

    Attributes:
        left: tokens that are left.
    """

    def __init__(self, budget: int, left: int) -> None:
        self.left = left
        kind = "insufficient_quota"
        problem = f"token_budget={budget}: {left:,} tokens of your key are left, fewer than this request may use"
        remedy = "Lower max_tokens, or ask for a larger budget."
        super().__init__(429, f"{problem}. {remedy}", type=kind, param="token_budget", code=kind)


class UsageUnwritable(Refusal):
    """A 503 response while the database of token usage cannot be written. No request is answered uncounted."""

    def __init__(self) -> None:
        super().__init__(503, "The server cannot count usage. Try again later.", type=SERVER, retry_after_s=RETRY_S)


class KeysUnreadable(Refusal):
    """A 503 response to every request while the file of API keys cannot be read. The server's log has the reason."""

    def __init__(self) -> None:
        message = "The server cannot read its keys. Try again later."
        super().__init__(503, message, type=SERVER, retry_after_s=RETRY_S)
