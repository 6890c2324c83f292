"""What `stage=export` makes of a configuration: the models that leave, their names, what stands beside them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from align.config.root import Config
from align.data.engine_template import contents_as_text
from align.data.sources import licence_of
from align.export.adapter import rank_of, write_adapter
from align.export.card import licence_in, render_card
from align.export.converters import converters_in
from align.export.gguf import ADAPTER, Source
from align.export.launch import LAUNCH, Served, launches_adapter, launches_gguf, launches_merged
from align.export.merged import merge
from align.export.receipt import Check
from align.export.trained import Trained
from align.models.adapters import adapter_config
from align.models.base import BUILT_IN
from align.models.dequantised import DEQUANTISED, dequantised, dequantised_beside, dequantised_name
from align.models.load import DTYPES, check_added_tokens, in_fp32, load_base, load_tokenizer, name_of
from align.models.lowering import initial_factors
from align.ops.divergence import Divergence
from align.rollout.foreign import LLAMA_CPP, VLLM
from align.run import Artifact, Base, Run
from align.run.graph import evaluation_of, trained_through
from align.stages.lineage import data_behind


def engines(config: Config) -> dict[str, str]:
    """Where each engine is, or that it is not to be asked."""
    return {LLAMA_CPP: config.export.llama_cpp, VLLM: config.export.vllm}


def bases_of(config: Config) -> Path:
    return Path(config.run.root).expanduser() / "bases"


def into(config: Config, trained: Trained) -> str:
    """The weights that a merge and a GGUF base are made of."""
    return DEQUANTISED if trained.kind == "nf4" and config.export.into == "auto" else "original"


def named_base(base: Base) -> dict[str, str]:
    """The base as another machine may know it: `id`, `revision`, `digest`. What came from no hub has no revision, and
    is called by its folder's name: a path is nobody's business, and `models/mine` would pass for a repository."""
    known = base.revision or base.id in BUILT_IN
    return {
        "id": base.id if known else Path(base.id).name, "revision": base.revision or "", "digest": base.digest,
    }  # fmt: skip


def about(config: Config, artifact: Artifact, trained: Trained, kind: str) -> dict[str, Any]:
    """What a receipt speaks of, and how it was made."""
    made = {"kind": kind, "dtype": "float16" if kind == "gguf" else config.export.dtype, "into": into(config, trained)}
    return {**made, "base": named_base(trained.base), "artifact": artifact.digest}


def lowered(trained: Trained, folder: Path) -> Path:
    """Writes the adapter as plain LoRA into a folder, which may be there."""
    folder.mkdir(exist_ok=True)
    check_added_tokens(trained.tokenizer, load_tokenizer(trained.base))
    read, initial = adapter_config(trained.adapter, "artifact", alone=True), None
    if isinstance(read.get("init_lora_weights"), str):
        base = in_fp32(load_base(trained.base, trained.method, trained.device, trained.dtype))
        initial = initial_factors(base, read)
    write_adapter(
        folder, trained.adapter, named_base(trained.base), tokenizer=trained.tokenizer,
        beside=Path(trained.base.path), initial=initial,
    )  # fmt: skip
    return folder


def merged_model(config: Config, trained: Trained) -> Any:
    """In fp32."""
    method = trained.method if into(config, trained) == DEQUANTISED else "lora"
    base = in_fp32(load_base(trained.base, method, trained.device, trained.dtype))
    return merge(base, trained.adapter, torch.float32)


def plain_base(config: Config, trained: Trained) -> Any:
    """The base without its adapter, in fp32: NF4 dequantised, or as it was published."""
    if into(config, trained) == DEQUANTISED:
        return dequantised(load_base(trained.base, trained.method, trained.device, trained.dtype), torch.float32)
    return in_fp32(load_base(trained.base, "lora", trained.device, trained.dtype))


def base_beside(config: Config, trained: Trained, write: bool = True) -> Path | None:
    """The dequantised base beside the runs, written where it is not there if `write`; None where there is none."""
    folder = base_folder(config, trained)
    if folder is None or not (write or folder.is_dir()):
        return None
    dtype, named = DTYPES[config.export.dtype], named_base(trained.base)
    return dequantised_beside(
        folder.parent, trained.base, named, trained.dtype, dtype, trained.device, trained.tokenizer
    )


def base_folder(config: Config, trained: Trained) -> Path | None:
    """Where that base is to lie."""
    if trained.kind != "nf4" or config.export.base == "none":
        return None
    named, dtype = named_base(trained.base), DTYPES[config.export.dtype]
    return bases_of(config) / dequantised_name(trained.base, named, trained.dtype, dtype)


def gguf_source(config: Config, trained: Trained) -> Source:
    named = named_base(trained.base) | {"quantised_from": name_of(trained.dtype)}
    return Source(
        named, into(config, trained), lambda: plain_base(config, trained), Path(trained.base.path),
        trained.tokenizer, converters_in(config.export.converters),
    )  # fmt: skip


def launchers(
    config: Config, trained: Trained, kind: str, folder: Path, home: Path, name: str, gap: Divergence | None
) -> None:
    """The files that start an engine on an export.

    Args:
        home: where `folder` will lie in the end.
    """
    template = contents_as_text(trained.tokenizer)
    if kind == "adapter":
        named, beside = named_base(trained.base), base_folder(config, trained)
        seen = os.path.relpath(beside, home / LAUNCH) if beside is not None else ""
        revision = "" if named["id"] in BUILT_IN else named["revision"]
        launches_adapter(folder, name, Served(named["id"], seen, revision), rank_of(folder), gap, template)
    elif kind == "merged":
        launches_merged(folder, name, gap, into(config, trained) == "original", template)
    else:
        launches_gguf(folder, name, ADAPTER, gap, into(config, trained) == "original")


def card(
    run: Run,
    config: Config,
    artifact: Artifact,
    trained: Trained,
    kind: str,
    folder: Path,
    name: str,
    checks: list[Check],
) -> str:
    root = Path(config.run.root).expanduser()
    parents = trained_through(artifact.manifest, artifact.digest, root) if artifact.manifest else []
    data = data_behind(artifact, root)
    facts: dict[str, Any] = {
        "name": f"{run.manifest.stage}-{run.name}", "kind": kind,
        "served": name if (folder / LAUNCH).is_dir() else "", "modelfile": (folder / "Modelfile").is_file(),
        "base": named_base(trained.base), "method": trained.method, "parents": parents,
        "seed": config.seed, "receipt": checks, "data": data,
        "licences": licences(data, trained.base), "dtype": config.export.dtype,
        "into": into(config, trained),
        "precision": "nf4" if trained.kind == "nf4" else name_of(trained.dtype),
    }  # fmt: skip
    if (evaluation := evaluation_of(artifact.digest, root)) is not None:
        facts |= {"metrics": evaluation, "judge": evaluation.get("judge", "")}
    return render_card(facts)


def licences(data: list[str], base: Base) -> list[tuple[str, str]]:
    """What the export was made of, and under which licence that is; empty where nobody says."""
    made_of = [(f"base {named_base(base)['id']}", licence_in(Path(base.path)))]
    return made_of + [(f"data {name}", licence_of(name)) for name in data]
