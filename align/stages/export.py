"""What others load: an adapter in PEFT's format, a model with it merged in or one that is whole, GGUF; each with a
receipt."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.root import Config
from align.config.settings import replace_values
from align.core.errors import InputError, MissingArtifact, require
from align.core.files import parse_user_path
from align.core.types import StageResult
from align.data.chat.template import use_template
from align.export.converters import find_converters
from align.export.history import describe_data, describe_sampling, find_system_prompt, list_parents
from align.export.preflight import check_foreign_adapter, check_required_engines, find_engines, list_kinds
from align.export.receipt_rows import (
    CHOICES,
    MADE_ANEW,
    ReceiptCheck,
    as_text,
    check_agreement,
    mark_accepted,
    require_engines,
    require_passed,
    summarize_differences,
)
from align.models.base import adapter_folder, label
from align.rollout.engine_process import LLAMA_CPP, VLLM
from align.run import Artifact, Base, Input, Run, json_digest, write_json
from align.run.atomic import publish_folder
from align.run.figures import load_published_figures
from align.run.lineage import find_evaluation, find_origin, find_suite_collapse, list_training_data, list_training_steps
from align.run.manifest import compute_manifest_digests, read_manifest
from align.run.receipt import RECEIPT, read_verified_receipt, write_receipt
from align.run.signing import (
    PrivateKey,
    PublicKey,
    find_linked_base,
    load_private_key,
    load_public_key,
    sign_folder,
    verify_signature,
)
from align.run.weights import is_reward_adapter
from align.stages.runner import Inputs, find_input, find_start
from align.track import get_peak_rss_mb

if TYPE_CHECKING:
    from align.export.kinds import ExportOptions
    from align.export.trained_model import TrainedModel


PRELOAD = ("align.export.kinds",)
"""See `align.stages.load_stage`."""


def inputs(config: Config) -> Inputs:
    method = config.method.name  # as it was given: `start` settles `auto`
    artifact, base, config = find_start(config, config.artifact, "artifact")
    kinds = list_kinds(config.export.name, artifact)
    if artifact.whole:
        problem = f"{artifact.ref} is a whole model, and no adapter by a method"
        require(method in ("auto", "full"), "method", method, problem, "Drop method=.")
        config = replace_values(config, method=replace_values(config.method, name="full"))
    elif not artifact.manifest:
        check_foreign_adapter(artifact, base, method)
    records = {"artifact": artifact.as_input()}
    if (evaluation := find_evaluation(artifact.as_input(), config.run.folder)) is not None:
        # It stands in the card: another evaluation is another export.
        records["evaluation"] = Input(json_digest(dict(evaluation.metrics)))
    kind, where = config.export.name, engines_of(config)
    asked = find_engines(kind, where, is_reward_adapter(artifact.path))
    records["engines"] = Input(json_digest(asked), details=asked)  # one that was installed since is asked
    if kind != "check":
        check_required_engines(kind, config.export.require, asked, where)
    if "gguf" in kinds:
        find_converters(config.export.converters)
    if kind == "check":
        records["asked"] = Input(secrets.token_hex(8))  # each time anew
    signer = None if config.export.sign is None else load_private_key(config.export.sign, "export.sign")
    trusted = None if config.export.verify is None else load_public_key(config.export.verify, "export.verify")
    if key := signer or trusted:
        records["signer"] = Input(key.fingerprint)
    return Inputs(config, f"{label(base, config.method.name)}-{kind}", base, records, lambda: (signer, trusted))


def run(run: Run, config: Config, signer: PrivateKey | None, trusted: PublicKey | None) -> StageResult:
    """Args:
    signer: signs what is written; None where nobody does.
    trusted: has to have signed what is checked; None where nobody has to.
    """

    artifact = find_input(run, "artifact")
    options, checking = options_of(config), config.export.name == "check"
    folders = folders_of(config) if checking else []
    for folder in folders:
        if trusted is not None:
            verify_signature(folder, trusted, "export.path", str(folder))
    origin = find_origin(artifact, run.base, config.run.folder)
    claims = {folder: claimed(config, options, artifact, origin, folder) for folder in folders}
    trained = loaded(config, artifact, run.base, origin)

    if checking:
        receipts = {folder.name: check(run, config, options, trained, folder, claims[folder]) for folder in folders}
        line = f"{config.export.path} is what was trained as {artifact.ref}"
    else:
        kinds, target, receipts = list_kinds(config.export.name, artifact), run.folder / "artifact", {}
        shutil.rmtree(target, ignore_errors=True)
        with publish_folder(target) as whole:  # which stays only if every receipt is good
            for kind in kinds:
                folder = whole / kind if len(kinds) > 1 else whole
                folder.mkdir(exist_ok=True)
                home = target / kind if len(kinds) > 1 else target
                receipts[kind] = written(run, config, options, artifact, trained, kind, folder, home)
                if signer is not None:  # last: the signature covers the receipt
                    sign_folder(folder, signer)
            require_engines(
                [check for checks in receipts.values() for check in checks], config.export.accept, config.export.require
            )
        line = f"{', '.join(kinds)} of {artifact.ref} in {target}"

    metrics = metrics_of(run.base, receipts)
    if key := signer or trusted:
        metrics["signed_by"] = key.fingerprint
        line = f"{line}; signed by {key.fingerprint[:12]}"
        if trusted is not None and any(find_linked_base(folder) for folder in folders):
            line += ", but for the base that lies beside it"
    said = {MADE_ANEW: options.into == "original" and trained.kind == "nf4", CHOICES: trained.prompts.scores}
    if notes := [note for note, holds in said.items() if holds]:
        metrics["notes"] = notes
    return StageResult(metrics, (line,))


def loaded(config: Config, artifact: Artifact, base: Base, origin: Base) -> TrainedModel:
    """What was trained. An adapter that cannot be exported is refused before its base is loaded.

    Args:
        origin: the model that it grew from.
    """

    import torch

    from align.export.trained_model import load_trained_model
    from align.models.load import choose_device, choose_dtype, own_tokenizer

    scores = check_adapter(config, artifact, base) if not artifact.whole else False
    device = choose_device(config.device)
    tokenizer = own_tokenizer(artifact, base)
    use_template(tokenizer, config.data.template, config.data.template_kwargs)
    # A whole model is asked in fp32, which holds whatever its weights are kept in.
    dtype = torch.float32 if artifact.whole else choose_dtype(artifact.dtype or config.dtype, device)
    adapter, method = adapter_folder(artifact), config.method.name
    return load_trained_model(base, adapter, method, device, dtype, tokenizer, scores, origin)


def check_adapter(config: Config, artifact: Artifact, base: Base) -> bool:
    """Whether an adapter is a reward model's.

    Raises:
        CorruptFile, InputError: it cannot be exported as the configuration says.
    """

    from align.export.merged import check_untied
    from align.models.adapters import read_adapter
    from align.models.plain_lora import check_initial, check_plain

    adapter = read_adapter(artifact.path, "artifact")
    kinds = list_kinds(config.export.name, artifact)
    check_plain(adapter, will_merge=not {"adapter", "gguf"} & set(kinds))
    check_initial(config.method.name == "qlora", adapter.config)
    if "merged" in kinds:
        check_untied(base, adapter)
    return adapter.has_score_head


def engines_of(config: Config) -> dict[str, str]:
    """Where each engine is, or that it is not to be asked."""
    return {LLAMA_CPP: config.export.llama_cpp, VLLM: config.export.vllm}


def options_of(config: Config) -> ExportOptions:
    from align.export.kinds import ExportOptions
    from align.models.dequantised import DEQUANTISED

    export = config.export
    return ExportOptions(
        dtype=export.dtype,
        into=DEQUANTISED if config.method.name == "qlora" and export.into == "auto" else "original",
        bases=config.run.folder / "bases",
        with_base=export.base != "none",
        quantised=export.quantised,
        converters=export.converters,
        engines=engines_of(config),
    )


def written(
    run: Run, config: Config, options: ExportOptions, artifact: Artifact, trained: TrainedModel, kind: str,
    folder: Path, home: Path,
) -> list[ReceiptCheck]:  # fmt: skip
    """One export: its files, what each engine says of them, the card and the receipt.

    Args:
        home: where `folder` will lie in the end.

    Raises:
        InputError: the receipt is not good, see `align.export.receipt_rows.require_passed`.
    """

    from align.export.card import collect_export_facts, render_card
    from align.export.kinds import WRITERS, describe_export, write_launch_files
    from align.export.launch import make_served_name
    from align.export.trained_model import check_tokenizer

    made = (artifact.manifest.stage, artifact.manifest.name) if artifact.manifest else ("", "")
    name = make_served_name(*made) or artifact.path.name
    checks = mark_accepted(WRITERS[kind](options, trained, folder), config.export.accept)
    check_tokenizer(trained, folder)
    write_launch_files(options, trained, kind, folder, home, name, checks)
    facts = collect_export_facts(trained, kind, folder, name, checks, options.dtype, options.into)
    card = render_card(facts | history(run, config, artifact))
    (folder / "README.md").write_text(card, encoding="utf-8")
    rows = [check.as_dict() for check in checks]
    about = describe_export(options, trained.origin, kind, artifact.digest)
    about["difference"] = summarize_differences(checks)
    about["manifests"] = held_of(artifact, config.run.folder)
    write_receipt(folder, rows, trained.rows, about)
    print_checks(run, kind, checks)
    return checks


def held_of(artifact: Artifact, root: Path) -> dict[str, dict[str, str]]:
    """Return the manifests of an artifact's run and of its evaluation, by digests, as a receipt holds them."""
    if artifact.manifest is None:
        return {}
    folders = {artifact.manifest.ref: artifact.path.parent}
    if (evaluation := find_evaluation(artifact.as_input(), root)) is not None:
        folders[evaluation.ref] = root / evaluation.stage / evaluation.name
    return {run: compute_manifest_digests(folder, read_manifest(folder)).as_json() for run, folder in folders.items()}


