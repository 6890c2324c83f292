"""LoRA adapters: reading and checking files, attaching to a model, saving in PEFT's format."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND as ALL_LINEAR
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from align.core.errors import CorruptFile, InputError
from align.core.files import has_file, require_readable, require_readable_folder
from align.models.base import choose_loadable_name
from align.models.fastpath import install_fast_path
from align.models.finite_checks import RESTORE, require_finite_tensors
from align.models.lora import Lora, LoraLike
from align.run import Base, is_out_of_memory, read_json_object, write_json
from align.run.digests import require_same_bytes
from align.run.weights import SCORE_KEY

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LORA_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
RETRAIN = "Restore it from a copy, or train again with resume=never."

Factors = tuple[Tensor, Tensor]
"""The matrices `lora_A` [rank, in features] and `lora_B` [out features, rank] of one module."""

OTHER_FORWARD = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
"""Settings of PEFT with another forward than a product added to a layer. Adapters with them are active from some token
on, random, routed, or on replicated layers. The forward of rollouts and updates does not support them."""

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Initialisations that subtract a part from the base's weights, which PEFT does again whenever such an adapter is
loaded. On the unchanged base, or beside another adapter, it is another model."""

LOADING_DEVICE = "cpu"
"""Device to which PEFT reads an adapter's file. By default it is the first GPU, whichever device the model is on. The
weights are moved afterwards."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """The configuration and tensors of a LoRA adapter, read from its files.

    Attributes:
        config: content of `adapter_config.json`.
        tensors: key in the file → tensor.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def factors(self) -> dict[str, Factors]:
        """`lora_A` and `lora_B` of each adapted module, by the module's name."""
        matches = [(key, match) for key in self.tensors if (match := LORA_KEY.fullmatch(key)) and match["side"] == "A"]
        return {
            match["module"]: (self.tensors[key], self.tensors[key.replace(".lora_A.", ".lora_B.")])
            for key, match in matches
        }

    @property
    def ranks(self) -> dict[str, int]:
        """LoRA rank of each adapted module, by the module's name."""
        return {module: len(a) for module, (a, _) in self.factors.items()}

    @property
    def has_score_head(self) -> bool:
        """True if the tensors include the `score` head of a reward model."""
        return SCORE_KEY in self.tensors


def list_adapter_files(folder: Path) -> list[Path]:
    """Return the paths of `adapter_config.json` and `adapter_model.safetensors` in a folder, without missing ones."""
    return [path for name in (CONFIG_FILE, WEIGHTS_FILE) if (path := folder / name).is_file()]


def read_adapter_config(folder: Path, field: str = "adapter", is_only_adapter: bool = False) -> dict[str, Any]:
    """Read a LoRA adapter's `adapter_config.json`, or raise InputError if the adapter is of an unsupported kind.

    Args:
        field: the setting that names it, for error messages.
        is_only_adapter: whether neither another adapter nor the base alone will be used on the same model.

    Raises:
        CorruptFile: it is missing, or not a JSON object.
        InputError: it is not LoRA, has another forward, or changes the base and `is_only_adapter` is False.
    """
    require_readable_folder(folder, field, RETRAIN)
    config = read_json_object(folder / CONFIG_FILE, field, "Train or download the adapter again.")

    def refuse(problem: str, remedy: str) -> InputError:
        return InputError(field, str(folder), problem, remedy)

    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise refuse(f"its peft_type is {peft_type!r}, and only LORA is read", "Train it as LoRA.")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(CHANGES_BASE) and not is_only_adapter:
        problem = f"init_lora_weights={init} changed the base, which other adapters and the base by itself share here"
        raise refuse(problem, "Lower it to plain LoRA by stage=export, and name that folder.")
    # A key of a newer PEFT may change the forward if it is switched on; a number or a name alone is inert.
    newer = config.keys() - LoraConfig.__dataclass_fields__.keys()
    for key in sorted({*OTHER_FORWARD, *(key for key in newer if isinstance(config[key], bool | list | dict))}):
        if config.get(key) not in (None, False, [], {}, ""):
            problem = f"its adapter_config.json says {key}={config[key]!r}, which is not computed here"
            raise refuse(problem, "Train it as plain LoRA.")
    return config


