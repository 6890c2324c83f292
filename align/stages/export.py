"""What others load: the adapter in PEFT's format, a model with it merged in, both as GGUF; each with a receipt."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.config.root import Config
from align.errors import InputError
from align.export.card import MADE_ANEW
from align.export.checks import InF32, adapter_checks, gguf_answer, gguf_checks, merged_checks
from align.export.converters import alike, convert_adapter, converters_in
from align.export.engines import TRANSFORMERS, freed, logits_of
from align.export.folder import read_json
from align.export.gguf import ADAPTER, F16, F32, base_file, gguf_bases, write_gguf
from align.export.launch import served_name
from align.export.merged import write_merged
from align.export.ollama import ollama_file
from align.export.receipt import (
    HEADS,
    RECEIPT,
    Check,
    accepting,
    agreeing,
    as_text,
    cells,
    checked_receipt,
    gap_in,
    require_asked,
    require_passed,
    write_receipt,
)
from align.export.trained import Trained, check_tokenizer, trained_model
from align.models.adapter_files import MERGEABLE, check_plain, read_adapter
from align.models.dequantised import (
    ABOUT,
    cast_weights,
    weights_dtype,
)
from align.models.load import (
    DTYPES,
    choose_device,
    choose_dtype,
)
from align.models.lowering import check_initial
from align.report import Report
from align.rollout.foreign import LLAMA_CPP, VLLM, Answer, engine_version, interpreter, why_unasked
from align.run import Artifact, Base, Input, Run, json_digest
from align.run.atomic import publish, workroom
from align.run.graph import evaluation_of
from align.stages import Inputs
from align.stages.exporting import (
    about,
    base_beside,
    bases_of,
    card,
    engines,
    gguf_source,
    into,
    launchers,
    lowered,
    merged_model,
    named_base,
)
from align.stages.lineage import label, start, tokenizer_of, trained_in
from align.track import peak_rss_mb
from align.types import Result


def inputs(config: Config) -> Inputs:
    method = config.method.name  # as it was told: `start` settles `auto`
    artifact, base, config = start(config, config.artifact, "artifact")
    if artifact.whole:
        raise InputError(
            "artifact",
            artifact.ref,
            "is a whole model already",
            f"Load {artifact.path} as it is, or export an adapter.",
        )
    if not artifact.manifest:
        check_stranger(artifact, base, method)
    records = {"artifact": artifact.as_input()}
    if (evaluation := evaluation_of(artifact.digest, Path(config.run.root).expanduser())) is not None:
        records["evaluation"] = Input(json_digest(evaluation))  # stands in the card: another is another export
    asked = {engine: engine_version(engine, engines(config)[engine]) for engine in engines_asked(config)}
    records["engines"] = Input(json_digest(asked), details=asked)  # one that was installed since is asked
    if config.export.name != "check":
        check_askable(config, asked)
    if config.export.name in ("gguf", "all"):
        converters_in(config.export.converters)
    if config.export.name == "check":
        records["asked"] = Input(secrets.token_hex(8))  # each time anew
    return Inputs(config, f"{label(base, config)}-{config.export.name}", base, records)


def kinds_of(config: Config) -> tuple[str, ...]:
    return tuple(DO) if config.export.name == "all" else (config.export.name,)


def engines_asked(config: Config) -> list[str]:
    """Beside transformers."""
    if config.export.name == "check":  # it is what its files say
        return [LLAMA_CPP, VLLM]
    return sorted({LLAMA_CPP if kind == "gguf" else VLLM for kind in kinds_of(config)})


def check_askable(config: Config, asked: dict[str, str]) -> None:
    """Raises: InputError: an engine is required that this export does not ask, or that is not there.

    Args:
        asked: each engine beside transformers, with its version; empty where it is not there.
    """
    for engine in config.export.require:
        if engine not in (TRANSFORMERS, *asked):
            problem = f"export={config.export.name} does not ask it"
            raise InputError("export.require", engine, problem, f"It asks {', '.join(sorted((TRANSFORMERS, *asked)))}.")
        if engine != TRANSFORMERS and not asked[engine]:
            problem = f"it cannot be asked: {why_unasked(engine, engines(config)[engine])}"
            raise InputError("export.require", engine, problem, "Install it, or leave it out of export.require.")


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
    base = run.base
    artifact = start(config, run.inputs["artifact"].path, "artifact").artifact
    kinds = kinds_of(config)
    found = read_adapter(artifact.path)
    check_plain(found, () if {"adapter", "gguf"} & set(kinds) else MERGEABLE)
    check_initial(config.method.name == "qlora", found.config)
    device = choose_device(config.device)
    tokenizer = tokenizer_of(artifact, base, config.data.template)
    dtype = choose_dtype(trained_in(artifact) or config.dtype, device)
    trained = trained_model(base, artifact.path, config.method.name, device, dtype, tokenizer)

    if config.export.name == "check":
        receipts = {folder.name: check(config, artifact, trained, folder) for folder in folders_of(config)}
        line = f"{config.export.path} is what was trained as {artifact.ref}"
    else:
        target, receipts = run.folder / "artifact", {}
        shutil.rmtree(target, ignore_errors=True)
        with publish(target) as whole:  # which stays only if every receipt is good
            for kind in kinds:
                folder = whole / kind if len(kinds) > 1 else whole
                folder.mkdir(exist_ok=True)
                home = target / kind if len(kinds) > 1 else target
                receipts[kind] = written(run, config, artifact, trained, kind, folder, home)
            require_asked(
                [check for checks in receipts.values() for check in checks], config.export.accept, config.export.require
            )
        line = f"{', '.join(kinds)} of {artifact.ref} in {target}"

    what = f"{artifact.ref} as {config.export.path or config.export.name}"
    report = Report(f"export: {run.name}", what)
    report.text(
        "The receipt: what was exported, loaded back as anyone would load it, beside the model that was trained "
        f"({'NF4 base' if trained.kind == 'nf4' else 'base'} and adapter, in fp32), on the same prompts, token by "
        "token. Differences in nats. An engine that was **not checked** may say anything."
        + (f" {MADE_ANEW}" if into(config, trained) == "original" and trained.kind == "nf4" else "")
    )
    for kind, checks in receipts.items():
        if len(receipts) > 1:
            report.text(f"**{kind}**")
        report.table(HEADS, cells(checks))
    report.write(run.folder / "report.html")
    return Result(metrics_of(base, receipts), (line,))


def written(
    run: Run, config: Config, artifact: Artifact, trained: Trained, kind: str, folder: Path, home: Path
) -> list[Check]:
    """One export: its files, what each engine says of them, the card and the receipt.

    Args:
        home: where `folder` will lie in the end.

    Raises:
        InputError: the receipt is not good, see `align.export.receipt.require_passed`.
    """
    made = (artifact.manifest.stage, artifact.manifest.name) if artifact.manifest else ("", "")
    name = served_name(*made) or artifact.path.name
    checks = accepting(DO[kind](config, trained, folder), config.export.accept)
    check_tokenizer(trained, folder)
    launchers(config, trained, kind, folder, home, name, gap_in(checks))
    text = card(run, config, artifact, trained, kind, folder, name, checks)
    (folder / "README.md").write_text(text, encoding="utf-8")
    write_receipt(folder, checks, trained.rows, about(config, artifact, trained, kind))
    print_checks(kind, checks)
    return checks


def adapter(config: Config, trained: Trained, folder: Path) -> list[Check]:
    """Writes the adapter, lowered, and the base that it knows; asks them back."""
    lowered(trained, folder)
    return adapter_checks(trained, folder, base_beside(config, trained), config.export.dtype, engines(config))


def merged(config: Config, trained: Trained, folder: Path) -> list[Check]:
    """Writes base and adapter as one model; asks it before it is cast, and back."""
    model = merged_model(config, trained)
    summed = logits_of(model, trained.rows)
    cast_weights(model, DTYPES[config.export.dtype])
    model.config.dtype = DTYPES[config.export.dtype]
    write_merged(folder, model, named_base(trained.base), tokenizer=trained.tokenizer, beside=Path(trained.base.path))
    del model
    freed()  # before others are loaded to compare
    return merged_checks(trained, folder, into(config, trained), config.export.dtype, summed, engines(config))


def gguf(config: Config, trained: Trained, folder: Path) -> list[Check]:
    """Writes base and adapter as GGUF, with a Modelfile; asks llama.cpp."""
    source, python = gguf_source(config, trained), interpreter(LLAMA_CPP, config.export.llama_cpp)
    bases = gguf_bases(bases_of(config), source, config.export.quantised, python)
    with workroom(folder / ADAPTER) as work:  # in what goes with a killed export
        write_gguf(folder, bases, lowered(trained, work / "adapter"), source)
    answer = gguf_answer(trained, folder / base_file(F16), folder / ADAPTER, engines(config))
    if answer is not None:
        starts = bool(answer.output["begins_with_bos"])
        text = ollama_file(folder, trained.tokenizer, starts, base_file(F16), ADAPTER)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    return asked_gguf(config, trained, folder, answer)


def asked_gguf(config: Config, trained: Trained, folder: Path, answer: Answer | None) -> list[Check]:
    def in_f32() -> InF32 | None:
        with workroom(bases_of(config) / "f32") as work:
            source, base, made = gguf_source(config, trained), work / base_file(F32), work / "adapter.gguf"
            source.convert(base, F32)
            plain = lowered(trained, work / "adapter")
            convert_adapter(source.converters, plain, source.folder, made, F32)
            pairs = ((base, folder / base_file(F16)), (made, folder / ADAPTER))
            other = next((name for pair in pairs if (name := alike(source.converters, *pair))), "")
            exact = gguf_answer(trained, base, made, engines(config), precise=True)
            return None if exact is None else InF32(exact, other)

    return gguf_checks(trained, folder, into(config, trained), engines(config), answer, in_f32)


DO: dict[str, Callable[[Config, Trained, Path], list[Check]]] = {"adapter": adapter, "merged": merged, "gguf": gguf}


def folders_of(config: Config) -> list[Path]:
    """Those with a receipt: `export.path` itself, the `artifact/` in it, or what `export=all` wrote there."""
    path = Path(config.export.path or "").expanduser()
    for place in (path, path / "artifact"):
        if (place / RECEIPT).is_file():
            return [place]
        if several := [place / kind for kind in DO if (place / kind / RECEIPT).is_file()]:
            return several
    return [path]


def check(config: Config, artifact: Artifact, trained: Trained, folder: Path) -> list[Check]:
    """An export that was made before, measured again. Its receipt is believed in nothing: what it is, its files say;
    what may be missed, `export.accept` says; and what the receipt claims has to be found again.

    Raises:
        CorruptFile: a file of it is not the one that the receipt speaks of, or the receipt claims another result.
        InputError: it is an export of something else, it misses a bound, or nothing that has one could be asked here.
    """
    said = checked_receipt(folder)
    wanted = about(config, artifact, trained, "check")
    for what in ("artifact", "base"):
        if said.get(what) != wanted[what]:
            problem = f"{folder.name} was made of another {what}"
            raise InputError("artifact", artifact.ref, problem, "Name the artifact that was exported.")
    if said.get("kind") != "adapter" and said.get("into") != wanted["into"]:
        problem = f"its receipt says that it is of {said.get('into')} weights, which would be another model"
        raise InputError("export.into", config.export.into, problem, "Say what it is: export.into=auto or original.")
    if (folder / ADAPTER).is_file():
        answer = gguf_answer(trained, folder / base_file(F16), folder / ADAPTER, engines(config))
        checks = asked_gguf(config, trained, folder, answer)
    elif (folder / "config.json").is_file():
        summed = logits_of(merged_model(config, trained), trained.rows)
        freed()
        checks = merged_checks(trained, folder, into(config, trained), weights_dtype(folder), summed, engines(config))
    else:
        beside = base_beside(config, trained, write=False)
        checks = adapter_checks(trained, folder, beside, config.export.dtype, engines(config))
    check_tokenizer(trained, folder)
    checks = accepting(checks, config.export.accept)
    print_checks(folder.name, checks)
    if not any(check.bound and check.found for check in checks):
        problem = "nothing could be asked here that would say whether it is what was trained"
        raise InputError("export.path", str(folder), problem, "Install the engine that runs it.")
    require_asked(checks, config.export.accept, config.export.require)
    agreeing(said, checks, skipped=[engine for engine, where in engines(config).items() if where == "none"])
    return checks


def print_checks(title: str, checks: list[Check]) -> None:
    """The receipt in the terminal. Raises: InputError: it is not good, see `align.export.receipt.require_passed`."""
    print(f"{title}\n{as_text(checks)}", flush=True)
    require_passed(checks)


def metrics_of(base: Base, receipts: dict[str, list[Check]]) -> dict[str, Any]:
    """The figures of what was exported, as it is loaded first; of all checks, under their names."""
    checks = [check for checks in receipts.values() for check in checks if check.found is not None]
    measured = {check.name: check.found.as_dict() for check in checks if check.found is not None}
    first = next((measured[check.name] for check in checks if check.bound is not None), {})
    figures = {key: first[key] for key in ("kl", "top1", "max_logprob") if first}
    about = {"base": base.id, "base_digest": base.digest, "peak_rss_mb": peak_rss_mb()}
    return about | figures | {"receipt": measured}