def history(run: Run, config: Config, artifact: Artifact) -> dict[str, Any]:
    """What a card says of how an export came to be, and how good it was found."""

    from align.export.card import list_licences

    root, manifest = config.run.folder, artifact.manifest
    steps = list_training_steps(manifest, artifact.digest, root) if manifest else []
    data, scores = list_training_data(artifact, root), not artifact.whole and is_reward_adapter(artifact.path)
    facts: dict[str, Any] = {
        "name": f"{run.manifest.stage}-{run.name}", "parents": list_parents(steps), "seed": config.seed,
        "data": data, "licences": list_licences(data, find_origin(artifact, run.base, root)),
        "system": find_system_prompt(steps, scores),
    }  # fmt: skip
    metrics = load_published_figures(artifact.path.parent, manifest) if manifest else {}
    collapse: Mapping[str, Any] = {}
    if manifest and scores:
        facts |= {"accuracy": metrics, "measured": describe_data(manifest, manifest.config["stage"]["held_out"])}
        if manifest.config["data"].get("reasoning") == "hide":
            facts["notes"] = "It was trained on answers without their reasoning: leave that out of what it is to score."
    if manifest and "loss_after" in metrics and manifest.stage in ("sft", "full"):
        facts |= {"losses": metrics, "measured": describe_data(manifest)}
    if (evaluation := find_evaluation(artifact.as_input(), root)) is not None:
        measured = load_published_figures(root / evaluation.stage / evaluation.name, evaluation)
        collapse = measured.get("collapse", {})
        # An answer that is quoted there may look like a path of this machine.
        figures = {key: value for key, value in measured.items() if key not in ("variety", "collapse")}
        facts |= {"metrics": figures, "judge": measured.get("judge", "")}
        facts |= {"measured": describe_data(evaluation), "sampled": describe_sampling(evaluation.config)}
    if collapse.get("verdict") != "collapsed":
        collapse = find_suite_collapse(artifact.as_input(), root) or collapse
    return facts | ({"collapse": collapse} if collapse else {})


