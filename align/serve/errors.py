"""Refusals in OpenAI's form: status, message, type, parameter and code."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse

from align.core.errors import AlignError, InputError, readable
from align.rollout.requests import QueueFull
from align.serve.rate_limits import Limited
from align.serve.usage import BudgetSpent, UsageUnwritable

INVALID, SERVER = "invalid_request_error", "server_error"
BUSY_S = 1
"""Seconds after which somebody may try again whom a full queue has sent away."""


class Refusal(AlignError):
    """A request that is not answered.

    Args:
        message: for the client; no key, prompt or path.
        param: the parameter at fault.
        retry_after_s: when to come again.
    """

    def __init__(
        self, status: int, message: str, *, type: str = INVALID, param: str | None = None, code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, readable(message), type, param, code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return JSONResponse(self.body, self.status, headers)


def unsupported(param: str, message: str) -> Refusal:
    return Refusal(400, message, param=param, code="unsupported_parameter")


def invalid(param: str | None, message: str, code: str | None = None) -> Refusal:
    return Refusal(400, message, param=param, code=code)


def as_refusal(error: InputError) -> Refusal:
    """An input error of ours for the client. The value is left out: it may be a prompt."""
    message = f"{error.problem[:1].upper()}{error.problem[1:]}. {error.remedy}"
    if isinstance(error, QueueFull):
        message = "The server is busy: as many requests wait as may. Try again in a moment."
        return Refusal(429, message, type="rate_limit_error", code="queue_full", retry_after_s=BUSY_S)
    if isinstance(error, Limited):
        wait, message = error.retry_after_s, f"{error.problem}. {error.remedy}"
        kind, code = "rate_limit_error", "rate_limit_exceeded"
        return Refusal(429, message, type=kind, param=error.field, code=code, retry_after_s=wait)
    if isinstance(error, BudgetSpent):
        return Refusal(429, str(error), type="insufficient_quota", param=error.field, code="insufficient_quota")
    code = "context_length_exceeded" if error.field == "max_tokens" else None
    return Refusal(400, message, param=error.field, code=code)


def unknown_model(model: str) -> Refusal:
    message = f"The model '{model[:120]}' does not exist, or you may not use it."
    return Refusal(404, message, param="model", code="model_not_found")


def fault() -> Refusal:
    """Something of ours went wrong; the log says what."""
    return Refusal(500, "The server had an error while it answered. Its log says more.", type=SERVER)


def draining() -> Refusal:
    message = "The server is shutting down, and takes no new requests."
    return Refusal(503, message, type=SERVER, code="shutting_down", retry_after_s=10)


def uncounted(error: UsageUnwritable) -> Refusal:
    return Refusal(503, str(error), type=SERVER, retry_after_s=10)


def revoked() -> Refusal:
    return Refusal(401, "This key was revoked.", code="invalid_api_key")


def grammar_failed() -> Refusal:
    """Return the refusal of a grammar that compiles and then costs too much at a step of an answer."""
    message = (
        "A step of this answer by its schema, pattern or tools costs more than a step may. Simplify it: fewer "
        "alternatives, and no repeats of repeats."
    )
    return invalid(None, message, "invalid_grammar")


def not_finite(model: str) -> Refusal:
    """No fault of the request, and another try comes to the same: no status at which clients try again."""
    message = (
        f"The model '{model}' came to values that are nan or infinite on this prompt: its weights are too large for "
        "the precision that it is served in. Ask another model, and tell whoever runs the server."
    )
    return Refusal(422, message, param="model", code="model_not_finite")
