"""Files that start an engine on an export: shell scripts, to be run where the export lies; no paths of this machine."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from align.models.base import BUILT_IN
from align.rollout.vllm_adapters import RANKS, vllm_rank

if TYPE_CHECKING:
    from align.ops.divergence import Divergence

LAUNCH = "launch"
TEMPLATE = "chat_template.jinja"
ABSENT = "the base is not there; bring it along, or set BASE"


def served_name(*parts: str) -> str:
    """What an engine calls it, of the letters that all take."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(part for part in parts if part)).strip("-.")


@dataclass(frozen=True, slots=True)
class Served:
    """The base that an adapter is served on.

    Attributes:
        id: what the base is called: a hub's id, a built-in model, the name of a folder.
        folder: seen from the launch files; empty where it is the hub's.
        revision: of the hub's.
        local_name: by which requests ask for it, and by which the adapter's configuration names it, see
            `align.run.weights.local_base_name`; empty if that is the id.
    """

    id: str
    folder: str = ""
    revision: str = ""
    local_name: str = ""

    @property
    def name(self) -> str:
        return self.local_name or self.id

    @property
    def place(self) -> str:
        """Shell that sets `base`."""
        if self.folder:
            found = f"base=${{BASE:-$here/{shlex.quote(self.folder)}}}\n"
            return found + f'[ -n "${{BASE:-}}" ] || [ -d "$base" ] || {{ echo "{ABSENT}: $base" >&2; exit 2; }}\n'
        if not self.revision:  # its id is a name of ours, which a hub may know as something else
            return "base=${BASE:?names the folder of the base}\n"
        pinned = f'[ -n "${{BASE:-}}" ] || set -- --revision {shlex.quote(self.revision)} "$@"\n'
        return f"base=${{BASE:-{shlex.quote(self.id)}}}\n{pinned}"


GUARD = """: "${VLLM_API_KEY:?holds the key that clients have to send: Authorization: Bearer KEY}"
export VLLM_API_KEY
"""
"""Shell that ends a launch without a key. vLLM reads the key from the environment, where no list of processes shows
it."""
NO_LOADING = """if [ "${RUNTIME_LORA:-}" = yes ]; then
  export VLLM_ALLOW_RUNTIME_LORA_UPDATING=True
else
  unset VLLM_ALLOW_RUNTIME_LORA_UPDATING VLLM_PLUGINS
fi
"""
GUARDED = (
    "It listens on this machine alone, unless LISTEN names another interface, and VLLM_API_KEY in the environment "
    "holds its key, which vLLM asks for under /v1 alone: put a proxy in front of it before LISTEN opens it to others."
)
LOADING = "RUNTIME_LORA=yes lets each client with the key load adapters from any folder that vLLM can read."
SERVE = 'exec vllm serve {model} --host "${{LISTEN:-127.0.0.1}}" --served-model-name {name} '

OWN = (
    "align's own server with {what}, asked for as {name}: OpenAI's API on a CPU, with keys and limits for tenants "
    "(stage.keys=FILE). align's docs/deploying.md has containers and larger machines."
)
LONGEST = 64
"""Characters of a name that `stage.adapters` takes."""


def launches_own(folder: Path, name: str, base: Served | None, scores: bool = False) -> None:
    """`launch/align.sh` of an adapter's export, or of a merged or whole model.

    Args:
        name: by which requests ask for it.
        base: that an adapter was trained on; None where the export is the base itself.
        scores: it is a reward model.
    """
    name, model, why = name[:LONGEST], "", ""
    what, stands_for = "this adapter", "'$folder'"
    if base is None:
        what, stands_for, model = "this model", "base", ' model=hub "model.path=$folder"'
    elif not base.revision and base.id not in BUILT_IN:
        model = ' model=hub "model.path=${BASE:?names the folder of the base that it was trained on}"'
        why = f" BASE is the folder of {base.id}, as it was trained on."
    asks = " It scores conversations: POST /v1/rewards." if scores else ""
    write_script(
        folder / LAUNCH / "align.sh",
        OWN.format(what=what, name=name) + asks + why,
        'folder=$(cd "$here/.." && pwd)\n'
        f'exec python -m align stage=serve "stage.adapters={{{name}: {stands_for}}}"{model} "$@"\n',
    )


def launches_adapter(folder: Path, name: str, base: Served, rank: int, gap: Divergence | None, template: str) -> None:
    """`launch/vllm.sh` and `launch/vllm-resolver.sh` of an adapter's export; none where vLLM serves no such rank.

    Args:
        name: by which requests ask for it.
        gap: how far the adapter on the original weights lies from what was trained.
        template: of `align.data.chat.template.contents_as_text`.
    """
    if rank > RANKS[-1]:
        return
    why = f"BASE, a folder or a hub id, puts it on another base than it was trained on. {gap_note(gap)} {GUARDED}"
    serve = SERVE.format(model='"$base"', name=shlex.quote(base.name)) + "--enable-lora --max-lora-rank "
    serve += f"{vllm_rank(rank)} \\\n  {by_template(folder, template)}"
    write_script(
        folder / LAUNCH / "vllm.sh",
        f"vLLM with this adapter, asked for as the model {name}. {why} {LOADING}",
        f'{GUARD}{NO_LOADING}{base.place}{serve}--lora-modules {shlex.quote(name)}="$here/.." "$@"\n',
    )
    write_script(
        folder / LAUNCH / "vllm-resolver.sh",
        "vLLM with all adapters of a folder, each found by its name when it is first asked for. ADAPTERS holds a "
        f"folder for each, such as ADAPTERS/{name}: a copy of this export, or a link to it. All speak by the chat "
        f"template of this export. {why} vLLM finds adapters by name only if it also lets clients load them, which "
        f"has to be allowed: {LOADING}",
        GUARD + ALLOWED + base.place + RESOLVER.format(base=shlex.quote(base.name)) + serve + '"$@"\n',
    )