def folders_of(config: Config) -> list[Path]:
    """Those with a receipt: `export.path` itself, the `artifact/` in it, or what `export=all` wrote there."""

    from align.export.kinds import WRITERS

    path = parse_user_path(config.export.path or "", "export.path")
    for place in (path, path / "artifact"):
        if (place / RECEIPT).is_file():
            return [place]
        if several := [place / kind for kind in WRITERS if (place / kind / RECEIPT).is_file()]:
            return several
    problem = f"there is no {RECEIPT} in it" if path.is_dir() else "there is no such folder"
    raise MissingArtifact("export.path", config.export.path, problem, "Name a folder that stage=export wrote.")


def claimed(config: Config, options: ExportOptions, artifact: Artifact, base: Base, folder: Path) -> dict[str, Any]:
    """The receipt of an export that was made before. Asked before any weights are loaded.

    Raises:
        MissingArtifact, CorruptFile: see `read_verified_receipt`.
        InputError: it is an export of something else.
    """

    from align.export.kinds import describe_export

    receipt = read_verified_receipt(folder, find_linked_base(folder))
    wanted = describe_export(options, base, "check", artifact.digest)
    for what in ("artifact", "base"):
        if receipt.get(what) != wanted[what]:
            problem = f"{folder.name} was made of another {what}"
            raise InputError("artifact", artifact.ref, problem, "Name the artifact that was exported.")
    if receipt.get("kind") != "adapter" and receipt.get("into") != wanted["into"]:
        problem = f"its receipt says that it is of {receipt.get('into')} weights, which would be another model"
        raise InputError("export.into", config.export.into, problem, "Say what it is: export.into=auto or original.")
    return receipt


