"""What others load: the adapter in PEFT's format, or a model with it merged in; each with a receipt of what it says."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from align.config.root import Config
from align.data.sources import licence_of
from align.errors import InputError
from align.export.adapter import MERGEABLE, check_plain, check_vocabulary, read_adapter, write_adapter
from align.export.bases import ABOUT, DEQUANTISED, cast, dequantised_beside, dequantised_name, weights_dtype
from align.export.card import licence_in, render_card
from align.export.engines import freed, logits_of
from align.export.folder import publish, read_json
from align.export.lowering import check_initial, initial_factors
from align.export.merged import merge, write_merged
from align.export.receipt import (
    HEADS,
    RECEIPT,
    Row,
    accepting,
    agreeing,
    as_text,
    cells,
    checked_receipt,
    judged,
    write_receipt,
)
from align.export.trained import Trained, adapter_rows, check_tokenizer, merged_rows, trained_model
from align.models.base import BUILT_IN
from align.models.load import (
    DTYPES,
    adapter_config,
    choose_device,
    choose_dtype,
    in_fp32,
    load_base,
    load_tokenizer,
    name_of,
)
from align.report import Report
from align.run import Artifact, Base, Run, json_digest
from align.stages import Inputs
from align.stages.lineage import data_behind, evaluation_of, label, parents_of, start, tokenizer_of, trained_in
from align.track import peak_rss_mb
from align.types import Result


def inputs(config: Config) -> Inputs:
    told = config.method.name
    artifact, base = start(config, config.artifact, "artifact")
    if artifact.whole:
        raise InputError(
            "artifact",
            artifact.ref,
            "is a whole model already",
            f"Load {artifact.path} as it is, or export an adapter.",
        )
    if not artifact.manifest:
        check_stranger(artifact, base, told)
    records = {"artifact": artifact.record()}
    if (evaluation := evaluation_of(artifact, Path(config.run.root).expanduser())) is not None:
        records["evaluation"] = {"digest": json_digest(evaluation)}  # stands in the card: another is another export
    if config.export.name == "check":
        records["asked"] = {"digest": secrets.token_hex(8)}  # each time anew
    return Inputs(f"{label(base, config)}-{config.export.name}", base, records)


def check_stranger(artifact: Artifact, base: Base, method: str) -> None:
    """Raises: InputError: an adapter that no run here made is of another base, or nobody says how it was trained."""
    known = artifact.path / ABOUT
    digest = read_json(known, "Export it again.").get("digest") if known.is_file() else None
    if digest and digest != base.digest:
        problem = f"its {ABOUT} names another base ({str(digest)[:12]}) than {base.id} ({base.digest[:12]})"
        raise InputError("artifact", artifact.ref, problem, "Name the base it was trained on: model.path=.")
    if method == "auto":
        problem = f"nothing says how {artifact.ref} was trained"
        raise InputError("method", method, problem, "Say method=qlora (on an NF4 base) or method=lora.")


def run(run: Run, config: Config) -> Result:
    base, (artifact, _) = Base(**run.manifest["base"]), start(config, run.inputs["artifact"]["path"], "artifact")
    found = read_adapter(artifact.path)
    check_plain(found, () if config.export.name == "adapter" else MERGEABLE)
    check_initial(config.method.name == "qlora", found.config)
    device = choose_device(config.device)
    tokenizer = tokenizer_of(artifact, base, config.data.template)
    dtype = choose_dtype(trained_in(artifact) or config.dtype, device)
    trained = trained_model(base, artifact.path, config.method.name, device, dtype, tokenizer)

    if config.export.name == "check":
        rows = check(config, artifact, trained)
        line = f"{config.export.path} is what was trained as {artifact.ref}"
    else:
        target = run.folder / "artifact"
        shutil.rmtree(target, ignore_errors=True)
        with publish(target) as folder:  # which stays only if the receipt is good
            rows = accepting(DO[config.export.name](config, trained, folder), config.export.accept)
            check_tokenizer(trained, folder)
            (folder / "README.md").write_text(card(run, config, artifact, trained, rows), encoding="utf-8")
            write_receipt(folder, rows, trained.rows, about(config, artifact, trained))
            shown(rows, config)
        line = f"{config.export.name} of {artifact.ref} in {target}"

    report = Report(f"export: {run.manifest['name']}", f"{artifact.ref} as {config.export.name}")
    report.text(
        "The receipt: what was exported, loaded back as anyone would load it, beside the model that was trained "
        f"({'NF4 base' if trained.kind == 'nf4' else 'base'} and adapter, in fp32), on the same prompts, token by "
        "token. Differences in nats. An engine that was **not checked** may say anything."
    )
    report.table(HEADS, cells(rows))
    report.write(run.folder / "report.html")
    return Result(metrics_of(base, rows), (line,))


def adapter(config: Config, trained: Trained, folder: Path) -> list[Row]:
    """Writes the adapter, lowered, and the base that it knows; asks them back."""
    check_vocabulary(trained.tokenizer, load_tokenizer(trained.base))
    read, initial = adapter_config(trained.adapter), None
    if isinstance(read.get("init_lora_weights"), str):
        base = in_fp32(load_base(trained.base, trained.method, trained.device, trained.dtype))
        initial = initial_factors(base, read)
    named = named_base(trained.base)
    write_adapter(
        folder, trained.adapter, named, tokenizer=trained.tokenizer, beside=Path(trained.base.path), initial=initial
    )
    return adapter_rows(trained, folder, base_beside(config, trained), config.export.dtype)


def merged(config: Config, trained: Trained, folder: Path) -> list[Row]:
    """Writes base and adapter as one model; asks it before it is cast, and back."""
    model = merged_model(config, trained)
    summed = logits_of(model, trained.rows)
    cast(model, DTYPES[config.export.dtype])
    model.config.dtype = DTYPES[config.export.dtype]
    write_merged(folder, model, named_base(trained.base), tokenizer=trained.tokenizer, beside=Path(trained.base.path))
    del model
    freed()  # before others are loaded to compare
    return merged_rows(trained, folder, merged_into(config, trained), config.export.dtype, summed)


def merged_model(config: Config, trained: Trained) -> Any:
    """In fp32."""
    method = trained.method if merged_into(config, trained) == DEQUANTISED else "lora"
    base = in_fp32(load_base(trained.base, method, trained.device, trained.dtype))
    return merge(base, trained.adapter, torch.float32)


DO: dict[str, Callable[[Config, Trained, Path], list[Row]]] = {"adapter": adapter, "merged": merged}


def check(config: Config, artifact: Artifact, trained: Trained) -> list[Row]:
    """An export that was made before, measured again. Its receipt is believed in nothing: what it is, its files say;
    what may be missed, `export.accept` says; and what the receipt claims has to be found again.

    Raises:
        CorruptFile: a file of it is not the one that the receipt speaks of, or the receipt claims another result.
        InputError: it is an export of something else, or it misses a bound.
    """
    folder = Path(config.export.path or "").expanduser()
    folder = folder / "artifact" if (folder / "artifact" / RECEIPT).is_file() else folder
    said = checked_receipt(folder)
    wanted = about(config, artifact, trained)
    for what in ("artifact", "base"):
        if said.get(what) != wanted[what]:
            problem = f"{folder.name} was made of another {what}"
            raise InputError("artifact", artifact.ref, problem, "Name the artifact that was exported.")
    if (folder / "config.json").is_file():
        summed = logits_of(merged_model(config, trained), trained.rows)
        freed()
        rows = merged_rows(trained, folder, merged_into(config, trained), weights_dtype(folder), summed)
    else:
        rows = adapter_rows(trained, folder, base_beside(config, trained, write=False), config.export.dtype)
    check_tokenizer(trained, folder)
    rows = accepting(rows, config.export.accept)
    shown(rows, config)
    agreeing(said, rows)
    return rows


def base_beside(config: Config, trained: Trained, write: bool = True) -> Path | None:
    """The dequantised base beside the runs, written where it is not there if `write`; None where there is none."""
    if trained.kind != "nf4" or config.export.base == "none":
        return None
    dtype, bases = DTYPES[config.export.dtype], Path(config.run.root).expanduser() / "bases"
    named = named_base(trained.base)
    if not write and not (bases / dequantised_name(trained.base, named, trained.dtype, dtype)).is_dir():
        return None
    return dequantised_beside(bases, trained.base, named, trained.dtype, dtype, trained.device, trained.tokenizer)


def merged_into(config: Config, trained: Trained) -> str:
    return DEQUANTISED if trained.kind == "nf4" and config.export.into == "auto" else "original"


def about(config: Config, artifact: Artifact, trained: Trained) -> dict[str, Any]:
    """What a receipt speaks of, and how it was made."""
    made = {"kind": config.export.name, "dtype": config.export.dtype, "into": merged_into(config, trained)}
    return {**made, "base": named_base(trained.base), "artifact": artifact.digest}


def named_base(base: Base) -> dict[str, str]:
    """The base as another machine may know it: `id`, `revision`, `digest`. What came from no hub has no revision, and
    is called by its folder's name: a path is nobody's business, and `models/mine` would pass for a repository."""
    known = base.revision or base.id in BUILT_IN
    return {
        "id": base.id if known else Path(base.id).name, "revision": base.revision or "", "digest": base.digest,
    }  # fmt: skip


def shown(rows: list[Row], config: Config) -> None:
    """The receipt in the terminal. Raises: InputError: it is not good, see `align.export.receipt.judged`."""
    print(as_text(rows), flush=True)
    judged(rows, config.export.require)


def card(run: Run, config: Config, artifact: Artifact, trained: Trained, rows: list[Row]) -> str:
    root = Path(config.run.root).expanduser()
    facts: dict[str, Any] = {
        "name": f"{run.manifest['stage']}-{run.manifest['name']}", "kind": config.export.name,
        "base": named_base(trained.base), "method": trained.method, "parents": parents_of(artifact, root),
        "seed": config.seed, "receipt": rows, "data": data_behind(artifact),
        "licences": licences(artifact, trained.base), "dtype": config.export.dtype,
        "into": merged_into(config, trained),
        "precision": "nf4" if trained.kind == "nf4" else name_of(trained.dtype),
    }  # fmt: skip
    if (evaluation := evaluation_of(artifact, root)) is not None:
        facts |= {"metrics": evaluation, "judge": evaluation.get("judge", "")}
    return render_card(facts)


def licences(artifact: Artifact, base: Base) -> list[tuple[str, str]]:
    """What the export was made of, and under which licence that is; empty where nobody says."""
    made_of = [(f"base {named_base(base)['id']}", licence_in(Path(base.path)))]
    return made_of + [(f"data {name}", licence_of(name)) for name in data_behind(artifact)]


def metrics_of(base: Base, rows: list[Row]) -> dict[str, Any]:
    """The figures of what was exported, as it is loaded first; of the other rows, under their names."""
    measured = [(row, row.found.as_dict()) for row in rows if row.found is not None]
    first = next(found for row, found in measured if row.what in DO)
    figures = {
        "base": base.id,
        "base_digest": base.digest,
        **{key: first[key] for key in ("kl", "top1", "max_logprob")},
    }
    return figures | {"receipt": {row.name: found for row, found in measured}, "peak_rss_mb": peak_rss_mb()}
