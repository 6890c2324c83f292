"""Engines that are asked in a process of their own: an abort there is an error here, and each may have its own venv."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.errors import InputError

LLAMA_CPP, VLLM = "llama.cpp", "vLLM"
MODULES = {LLAMA_CPP: "llama_cpp", VLLM: "vllm"}
PACKAGES = {LLAMA_CPP: "llama-cpp-python", VLLM: "vllm"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine said.

    Attributes:
        version: its own.
        logits: [S, V] for each row, fp32 on the CPU; up to a constant a position.
        said: the rest, see the script.
    """

    version: str
    logits: list[Tensor]
    said: Mapping[str, Any]


def interpreter(engine: str, told: str) -> str | None:
    """The Python that has the engine; None where nobody shall ask it, or it is not installed.

    Args:
        told: `auto`, this very Python if it has it; `none`; or the path of another.

    Raises:
        InputError: there is no such Python.
    """
    if told == "none":
        return None
    if told == "auto":
        return sys.executable if importlib.util.find_spec(MODULES[engine]) else None
    place = Path(told).expanduser()
    if not place.is_file():
        raise InputError(f"export.{MODULES[engine]}", told, "there is no such Python", "Name the python of its venv.")
    return str(place)


def why_unasked(engine: str, told: str) -> str:
    return "told not to ask it" if told == "none" else f"{PACKAGES[engine]} is not installed"


def ask(engine: str, python: str, **request: Any) -> Answer:
    """One request to an engine, in a new process of `python`.

    Raises:
        InputError: the engine does not do it; its last words are told.
    """
    script = Path(__file__).with_name(f"ask_{MODULES[engine]}.py")
    with tempfile.TemporaryDirectory() as out:
        asked = {"out": out, "threads": torch.get_num_threads(), **request}
        # Isolated: neither this folder nor PYTHONPATH stands in front of what that Python has installed.
        done = subprocess.run(
            [python, "-I", str(script)],
            input=json.dumps(asked), capture_output=True, text=True, errors="replace",
        )  # fmt: skip
        answer = Path(out, "answer.json")
        if done.returncode or not answer.is_file():
            raise InputError(
                "export", engine, last_words(done), f"Mend it, or do without: export.{MODULES[engine]}=none."
            )
        said = json.loads(answer.read_text(encoding="utf-8"))
        logits = []
        if (kept := Path(out, "logits.npz")).is_file():
            with np.load(kept, allow_pickle=False) as arrays:
                logits = [torch.from_numpy(arrays[str(i)].astype(np.float32)) for i in range(len(arrays.files))]
        return Answer(said.pop("version"), logits, said)


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that speaks of an error, or the last."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    words = next((line for line in reversed(lines) if "error" in line.lower()), (lines or ["no reason given"])[-1])
    return f"it does not take what was exported (status {done.returncode}: {words})"
