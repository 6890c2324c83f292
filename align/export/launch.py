"""Launch scripts in an export: shell scripts without absolute paths that start an engine on the exported model.

`templates/` holds the scripts.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

from align.models.base import BUILT_IN
from align.report.page import create_template_environment
from align.rollout.engine_process import RANKS, choose_vllm_rank

if TYPE_CHECKING:
    from align.ops.divergence import Divergence

LAUNCH = "launch"
TEMPLATES = Path(__file__).parent / "templates"
CHAT_TEMPLATE = "chat_template.jinja"
LONGEST = 64
"""Largest number of characters of a model's name in `stage.adapters`."""


def make_served_name(*parts: str) -> str:
    """Return a model name for an engine: the non-empty parts joined with hyphens, with unsupported characters replaced
    by hyphens."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(part for part in parts if part)).strip("-.")


@dataclass(frozen=True, slots=True)
class ServedBase:
    """The name and location of the base model that an exported adapter is served on.

    Attributes:
        id: its name: a hub id, a built-in model, or the name of a folder.
        folder: its folder, relative to the launch files; empty if the base is on the hub.
        revision: its commit on the hub.
        local_name: its name in requests and in the adapter's configuration, see
            `align.run.weights.build_local_base_name`; empty if that is the id.
    """

    id: str
    folder: str = ""
    revision: str = ""
    local_name: str = ""

    @property
    def name(self) -> str:
        return self.local_name or self.id


def write_align_script(folder: Path, name: str, base: ServedBase | None, is_reward_model: bool = False) -> None:
    """Write `launch/align.sh`, a script that serves an exported adapter or model with `stage=serve`.

    Args:
        name: the model's name in requests.
        base: base of an adapter; None if the export is a model itself.
        is_reward_model: it is a reward model.
    """
    unnamed_base = base is not None and not base.revision and base.id not in BUILT_IN
    write_script(folder, "align.sh", name=name[:LONGEST], base=base, unnamed_base=unnamed_base, scores=is_reward_model)


def write_adapter_scripts(
    folder: Path, name: str, base: ServedBase, rank: int, gap: Divergence | None, template: str
) -> None:
    """Write `launch/vllm.sh` and `launch/vllm-resolver.sh`, which serve an exported adapter, unless its rank is too
    large for vLLM.

    Args:
        name: the model's name in requests.
        gap: difference between the adapter on the original weights and what was trained.
        template: chat template, from `align.data.chat.template.build_escaping_template`.
    """
    if rank > RANKS[-1]:
        return
    values = {"name": name, "base": base, "rank": choose_vllm_rank(rank), "gap": gap, "original": False}
    chat_template = write_chat_template(folder, template)
    for script in ("vllm.sh", "vllm-resolver.sh"):
        write_script(folder, script, **values, chat_template=chat_template)


def write_model_script(
    folder: Path,
    name: str,
    gap: Divergence | None,
    has_original_weights: bool,
    template: str,
    is_reward_model: bool = False,
) -> None:
    """Write `launch/vllm.sh`, a script that serves an exported merged or fully trained model with vLLM.

    Args:
        has_original_weights: the adapter was merged into the original weights.
        template: chat template, from `align.data.chat.template.build_escaping_template`.
        is_reward_model: it is a reward model.
    """
    chat_template = write_chat_template(folder, template)
    values = {"name": name, "base": None, "gap": gap, "original": has_original_weights, "scores": is_reward_model}
    write_script(folder, "vllm.sh", **values, chat_template=chat_template)


def write_llama_script(
    folder: Path, name: str, adapter: str | None, gap: Divergence | None, has_original_weights: bool
) -> None:
    """Write `launch/llama-server.sh`, a script that serves GGUF files with llama.cpp: a base and an adapter, or a whole
    model.

    Args:
        has_original_weights: the export holds the original weights.
    """
    stem = "model" if adapter is None else "base"
    weights = sorted(path.stem.removeprefix(f"{stem}-") for path in folder.glob(f"{stem}-*.gguf"))
    values = {
        "name": name,
        "adapter": adapter,
        "stem": stem,
        "weights": weights,
        "gap": gap,
        "original": has_original_weights,
    }
    write_script(folder, "llama-server.sh", **values)


def write_chat_template(folder: Path, template: str) -> str:
    """Write a chat template to `launch/chat_template.jinja`, and return the file name, or "" for an empty template."""
    if not template:
        return ""
    (folder / LAUNCH).mkdir(exist_ok=True)
    (folder / LAUNCH / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    return CHAT_TEMPLATE


def write_script(folder: Path, script: str, **values: Any) -> None:
    path = folder / LAUNCH / script
    path.parent.mkdir(exist_ok=True)
    path.write_text(load_script_templates().get_template(script).render(values), encoding="utf-8")


@cache
def load_script_templates() -> Environment:
    environment = create_template_environment(TEMPLATES)
    environment.autoescape = False
    environment.keep_trailing_newline = True
    environment.filters |= {"quote": shlex.quote, "comment": to_shell_comment}
    return environment


def to_shell_comment(text: str) -> str:
    """Wrap a text into comment lines of a shell script, each with a leading `# `."""
    return textwrap.fill(
        " ".join(text.split()), 110, initial_indent="# ", subsequent_indent="# ", break_long_words=False
    )
