"""LoRA adapters: made, saved in PEFT's own format, read back with their tensors checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.errors import CorruptFile, InputError
from align.models.fastpath import use_fast_path
from align.models.finite import RESTORE, check_tensors
from align.run import Base, json_object, out_of_memory, write_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
SCORE_KEY = "base_model.model.score.weight"


STATE_SPACE = ("falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "nemotron_h")
NO_LORA = {name: ["out_proj", "conv1d", "dt_proj"] for name in STATE_SPACE} | {
    "deepseek_v4": ["o_a_proj"], "llama4": ["router"], "llama4_text": ["router"], "phimoe": ["router"]
}  # fmt: skip
"""Linear layers that bear no adapter, by model type: a forward or a kernel reads their weight past the layer, so that
an adapter would do nothing until it is merged (PEFT refuses the first two on five of these types); or the layer is
more than a matrix: several in one, a router that gives several tensors."""


OTHER_FORWARD = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
    "monteclora_config", "use_bdlora", "use_qalora",
)  # fmt: skip
"""Settings of PEFT under which an adapter is more than a product added to a layer: active from some token on, drawn at
random, routed, on layers that stand twice. The forward that rollouts and updates share computes none of them."""


CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""These initialisations take their share out of the base's weights, and PEFT takes it again whenever such an adapter is
loaded: on the untouched base, or beside another adapter, it is another model."""


def adapter_config(folder: Path, field: str = "adapter", alone: bool = False) -> dict[str, Any]:
    """The PEFT configuration of a LoRA adapter.

    Args:
        field: what the user calls it.
        alone: nobody else will be asked of the model that it is put on, neither another adapter nor the base.

    Raises:
        CorruptFile: it is not there, or not JSON.
        InputError: it is not LoRA; LoRA by a forward of another kind; or it changes the base, and is not alone.
    """
    config = json_object(folder / CONFIG_FILE, field, "Train or download the adapter again.")

    def refused(problem: str, remedy: str) -> InputError:
        return InputError(field, str(folder), problem, remedy)

    kind, init = config.get("peft_type"), config.get("init_lora_weights")
    if kind != "LORA":
        raise refused(f"its peft_type is {kind!r}, and only LORA is read", "Train it as LoRA.")
    if isinstance(init, str) and init.startswith(CHANGES_BASE) and not alone:
        problem = f"init_lora_weights={init} changed the base, which other adapters and the base by itself share here"
        raise refused(problem, "Lower it to plain LoRA by stage=export, and name that folder.")
    # What a newer PEFT has more of may compute otherwise where it is switched on; a number or a name alone is inert.
    newer = config.keys() - LoraConfig.__dataclass_fields__.keys()
    switched = {key for key in newer if isinstance(config[key], bool | list | dict)}
    for key in sorted({*OTHER_FORWARD, *switched}):
        if config.get(key) not in (None, False, [], {}, ""):
            problem = f"its adapter_config.json says {key}={config[key]!r}, which is not computed here"
            raise refused(problem, "Train it as plain LoRA.")
    return config


def lora(model: Any, r: int, alpha: int, classifier: bool = False) -> LoraConfig:
    """LoRA on every linear layer of a model that can bear it, no dropout: the policy that is scored must be the policy
    that samples.

    `SEQ_CLS` makes PEFT train and save the `score` head beside the adapter.
    """
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        exclude_modules=NO_LORA.get(getattr(getattr(model, "config", None), "model_type", "")),
        task_type=TaskType.SEQ_CLS if classifier else TaskType.CAUSAL_LM,
    )


def with_new_adapter(model: Any, r: int, alpha: int, classifier: bool = False) -> PeftModel:
    """The model wrapped with a fresh adapter that changes nothing yet (`lora_B` is zero)."""
    wrapped = get_peft_model(model, lora(model, r, alpha, classifier))
    use_fast_path(wrapped)
    return wrapped  # pyright: ignore[reportReturnType]


def read_tensors(folder: Path, field: str = "adapter") -> dict[str, Tensor]:
    """The tensors of a saved adapter.

    Args:
        field: what the user calls it.

    Raises:
        CorruptFile: the file is missing, truncated or not safetensors, or a value is not finite.
    """
    path = folder / WEIGHTS_FILE
    remedy = "Restore the file, or train the adapter again."
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        message = str(error).splitlines()[0][:120]
        if not path.is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            message = f"there is no such file{', and the pickle beside it is not read' if pickled else ''}"
        raise CorruptFile(field, str(path), f"cannot be read ({message})", remedy) from error
    check_tensors(tensors.items(), field, str(path), RESTORE)
    return tensors


def tensors_of(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """One adapter's tensors under the names that PEFT saves.

    Embeddings are left out: no adapter of ours trains them, and by default PEFT asks the hub for the base's
    `config.json`, by the id that the adapter names, to learn whether their number was changed. Nothing calls out here.
    """
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def save_adapter(model: PeftModel, folder: Path, base: Base, adapter: str = "default") -> None:
    """Write one adapter to the root of `folder` as PEFT and every serving engine read it, naming the base by id.

    (`save_pretrained(selected_adapters=["policy"])` would write to a folder `policy/` instead.)
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(model, adapter)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors would leave it to its owner alone
    config = model.peft_config[adapter].to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    config |= {"base_model_name_or_path": base.id, "revision": base.revision, "inference_mode": True}
    config["task_type"] = getattr(config.get("task_type"), "value", config.get("task_type"))
    config["peft_type"] = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    write_json(folder / CONFIG_FILE, config)


def attach(
    model: Any, folder: Path, name: str, trainable: bool = False, scored: bool = False, alone: bool = False
) -> PeftModel:
    """Put a saved adapter on the model under `name`.

    Args:
        scored: it is a reward model's, whose `score` head is read elsewhere. PEFT passes over tensors that it finds no
            place for; any other such tensor is an error here.
        alone: see `adapter_config`.

    Raises:
        CorruptFile: the adapter cannot be read, has other tensors than its configuration makes on this model, or one
            that is not finite.
        InputError: see `adapter_config`.
    """
    field = "reward.ref" if scored else "adapter"
    adapter_config(folder, field, alone)
    given = read_tensors(folder, field)
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name, is_trainable=trainable)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=trainable)
    except Exception as error:  # what a wrong value in adapter_config.json leads to has any type
        if out_of_memory(error):
            raise
        raise CorruptFile(
            field, str(folder), f"does not fit this base ({type(error).__name__}: {what_differs(str(error))})",
            "Use the base that it was trained on.",
        ) from error  # fmt: skip
    use_fast_path(model)
    placed = tensors_of(model, name).keys() | ({SCORE_KEY} if scored else set())
    if strangers := sorted(given.keys() - placed):
        raise CorruptFile(
            field, str(folder), f"has tensors that this model has no place for ({some(strangers)})",
            "A reward model is no policy: name an adapter of stage=sft, stage=dpo or stage=ppo.",
        )  # fmt: skip
    if absent := sorted(placed - given.keys() - {SCORE_KEY}):  # PEFT leaves them as they were made, and says nothing
        raise CorruptFile(
            field, str(folder), f"lacks tensors that its adapter_config.json speaks of ({some(absent)})", RESTORE
        )
    return model


def some(names: Sequence[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def what_differs(message: str) -> str:
    """The line of PyTorch's complaint about a state dict that names a tensor."""
    lines = [line.strip() for line in message.splitlines()] or [""]
    return next((line for line in lines if line.startswith("size mismatch")), lines[0])[:240]