def read_tensors(folder: Path, field: str = "adapter") -> dict[str, Tensor]:
    """Read all tensors of an adapter's `adapter_model.safetensors` and check that they are finite.

    Args:
        field: the setting that names it, for error messages.

    Raises:
        CorruptFile: the file is missing, truncated or not safetensors, or a value is not finite.
    """
    path = folder / WEIGHTS_FILE
    remedy = "Restore the file, or train the adapter again."
    if not has_file(path, field, remedy):
        has_pickle = (folder / "adapter_model.bin").is_file()
        pickled = ", and adapter_model.bin beside it is pickled and not read" if has_pickle else ""
        raise CorruptFile(field, str(path), f"cannot be read (there is no such file{pickled})", remedy)
    require_readable(path, field, remedy)
    try:
        with require_same_bytes(list_adapter_files(folder), field, str(folder)):
            tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptFile(field, str(path), f"cannot be read ({str(error).splitlines()[0][:120]})", remedy) from error
    require_finite_tensors(tensors.items(), field, str(path), RESTORE)
    return tensors


def read_adapter(folder: Path, field: str = "adapter", is_only_adapter: bool = True) -> Adapter:
    """Read the configuration and tensors of an adapter and check that their modules and ranks agree.

    Raises:
        CorruptFile, InputError: see `read_adapter_config` and `read_tensors`; or a `lora_A` lacks its `lora_B` or has
            another rank, or the ranks are not those of the configuration.
    """
    config = read_adapter_config(folder, field, is_only_adapter)
    adapter = Adapter(config, read_tensors(folder, field))

    def refuse(problem: str) -> CorruptFile:
        return CorruptFile(WEIGHTS_FILE, str(folder), problem, RETRAIN)

    if not adapter.tensors:
        raise refuse("holds no tensors")
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        if match := LORA_KEY.fullmatch(key):
            sides.setdefault(match["module"], {})[match["side"]] = tensor
    for module, pair in sides.items():
        if pair.keys() != {"A", "B"}:
            raise refuse(f"{module} has lora_{''.join(pair)} alone")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise refuse(f"the two sides of {module} have ranks {pair['A'].shape[0]} and {pair['B'].shape[1]}")
    ranks = set(adapter.ranks.values())
    if not config.get("rank_pattern") and ranks - {config.get("r")}:
        raise refuse(f"holds ranks {sorted(ranks)} where {CONFIG_FILE} says r={config.get('r')}")
    return adapter


def require_configured_modules(config: Mapping[str, Any], adapted: Collection[str], modules: Collection[str]) -> None:
    """Raise InputError unless an adapter file has tensors of exactly the modules that its configuration targets.

    PEFT ignores the others, and leaves missing ones as the base has them.

    Args:
        adapted: modules that the file has tensors of.
        modules: of the base, that can be adapted.

    Raises:
        InputError: naming the modules.
    """
    targets = config.get("target_modules")
    if targets is None or str(targets).lower() == ALL_LINEAR:  # PEFT finds out which these are
        return
    keys = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "target_parameters")
    peft_config = SimpleNamespace(target_modules=targets, **{key: config.get(key) for key in keys})
    targeted = {module for module in {*adapted, *modules} if check_target_module_exists(peft_config, module)}
    displayed = targets if isinstance(targets, str) else abbreviate_names(sorted(map(str, targets)))
    if extra := sorted(set(adapted) - targeted):
        problem = (
            f"leaves out {abbreviate_names(extra)}, and {WEIGHTS_FILE} has their tensors: PEFT would pass over them"
        )
        raise InputError("target_modules", displayed, problem, f"Name them in {CONFIG_FILE}, or remove the tensors.")
    if missing := sorted(targeted - set(adapted)):
        problem = f"names {abbreviate_names(missing)}, and {WEIGHTS_FILE} has no tensors of theirs"
        raise InputError("target_modules", displayed, problem, f"Leave them out in {CONFIG_FILE}, or train it again.")


def list_adaptable_modules(model: nn.Module) -> list[str]:
    """Return the names of a base model's modules that PEFT can adapt: linear layers and embeddings."""
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding, Conv1D))]


def abbreviate_names(names: Sequence[str]) -> str:
    """Return the first three names of a list as text, with the number of further ones."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def add_new_adapter(model: Any, lora: Lora | LoraLike, is_reward_model: bool = False) -> PeftModel:
    """Wrap a model with a new LoRA adapter that changes nothing yet, because `lora_B` is zero.

    Args:
        is_reward_model: the `score` head is trained beside it.
    """
    wrapped = get_peft_model(model, lora.config(model, is_reward_model))
    install_fast_path(wrapped)
    return wrapped  # pyright: ignore[reportReturnType]


def get_adapter_state_dict(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return the tensors of one adapter under the names that PEFT saves, without embeddings.

    Embeddings are left out: no adapter here trains them, and by default PEFT asks the hub for the base's `config.json`
    to learn whether their number was changed.
    """
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


