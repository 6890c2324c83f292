"""What is kept while a server runs: in the run's `requests.jsonl` a line for each request, in its `adapters.jsonl` a
line for each change of what its names stand for. Never a key, a prompt or an answer."""

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

from align.serve.identity import Arm

log = logging.getLogger(__name__)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(slots=True)
class Record:
    """One request.

    Attributes:
        tenant: who asked; empty where nobody is known by the key.
        asked: `model` as it was asked for, if there is such a model for them.
        answered: the name that answered.
        adapter: digest of the weights that answered; empty for the base by itself.
        base: digest of the base.
        arm: which of the things that the name stands for; empty where it stands for one.
        cached_tokens: of the prompt, from the prefix cache.
        first_token_s, seconds: from the last byte of the request's head.
    """

    id: str
    path: str
    time: str = field(default_factory=now)
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
    """Seconds since it was made."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()

    def __call__(self) -> float:
        return self._clock() - self._began


class Lines:
    """Appends objects to a file. A disk that is full ends no request: the run's log says so once."""

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


class RequestLog(Lines):
    """A line for each request."""

    def write(self, record: Record) -> None:
        self.append(rounded({each.name: getattr(record, each.name) for each in fields(record)}))


class AdapterLog(Lines):
    """A line for each change of what the names stand for."""

    def write(self, names: Mapping[str, Sequence[Arm]]) -> None:
        self.append({"time": now(), "names": {name: [said(arm) for arm in arms] for name, arms in names.items()}})


def said(arm: Arm) -> dict[str, Any]:
    return {"label": arm.label, "adapter": arm.version and arm.version.digest, "weight": arm.weight}


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}
