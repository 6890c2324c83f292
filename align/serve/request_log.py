"""Logs of a running server: in the run's `requests.jsonl` a line for each request, in its `adapters.jsonl` a line for
each change of its names, and events for the operator. No line holds a key, a prompt, an answer or a tenant's path."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from align.report.figure_text import one_line
from align.run.stale import stale_in
from align.serve.model_names import Arm

log = logging.getLogger(__name__)
operator_log = logging.getLogger("align.serve.operator")
"""Events for the operator of the server, in the run's log and on the console."""


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(slots=True)
class Record:
    """One request.

    Attributes:
        tenant: empty for an unknown key.
        asked: `model` of the request, if the tenant may use such a model.
        answered: name of the model that answered.
        adapter: digest of the weights that answered; empty for the base alone.
        base: digest of the base.
        arm: label of the chosen arm; empty for a name with one arm.
        cached_tokens: prompt tokens that came from the prefix cache.
        first_token_s, seconds: since the last byte of the request's head.
    """

    id: str
    path: str
    time: str = field(default_factory=utc_now)
    tenant: str = ""
    asked: str = ""
    answered: str = ""
    base: str = ""
    adapter: str = ""
    arm: str = ""
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    status: int = 0
    first_token_s: float | None = None
    seconds: float = 0.0


class Stopwatch:
    """Seconds since its creation."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()

    def __call__(self) -> float:
        return self._clock() - self._began


class JsonLinesLog:
    """A file of JSON lines. A full disk fails no request: the first failure to write is logged."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock, self._warned = path, Lock(), False
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def append(self, values: Mapping[str, Any]) -> None:
        line = json.dumps(values, ensure_ascii=False)
        try:
            with self._lock:
                self._file.write(line + "\n")
        except (OSError, ValueError) as error:
            if not self._warned:
                log.warning("%s cannot be written (%s); requests are answered all the same", self.path.name, error)
            self._warned = True

    def close(self) -> None:
        with self._lock:
            self._file.close()


class RequestLog(JsonLinesLog):
    """A line for each request."""

    def write(self, record: Record) -> None:
        values = {each.name: getattr(record, each.name) for each in fields(record)}
        self.append({name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()})


class AdapterLog(JsonLinesLog):
    """A line for each change of the served names."""

    def write(self, names: Mapping[str, Sequence[Arm]]) -> None:
        targets = {
            name: [
                {"label": arm.label, "adapter": arm.version and arm.version.digest, "weight": arm.weight}
                for arm in arms
            ]
            for name, arms in names.items()
        }
        self.append({"time": utc_now(), "names": targets})


def warn_if_stale(ref: str, folder: Path) -> None:
    """Warn the operator about an artifact that learned from rows which were forgotten since.

    Args:
        folder: of the artifact, inside its run's folder.
    """
    stale = stale_in(folder.parent)
    if stale is not None:
        operator_log.warning("%s", one_line(f"{ref} is stale since {stale.since[:10]}, {stale.because}"))