@contextmanager
def disable_adapters(model: Any) -> Iterator[None]:
    """Disable all adapters of a model while the `with` block runs. Unlike PEFT's `disable_adapter`, it does not change
    what requires gradients."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    was_disabled = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, was_disabled, strict=True):
            layer._disable_adapters = disabled


def save_adapter(model: PeftModel, folder: Path, base: Base, adapter: str = "default") -> None:
    """Write one adapter in PEFT's format to `folder`, as `adapter_config.json` and `adapter_model.safetensors`. The
    configuration names the base so that PEFT's auto classes find it (see `choose_loadable_name`).

    PEFT's `save_pretrained(selected_adapters=["policy"])` would write to a folder `policy/` instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_adapter_state_dict(model, adapter)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors creates files with mode 0600
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in model.peft_config[adapter].to_dict().items()}
    config |= {"base_model_name_or_path": choose_loadable_name(base), "revision": base.revision, "inference_mode": True}
    for key in ("task_type", "peft_type"):
        config[key] = getattr(config.get(key), "value", config.get(key))
    write_json(folder / CONFIG_FILE, config)


def attach_adapter(
    model: Any,
    folder: Path,
    name: str,
    trainable: bool = False,
    is_reward_model: bool = False,
    is_only_adapter: bool = False,
) -> PeftModel:
    """Load a saved adapter onto a model under `name`, check that all its tensors are used, and return the wrapped
    model. If that fails, the adapter is removed again.

    Args:
        is_reward_model: whether it is a reward model's, whose `score` head is loaded separately. PEFT ignores tensors
            that the model has no place for; any other such tensor is an error here.
        is_only_adapter: see `read_adapter_config`.

    Raises:
        CorruptFile: the adapter cannot be read, lacks tensors or has some that do not belong to this model, or one is
            not finite.
        InputError: see `read_adapter_config`.
    """
    field = "reward.ref" if is_reward_model else "adapter"
    read_adapter_config(folder, field, is_only_adapter)
    keys = read_tensors(folder, field).keys()
    try:
        with require_same_bytes(list_adapter_files(folder), field, str(folder)):
            wrapped = load_with_peft(model, folder, name, trainable, field)
            # A trainer's checkpoints are written by PEFT, which asks the hub for a base that is not found by this name.
            base: Any = wrapped.get_base_model()
            wrapped.peft_config[name].base_model_name_or_path = base.config.name_or_path
            install_fast_path(wrapped)
            placed = get_adapter_state_dict(wrapped, name).keys() | ({SCORE_KEY} if is_reward_model else set())
            if unplaced := sorted(keys - placed):
                problem = f"has tensors that this model does not have ({abbreviate_names(unplaced)})"
                remedy = "A reward model is no policy: name an adapter of stage=sft, stage=dpo, stage=kto or stage=ppo."
                raise CorruptFile(field, str(folder), problem, remedy)
            if missing := sorted(placed - keys - {SCORE_KEY}):  # PEFT leaves them as initialised, without a warning
                problem = f"lacks tensors that its adapter_config.json requires ({abbreviate_names(missing)})"
                raise CorruptFile(field, str(folder), problem, RESTORE)
            return wrapped
    except BaseException:
        detach_adapter(model, name)
        raise


def load_with_peft(model: Any, folder: Path, name: str, trainable: bool, field: str) -> PeftModel:
    """Load an adapter with PEFT onto a plain model or a `PeftModel`, and return the `PeftModel`.

    Raises:
        CorruptFile: PEFT refuses it.
    """
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name, is_trainable=trainable, torch_device=LOADING_DEVICE)
            return model
        return PeftModel.from_pretrained(
            model, str(folder), adapter_name=name, is_trainable=trainable, torch_device=LOADING_DEVICE
        )
    except Exception as error:  # a wrong value in adapter_config.json may raise anything
        if is_out_of_memory(error):
            raise
        lines = [line.strip() for line in str(error).splitlines()] or [""]
        reason = next((line for line in lines if line.startswith("size mismatch")), lines[0])[:240]
        problem = f"does not fit this base ({type(error).__name__}: {reason})"
        raise CorruptFile(field, str(folder), problem, "Use the base that it was trained on.") from error


def detach_adapter(model: Any, name: str) -> None:
    """Remove an adapter from a `PeftModel`. From any other model, remove all of PEFT's layers, such as a failed load
    leaves behind."""
    if isinstance(model, PeftModel):
        if name in model.peft_config:
            model.delete_adapter(name)
        if model.active_adapter == name and model.peft_config:
            model.active_adapter = next(iter(model.peft_config))  # PEFT leaves the name there, and fails over it
        return
    vars(model).pop("peft_config", None)
    for parent in list(model.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, BaseTunerLayer):
                setattr(parent, child, module.get_base_layer())
            elif isinstance(module, AuxiliaryTrainingWrapper):
                setattr(parent, child, module.original_module)
