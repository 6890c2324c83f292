"""`stage=export`: write a trained artifact for other programs, or check an export against it.

for each kind (an adapter in PEFT's format, a merged or whole model, GGUF):
    write the files
    load them with every engine and compare the logits with those of the artifact as it was trained
    write the model card and the receipt, which holds the differences
publish the folder if all differences are within their bounds
"""

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
from align.data.chat.template import set_chat_template
from align.export.converters import find_converters
from align.export.history import describe_data, describe_sampling, find_system_prompt, list_lineage_runs
from align.export.preflight import (
    find_engine_versions,
    list_export_kinds,
    require_installed_engines,
    require_matching_base_and_method,
)
from align.export.receipt_rows import (
    CHOICES,
    MADE_ANEW,
    ReceiptCheck,
    format_checks,
    mark_accepted,
    require_engines,
    require_passed,
    require_same_measurements,
    summarize_differences,
)
from align.models.base import build_run_label, find_adapter_folder
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
from align.stages.runner import StageInputs, load_input_artifact, resolve_stage_start
from align.track import get_peak_rss_mb

if TYPE_CHECKING:
    from align.export.kinds import ExportOptions
    from align.export.trained_model import TrainedModel


PRELOAD = ("align.export.kinds",)
"""Modules with torch that `run` imports, loaded before it and before forks; see `align.stages.load_stage`."""


def inputs(config: Config) -> StageInputs:
    """Resolve the artifact to export and all that its export depends on: base, evaluation, engines, signing key."""
    method = config.method.name  # from the command line; `resolve_stage_start` replaces `auto`
    artifact, base, config = resolve_stage_start(config, config.artifact, "artifact")
    kinds = list_export_kinds(config.export.name, artifact)
    if artifact.whole:
        problem = f"{artifact.ref} is a whole model, not an adapter, so it has no method"
        require(method in ("auto", "full"), "method", method, problem, "Drop method=.")
        config = replace_values(config, method=replace_values(config.method, name="full"))
    elif not artifact.manifest:
        require_matching_base_and_method(artifact, base, method)
    records = {"artifact": artifact.as_input()}
    if (evaluation := find_evaluation(artifact.as_input(), config.run.folder)) is not None:
        # The model card quotes it, so another evaluation makes another export.
        records["evaluation"] = Input(json_digest(dict(evaluation.metrics)))
    kind = config.export.name
    engine_settings = get_engine_settings(config)
    engines = find_engine_versions(kind, engine_settings, is_reward_adapter(artifact.path))
    # An engine that was installed since the last export makes another export, which is checked with it too.
    records["engines"] = Input(json_digest(engines), details=engines)
    if kind != "check":
        require_installed_engines(kind, config.export.require, engines, engine_settings)
    if "gguf" in kinds:
        find_converters(config.export.converters)
    if kind == "check":
        records["asked"] = Input(secrets.token_hex(8))  # each check is a new run
    signer = None if config.export.sign is None else load_private_key(config.export.sign, "export.sign")
    trusted = None if config.export.verify is None else load_public_key(config.export.verify, "export.verify")
    if key := signer or trusted:
        records["signer"] = Input(key.fingerprint)
    return StageInputs(
        config, f"{build_run_label(base, config.method.name)}-{kind}", base, records, lambda: (signer, trusted)
    )