ALLOWED = """[ "${RUNTIME_LORA:-}" = yes ] || {
  echo "RUNTIME_LORA: set it to yes to let clients with the key load adapters; vLLM finds none by name without" >&2
  exit 2
}
"""
RESOLVER = """adapters=$(cd "${{ADAPTERS:?names the folder of the adapters}}" && pwd)
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_PLUGINS=lora_filesystem_resolver
export VLLM_LORA_RESOLVER_CACHE_DIR="$adapters"
# vLLM takes an adapter only where its adapter_config.json names the base in the very words that vLLM was given: so the
# folder is given by a link of that name, in a folder of its own: paths among the arguments have to be absolute.
if [ -d "$base" ]; then
  base=$(cd "$base" && pwd)
  room=$(mktemp -d)
  mkdir -p "$(dirname "$room"/{base})"
  ln -s "$base" "$room"/{base}
  cd "$room"
  base={base}
fi
"""


READ = (
    "This server reads special tokens in whatever a content spells out: remove such spellings from text that you do "
    "not trust, or send token ids."
)


def by_template(folder: Path, template: str) -> str:
    """Writes it, and says vLLM's option for it, a line of its own."""
    if not template:
        return ""
    (folder / LAUNCH).mkdir(exist_ok=True)
    (folder / LAUNCH / TEMPLATE).write_text(template, encoding="utf-8")
    return f'--chat-template "$here/{TEMPLATE}" \\\n  '


def launches_merged(
    folder: Path, name: str, gap: Divergence | None, original: bool, template: str, scores: bool = False
) -> None:
    """`launch/vllm.sh` of a merged or whole model.

    Args:
        original: it was merged into the original weights.
        template: of `align.data.chat.template.contents_as_text`.
        scores: it is a reward model.
    """
    pooled = "--runner pooling " if scores else ""
    write_script(
        folder / LAUNCH / "vllm.sh",
        f"vLLM with this model, asked for as {name}. {POOLED if scores else ''}{gap_note(gap, original)} {GUARDED}",
        GUARD
        + SERVE.format(model='"$here/.."', name=shlex.quote(name))
        + f'{pooled}{by_template(folder, template)}"$@"\n',
    )


POOLED = (
    'It scores conversations: POST /classify {"model": …, "messages": […], "use_activation": false}, by vLLM\'s '
    "documentation; no receipt asked it. "
)


def launches_gguf(folder: Path, name: str, adapter: str | None, gap: Divergence | None, original: bool) -> None:
    """`launch/llama-server.sh` of a base and an adapter in GGUF, or of a whole model."""
    stem, what, off, lora = "model", "this model", "", ""
    if adapter is not None:
        stem, what, lora = "base", "base and adapter", f' --lora "$here/../{adapter}"'
        off = 'A request may turn the adapter off: "lora": [{"id": 0, "scale": 0}]. '
    bits = sorted(path.stem.removeprefix(f"{stem}-") for path in folder.glob(f"{stem}-*.gguf"))
    write_script(
        folder / LAUNCH / "llama-server.sh",
        f"llama.cpp's server with {what}, asked for as {name}. WEIGHTS is that of "
        f"the {stem}: {', '.join(bits)}. {off}{READ} {gap_note(gap, original)}",
        f'model="$here/../{stem}-${{WEIGHTS:-f16}}.gguf"\n'
        '[ -f "$model" ] || { echo "WEIGHTS: $model is not there" >&2; exit 2; }\n'
        f'exec llama-server --model "$model"{lora} \\\n'
        f'  --alias {shlex.quote(name)} --jinja "$@"\n',
    )


def gap_note(gap: Divergence | None, here: bool = False) -> str:
    """Args:
    here: the export holds the original weights.
    """
    if gap is None:
        return ""
    where = ", which are in this export," if here else ""
    return (
        f"It was trained on the base in NF4. On the original weights{where} the adapter is another model: "
        f"KL {gap.kl:.2g} nats a token from what was trained, the same top token on {gap.top1:.0%}."
    )


def write_script(path: Path, about: str, body: str) -> None:
    path.parent.mkdir(exist_ok=True)
    comment = textwrap.fill(about, 110, initial_indent="# ", subsequent_indent="# ", break_long_words=False)
    here = 'here=$(cd "$(dirname "$0")" && pwd)\n'
    path.write_text(f"#!/bin/sh\n{comment}\nset -eu\n{here}{body}", encoding="utf-8")
