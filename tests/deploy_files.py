"""Parsed files of `deploy/`."""

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
    arguments: str

    @property
    def words(self) -> list[str]:
        """The arguments, if they are a JSON list. Options before it, as in a health check, are left out."""
        return json.loads(self.arguments[self.arguments.index("[") :])

    @property
    def values(self) -> dict[str, str]:
        """The NAME=VALUE pairs of an ENV instruction."""
        return dict(pair.split("=", 1) for pair in self.arguments.split())


def read_instructions() -> list[Instruction]:
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line]


def read_last_stage() -> list[Instruction]:
    parsed = read_instructions()
    return parsed[max(i for i, instruction in enumerate(parsed) if instruction.word == "FROM") :]


def find_instruction(word: str) -> Instruction:
    """Return the only instruction of the last stage with this word."""
    (match,) = (instruction for instruction in read_last_stage() if instruction.word == word)
    return match


def read_image_environment() -> dict[str, str]:
    return {
        name: value
        for instruction in read_last_stage()
        if instruction.word == "ENV"
        for name, value in instruction.values.items()
    }


def read_compose_file() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())


def read_manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(KUBERNETES.read_text()))


def find_stateful_set() -> dict[str, Any]:
    (match,) = (manifest for manifest in read_manifests() if manifest["kind"] == "StatefulSet")
    return match


def find_program(name: str) -> str | None:
    """Return the path of a program: this environment's, also if its folder is not on the PATH, or else the PATH's."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