def check(
    run: Run, config: Config, options: ExportOptions, trained: TrainedModel, folder: Path, receipt: dict[str, Any]
) -> list[ReceiptCheck]:
    """An export that was made before, measured again. Its receipt is believed in nothing: what it is, its files say;
    what may be missed, `export.accept` says; and what the receipt claims has to be found again.

    Raises:
        CorruptFile: the receipt claims another result.
        InputError: it misses a bound, or nothing that has one could be asked here.
    """

    from align.export.kinds import measure_export
    from align.export.trained_model import check_tokenizer

    checks = measure_export(options, trained, folder)
    check_tokenizer(trained, folder)
    checks = mark_accepted(checks, config.export.accept)
    print_checks(run, folder.name, checks)
    if not any(check.bound and check.found for check in checks):
        problem = "nothing could be asked here that would say whether it is what was trained"
        raise InputError("export.path", str(folder), problem, "Install the engine that runs it.")
    require_engines(checks, config.export.accept, config.export.require)
    check_agreement(receipt, checks, skipped=[engine for engine, where in options.engines.items() if where == "none"])
    return checks


def print_checks(run: Run, title: str, checks: list[ReceiptCheck]) -> None:
    """The receipt in the terminal. One that is not good is kept as `checks.json` of the run, which publishes nothing.

    Raises:
        InputError: it is not good, see `align.export.receipt_rows.require_passed`.
    """

    print(f"{title}\n{as_text(checks)}", flush=True)
    try:
        require_passed(checks)
    except InputError:
        write_json(run.folder / "checks.json", [check.as_dict() for check in checks])
        raise


def metrics_of(base: Base, receipts: dict[str, list[ReceiptCheck]]) -> dict[str, Any]:
    """Return the headline figures, which are those of the shipped files as they are loaded first; those before the
    cast, under names of their own; those of all checks; and the checks themselves, for the report."""

    checks = [check for checks in receipts.values() for check in checks]
    measured = {check.name: check.found.as_dict() for check in checks if check.found is not None}
    differences = summarize_differences(checks)
    figures: dict[str, Any] = {}
    for kind, ending in (("shipped", ""), ("before_cast", "_before_cast")):
        if (found := differences[kind]) is not None:
            figures |= {f"{key}{ending}": found[key] for key in ("kl", "top1", "max_logprob")}
    about = {"base": base.id, "base_digest": base.digest, "peak_rss_mb": get_peak_rss_mb()}
    return about | figures | {"receipt": measured, "checks": [check.as_dict() for check in checks]}