def run(run: Run, config: Config, signer: PrivateKey | None, trusted: PublicKey | None) -> StageResult:
    """Write an adapter or model in the formats of `export=` and check its logits, or check an earlier export.

    Args:
        signer: key that signs the export; None for no signature.
        trusted: key that must have signed the export to check; None to check no signature.
    """
    artifact = load_input_artifact(run, "artifact")
    options = build_export_options(config)
    is_check = config.export.name == "check"
    folders = find_exported_folders(config) if is_check else []
    for folder in folders:
        if trusted is not None:
            verify_signature(folder, trusted, "export.path", str(folder))
    origin = find_origin(artifact, run.base, config.run.folder)
    old_receipts = {folder: read_receipt(config, options, artifact, origin, folder) for folder in folders}
    trained = load_artifact_as_trained(config, artifact, run.base, origin)

    checks_by_kind: dict[str, list[ReceiptCheck]] = {}
    if is_check:
        for folder in folders:
            checks_by_kind[folder.name] = check_export(run, config, options, trained, folder, old_receipts[folder])
        line = f"{config.export.path} equals the trained model {artifact.ref}"
    else:
        kinds = list_export_kinds(config.export.name, artifact)
        target = run.folder / "artifact"
        shutil.rmtree(target, ignore_errors=True)
        with publish_folder(target) as temporary:  # renamed to `target` only if all checks pass
            for kind in kinds:
                folder = temporary / kind if len(kinds) > 1 else temporary
                folder.mkdir(exist_ok=True)
                target_folder = target / kind if len(kinds) > 1 else target
                checks_by_kind[kind] = write_export(
                    run, config, options, artifact, trained, kind, folder, target_folder
                )
                if signer is not None:  # after the receipt, which the signature covers
                    sign_folder(folder, signer)
            checks = [check for checks in checks_by_kind.values() for check in checks]
            require_engines(checks, config.export.accept, config.export.require)
        line = f"{', '.join(kinds)} of {artifact.ref} in {target}"

    metrics = build_metrics(run.base, checks_by_kind)
    if key := signer or trusted:
        metrics["signed_by"] = key.fingerprint
        line = f"{line}; signed by {key.fingerprint[:12]}"
        if trusted is not None and any(find_linked_base(folder) for folder in folders):
            line += ", except the base beside it"
    notes = []
    if options.into == "original" and trained.kind == "nf4":
        notes.append(MADE_ANEW)
    if trained.prompts.is_reward_model:
        notes.append(CHOICES)
    if notes:
        metrics["notes"] = notes
    return StageResult(metrics, (line,))


def load_artifact_as_trained(config: Config, artifact: Artifact, base: Base, origin: Base) -> TrainedModel:
    """Load the artifact's model in the precision in which it was trained, such as an NF4 base with its adapter.

    Raises InputError for an adapter that cannot be exported, before its base is loaded.

    Args:
        origin: the model at the start of the lineage, see `find_origin`.
    """
    import torch

    from align.export.trained_model import load_trained_model
    from align.models.load import choose_device, choose_dtype, load_own_tokenizer

    has_score_head = not artifact.whole and require_exportable_adapter(config, artifact, base)
    device = choose_device(config.device)
    tokenizer = load_own_tokenizer(artifact, base)
    set_chat_template(tokenizer, config.data.template, config.data.template_kwargs)
    # A whole model is loaded in fp32, which represents the weights of every dtype exactly.
    dtype = torch.float32 if artifact.whole else choose_dtype(artifact.dtype or config.dtype, device)
    adapter = find_adapter_folder(artifact)
    return load_trained_model(base, adapter, config.method.name, device, dtype, tokenizer, has_score_head, origin)


def require_exportable_adapter(config: Config, artifact: Artifact, base: Base) -> bool:
    """Raise InputError if an adapter cannot be exported as configured, or else return True if it is a reward model.

    Raises:
        CorruptFile, InputError: it cannot be exported.
    """
    from align.export.merged import require_untied_base
    from align.models.adapters import read_adapter
    from align.models.plain_lora import refuse_unknown_residual, refuse_unsupported_adapter

    adapter = read_adapter(artifact.path, "artifact")
    kinds = list_export_kinds(config.export.name, artifact)
    refuse_unsupported_adapter(adapter, will_merge=not {"adapter", "gguf"} & set(kinds))
    refuse_unknown_residual(config.method.name == "qlora", adapter.config)
    if "merged" in kinds:
        require_untied_base(base, adapter)
    return adapter.has_score_head


def get_engine_settings(config: Config) -> dict[str, str]:
    """Return the configured Python interpreters of the engines that check exports: name → path, `auto` or `none`.

    The engines are vLLM and llama.cpp.
    """
    return {LLAMA_CPP: config.export.llama_cpp, VLLM: config.export.vllm}


def build_export_options(config: Config) -> ExportOptions:
    """Build the ExportOptions, such as dtype, quantisation and engines, from `export=` and `method=`."""
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
        engines=get_engine_settings(config),
    )


