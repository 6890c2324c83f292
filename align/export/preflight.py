"""Checks of an export's settings before any model is loaded: its kinds, its engines, and an adapter's base and method.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from align.core.errors import InputError
from align.rollout.engine_process import (
    LLAMA_CPP,
    SETTINGS,
    TRANSFORMERS,
    VLLM,
    describe_skipped_engine,
    find_engine_version,
)
from align.run import Artifact, Base, model_config, read_json
from align.run.weights import ABOUT, VALUE_HEAD_FILE, is_reward_adapter

KINDS = ("adapter", "merged", "gguf")
OF_WHOLE = ("merged", "gguf")
OF_SCORES = ("adapter", "merged")


def list_export_kinds(kind: str, artifact: Artifact) -> tuple[str, ...]:
    """Return the kinds of export, such as `merged` and `gguf`, to make from an artifact, or raise InputError if one is
    impossible.

    Args:
        kind: `export=`; `all` means every kind that the artifact can be exported as.

    Raises:
        InputError: The artifact cannot be exported as this kind.
    """

    def unsupported(problem: str, remedy: str) -> InputError:
        return InputError("export", kind, f"{artifact.ref} {problem}", remedy)

    if (artifact.path / VALUE_HEAD_FILE).is_file():
        problem = "is a value model of PPO, whose value head no engine supports"
        raise InputError("artifact", artifact.ref, problem, "Export the policy that it was trained with.")
    if artifact.whole and "SequenceClassification" in str(model_config(artifact.path).get("architectures")):
        problem = "is a sequence classifier, as transformers loads it, and no language model"
        raise InputError("artifact", artifact.ref, problem, "Use it as it lies there, or export what it was made of.")
    if artifact.whole:
        if kind == "adapter":
            raise unsupported(
                "is a whole model, of which there is no adapter", "Add export=merged, export=gguf or all."
            )
        return OF_WHOLE if kind == "all" else (kind,)
    if is_reward_adapter(artifact.path):
        if kind == "gguf":
            problem = "is a reward model, and llama.cpp's converter does not support its score head"
            raise unsupported(
                problem, "Add export=merged, which transformers and vLLM read, or export=adapter for PEFT."
            )
        return OF_SCORES if kind == "all" else (kind,)
    return KINDS if kind == "all" else (kind,)


def find_engine_versions(
    kind: str, engine_settings: Mapping[str, str], is_reward_model: bool = False
) -> dict[str, str]:
    """Return the version of each engine besides transformers that checks this kind of export, or "" for one not
    installed.

    Args:
        kind: `export=`.
        engine_settings: engine → the Python that has it, `auto` or `none`.
        is_reward_model: it is a reward model, which only transformers checks.

    Raises:
        InputError: A Python named in `engine_settings` does not have its engine.
    """
    if is_reward_model:
        return {}
    engines = {"gguf": [LLAMA_CPP], "all": [LLAMA_CPP, VLLM], "check": [LLAMA_CPP, VLLM]}.get(kind, [VLLM])
    return {engine: find_engine_version(engine, engine_settings[engine], SETTINGS[engine]) for engine in engines}


def require_installed_engines(
    kind: str, required: Collection[str], engine_versions: Mapping[str, str], engine_settings: Mapping[str, str]
) -> None:
    """Raise InputError if a required engine does not check this kind of export, or is not installed.

    Args:
        engine_versions: engine → version, from `find_engine_versions`.
    """
    for engine in required:
        if engine not in (TRANSFORMERS, *engine_versions):
            problem = f"export={kind} does not check with it"
            raise InputError(
                "export.require",
                engine,
                problem,
                f"It checks with {', '.join(sorted((TRANSFORMERS, *engine_versions)))}.",
            )
        if engine != TRANSFORMERS and not engine_versions[engine]:
            problem = f"it is not available: {describe_skipped_engine(engine, engine_settings[engine])}"
            raise InputError("export.require", engine, problem, "Install it, or leave it out of export.require.")


def require_matching_base_and_method(artifact: Artifact, base: Base, method: str) -> None:
    """Raise InputError if an adapter's `base.json` names another base than `base`, or if its training method is not
    given."""
    path = artifact.path / ABOUT
    digest = read_json(path, "Export it again.").get("digest") if path.is_file() else None
    if digest and digest != base.digest:
        problem = f"its {ABOUT} names another base ({str(digest)[:12]}) than {base.id} ({base.digest[:12]})"
        raise InputError("artifact", artifact.ref, problem, "Name the base it was trained on: model.path=.")
    if method == "auto":
        problem = f"it is not recorded how {artifact.ref} was trained"
        raise InputError("method", method, problem, "Say method=qlora (on an NF4 base) or method=lora.")
