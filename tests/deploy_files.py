"""The files of deploy/, read."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE, COMPOSE, KUBERNETES, TRAINING, SLURM = (
    ROOT / "deploy" / name for name in ("Dockerfile", "compose.yaml", "kubernetes.yaml", "training.yaml", "slurm.sh")
)


class Instruction(NamedTuple):
    """One instruction of a Dockerfile, with its lines joined."""

    word: str
    rest: str

    @property
    def words(self) -> list[str]:
        """What follows, where it is a list in JSON; `CMD` of a health check has options before it."""
        return json.loads(self.rest[self.rest.index("[") :])

    @property
    def values(self) -> dict[str, str]:
        """NAME=VALUE pairs, of ENV."""
        return dict(pair.split("=", 1) for pair in self.rest.split())


def instructions() -> list[Instruction]:
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line]


def last_stage() -> list[Instruction]:
    found = instructions()
    return found[max(i for i, one in enumerate(found) if one.word == "FROM") :]


def only(word: str) -> Instruction:
    """The one of the last stage."""
    (found,) = (one for one in last_stage() if one.word == word)
    return found


def environment() -> dict[str, str]:
    return {name: value for one in last_stage() if one.word == "ENV" for name, value in one.values.items()}


def compose() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(KUBERNETES.read_text()))


def stateful_set() -> dict[str, Any]:
    (found,) = (one for one in manifests() if one["kind"] == "StatefulSet")
    return found


def program(name: str) -> str | None:
    """Of this environment, whether it is on the PATH or not."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