def write_export(
    run: Run,
    config: Config,
    options: ExportOptions,
    artifact: Artifact,
    trained: TrainedModel,
    kind: str,
    folder: Path,
    target: Path,
) -> list[ReceiptCheck]:
    """Write an export of one kind to a folder, check its logits, add model card and receipt, and return the checks.

    The kind is an adapter, a merged model or GGUF. Launch files for the engines are written too.

    Args:
        folder: the temporary folder to write to.
        target: the folder's path after publication.

    Raises:
        InputError: a check failed, see `align.export.receipt_rows.require_passed`.
    """
    from align.export.card import collect_export_facts, render_card
    from align.export.kinds import WRITERS, describe_export, write_launch_files
    from align.export.launch import make_served_name
    from align.export.trained_model import require_same_tokenization

    stage, run_name = (artifact.manifest.stage, artifact.manifest.name) if artifact.manifest else ("", "")
    name = make_served_name(stage, run_name) or artifact.path.name
    checks = mark_accepted(WRITERS[kind](options, trained, folder), config.export.accept)
    require_same_tokenization(trained, folder)
    write_launch_files(options, trained, kind, folder, target, name, checks)
    facts = collect_export_facts(trained, kind, folder, name, checks, options.dtype, options.into)
    card = render_card(facts | collect_history_facts(run, config, artifact))
    (folder / "README.md").write_text(card, encoding="utf-8")
    rows = [check.as_dict() for check in checks]
    receipt = describe_export(options, trained.origin, kind, artifact.digest)
    receipt["difference"] = summarize_differences(checks)
    receipt["manifests"] = compute_all_manifest_digests(artifact, config.run.folder)
    write_receipt(folder, rows, trained.rows, receipt)
    print_checks(run, kind, checks)
    return checks


def compute_all_manifest_digests(artifact: Artifact, root: Path) -> dict[str, dict[str, str]]:
    """Return the manifest digests of the artifact's run and of its evaluation, by `stage:name`.

    Returns an empty dict if no run published the artifact.
    """
    if artifact.manifest is None:
        return {}
    folders = {artifact.manifest.ref: artifact.path.parent}
    if (evaluation := find_evaluation(artifact.as_input(), root)) is not None:
        folders[evaluation.ref] = root / evaluation.stage / evaluation.name
    return {run: compute_manifest_digests(folder, read_manifest(folder)).as_json() for run, folder in folders.items()}


def collect_history_facts(run: Run, config: Config, artifact: Artifact) -> dict[str, Any]:
    """Return the model card's fields about an artifact's training: steps, data, licences, metrics, evaluation."""
    from align.export.card import list_licences

    root = config.run.folder
    manifest = artifact.manifest
    steps = list_training_steps(manifest, artifact.digest, root) if manifest else []
    data = list_training_data(artifact, root)
    is_reward_model = not artifact.whole and is_reward_adapter(artifact.path)
    facts: dict[str, Any] = {
        "name": f"{run.manifest.stage}-{run.name}",
        "parents": list_lineage_runs(steps),
        "seed": config.seed,
        "data": data,
        "licences": list_licences(data, find_origin(artifact, run.base, root)),
        "system": find_system_prompt(steps, is_reward_model),
    }
    metrics = load_published_figures(artifact.path.parent, manifest) if manifest else {}
    collapse: Mapping[str, Any] = {}
    if manifest and is_reward_model:
        facts |= {"accuracy": metrics, "measured": describe_data(manifest, manifest.config["stage"]["held_out"])}
        if manifest.config["data"].get("reasoning") == "hide":
            facts["notes"] = (
                "It was trained on answers without their reasoning: remove reasoning from the texts that it scores."
            )
    if manifest and "loss_after" in metrics and manifest.stage in ("sft", "full"):
        facts |= {"losses": metrics, "measured": describe_data(manifest)}
    if (evaluation := find_evaluation(artifact.as_input(), root)) is not None:
        evaluation_metrics = load_published_figures(root / evaluation.stage / evaluation.name, evaluation)
        collapse = evaluation_metrics.get("collapse", {})
        # These two quote answers of models, which may look like paths of this machine.
        figures = {key: value for key, value in evaluation_metrics.items() if key not in ("variety", "collapse")}
        facts |= {"metrics": figures, "judge": evaluation_metrics.get("judge", "")}
        facts |= {"measured": describe_data(evaluation), "sampled": describe_sampling(evaluation.config)}
    if collapse.get("verdict") != "collapsed":
        collapse = find_suite_collapse(artifact.as_input(), root) or collapse
    if collapse:
        facts["collapse"] = collapse
    return facts


