"""Load exported models as a user without `align` would, each in a fork of a process that has only done imports.

    python -I load_without_align.py JOBS.json

A job is a JSON object: `cwd`; `out`, an npz file; either `code`, the code of a card, or `auto`, the name of one of
PEFT's classes, with the `folder` to load and whether to load the base in `nf4`; and `rows`, token ids to run.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers


def load_model(job: dict[str, Any]) -> Any:
    if "code" in job:
        names: dict[str, Any] = {}
        with forbid_stderr():
            exec(job["code"], names)
        return names["model"]
    options: dict[str, Any] = {"dtype": torch.float32} | ({"num_labels": 1} if "Sequence" in job["auto"] else {})
    if job["nf4"]:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return getattr(peft, job["auto"]).from_pretrained(job["folder"], **options)


OF_LIBRARIES = re.compile(r"kernels|is_gradient_checkpointing|^\s*(warnings\.warn.*)?$|\d+%\|")
"""Lines that libraries print for every model: a kernel that is not installed, a deprecation, progress."""


@contextmanager
def forbid_stderr() -> Iterator[None]:
    """Raise AssertionError if the block prints to standard error, except for lines that match `OF_LIBRARIES`."""
    warnings.simplefilter("always")
    with tempfile.TemporaryFile() as stderr_file:
        stderr_copy = os.dup(2)
        os.dup2(stderr_file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr_copy, 2)
            stderr_file.seek(0)
            lines = stderr_file.read().decode().replace("\r", "\n").splitlines()
    if unexpected := [line for line in lines if not OF_LIBRARIES.search(line)]:
        raise AssertionError("\n".join(["the card's code is not quiet:", *unexpected]))


def write_logits(job: dict[str, Any]) -> None:
    os.chdir(job["cwd"])
    model = load_model(job).eval()
    with torch.no_grad():  # a card's code is run without
        logits = [model(input_ids=torch.tensor([row])).logits[0].float().numpy() for row in job["rows"]]
    assert not any(name.split(".")[0] == "align" for name in sys.modules)
    np.savez(job["out"], *logits)


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        if (child := os.fork()) == 0:
            status = 1
            try:
                write_logits(job)
                status = 0
            except Exception:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"{job['out']} ended with status {status}")


if __name__ == "__main__":
    main()