def find_exported_folders(config: Config) -> list[Path]:
    """Return the folders under `export.path` that hold an earlier export with its receipt, or raise MissingArtifact.

    That is `export.path`, its `artifact/`, or the subfolders that `export=all` wrote.
    """
    from align.export.kinds import WRITERS

    path = parse_user_path(config.export.path or "", "export.path")
    for folder in (path, path / "artifact"):
        if (folder / RECEIPT).is_file():
            return [folder]
        subfolders = [folder / kind for kind in WRITERS if (folder / kind / RECEIPT).is_file()]
        if subfolders:
            return subfolders
    problem = f"there is no {RECEIPT} in it" if path.is_dir() else "there is no such folder"
    raise MissingArtifact("export.path", config.export.path, problem, "Name a folder that stage=export wrote.")


def read_receipt(
    config: Config, options: ExportOptions, artifact: Artifact, base: Base, folder: Path
) -> dict[str, Any]:
    """Read and verify the receipt of an earlier export, and raise InputError if it is of another artifact or base.

    No weights are loaded.

    Raises:
        MissingArtifact, CorruptFile: see `read_verified_receipt`.
        InputError: the export is of another artifact, base or kind of weights.
    """
    from align.export.kinds import describe_export

    receipt = read_verified_receipt(folder, find_linked_base(folder))
    expected = describe_export(options, base, "check", artifact.digest)
    for key in ("artifact", "base"):
        if receipt.get(key) != expected[key]:
            problem = f"{folder.name} was made from another {key}"
            raise InputError("artifact", artifact.ref, problem, "Name the artifact that was exported.")
    if receipt.get("kind") != "adapter" and receipt.get("into") != expected["into"]:
        problem = f"its receipt says that it was merged into {receipt.get('into')} weights, which makes another model"
        raise InputError("export.into", config.export.into, problem, "Give the same: export.into=auto or original.")
    return receipt


def check_export(
    run: Run, config: Config, options: ExportOptions, trained: TrainedModel, folder: Path, receipt: dict[str, Any]
) -> list[ReceiptCheck]:
    """Compare an earlier export with the trained model again, and raise if a check fails or differs from the receipt.

    The receipt is not trusted: the kind is read from the files, only `export.accept` accepts failed checks, and the
    receipt's results must agree with the new ones. Returns the new results.

    Raises:
        CorruptFile: the receipt has other results.
        InputError: a check failed, or no check with a bound could run on this machine.
    """
    from align.export.kinds import measure_export
    from align.export.trained_model import require_same_tokenization

    checks = measure_export(options, trained, folder)
    require_same_tokenization(trained, folder)
    checks = mark_accepted(checks, config.export.accept)
    print_checks(run, folder.name, checks)
    if not any(check.bound and check.found for check in checks):
        problem = "no engine is available here to check whether the export equals the trained model"
        raise InputError("export.path", str(folder), problem, "Install an engine that can load it.")
    require_engines(checks, config.export.accept, config.export.require)
    skipped = [engine for engine, python in options.engines.items() if python == "none"]
    require_same_measurements(receipt, checks, skipped_engines=skipped)
    return checks


def print_checks(run: Run, title: str, checks: list[ReceiptCheck]) -> None:
    """Print a table of the checks of an export, and raise InputError if one failed, after writing `checks.json`.

    Raises:
        InputError: a check failed, see `align.export.receipt_rows.require_passed`.
    """
    print(f"{title}\n{format_checks(checks)}", flush=True)
    try:
        require_passed(checks)
    except InputError:
        write_json(run.folder / "checks.json", [check.as_dict() for check in checks])
        raise


def build_metrics(base: Base, checks_by_kind: dict[str, list[ReceiptCheck]]) -> dict[str, Any]:
    """Return the metrics of an export run: how the exported model's logits differ from the original's, and all checks.

    The differences are `kl`, `top1` and `max_logprob` of the exported files, and with the suffix `_before_cast` before
    the weights were cast.
    """
    checks = [check for checks in checks_by_kind.values() for check in checks]
    measured = {check.name: check.found.as_dict() for check in checks if check.found is not None}
    differences = summarize_differences(checks)
    figures: dict[str, Any] = {}
    for kind, suffix in (("shipped", ""), ("before_cast", "_before_cast")):
        difference = differences[kind]
        if difference is not None:
            figures |= {f"{key}{suffix}": difference[key] for key in ("kl", "top1", "max_logprob")}
    return {
        "base": base.id,
        "base_digest": base.digest,
        "peak_rss_mb": get_peak_rss_mb(),
        **figures,
        "receipt": measured,
        "checks": [check.as_dict() for check in checks],
    }
