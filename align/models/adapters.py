"""LoRA adapters on a model: made, put there with their tensors checked, saved in PEFT's own format."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor

from align.core.errors import CorruptFile
from align.models.adapter_files import (
    CONFIG_FILE,
    SCORE_KEY,
    WEIGHTS_FILE,
    adapter_config,
    files_of_adapter,
    read_tensors,
    some,
)
from align.models.base import loadable_name
from align.models.fastpath import use_fast_path
from align.models.finite import RESTORE
from align.models.lora import Lora, LoraLike
from align.run import Base, out_of_memory, write_json
from align.run.digests import same_bytes

READ_BY = "cpu"
"""Else PEFT reads an adapter to the first GPU, whichever device the model lies on. Its weights move to that afterwards.
"""


def with_new_adapter(model: Any, lora: Lora | LoraLike, classifier: bool = False) -> PeftModel:
    """The model wrapped with a fresh adapter that changes nothing yet (`lora_B` is zero).

    Args:
        classifier: the `score` head is trained beside it.
    """
    wrapped = get_peft_model(model, lora.config(model, classifier))
    use_fast_path(wrapped)
    return wrapped  # pyright: ignore[reportReturnType]


def tensors_of(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """One adapter's tensors under the names that PEFT saves.

    Embeddings are left out: no adapter of ours trains them, and by default PEFT asks the hub for the base's
    `config.json`, by the id that the adapter names, to learn whether their number was changed. Nothing calls out here.
    """
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """The base by itself. What trains stays as it is, which PEFT's own `disable_adapter` would change."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def save_adapter(model: PeftModel, folder: Path, base: Base, adapter: str = "default") -> None:
    """Write one adapter to the root of `folder` as PEFT and every serving engine read it, naming the base so that
    PEFT's auto classes find it (see `loadable_name`).

    (`save_pretrained(selected_adapters=["policy"])` would write to a folder `policy/` instead.)
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(model, adapter)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors would leave it to its owner alone
    config = model.peft_config[adapter].to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    config |= {"base_model_name_or_path": loadable_name(base), "revision": base.revision, "inference_mode": True}
    config["task_type"] = getattr(config.get("task_type"), "value", config.get("task_type"))
    config["peft_type"] = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    write_json(folder / CONFIG_FILE, config)


def attach(
    model: Any, folder: Path, name: str, trainable: bool = False, scored: bool = False, alone: bool = False
) -> PeftModel:
    """Put a saved adapter on the model under `name`. One that is refused leaves the model as it was.

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
        with same_bytes(files_of_adapter(folder), field, str(folder)):
            return attached(model, folder, name, given.keys(), trainable, field)
    except BaseException:
        detach(model, name)
        raise


def attached(model: Any, folder: Path, name: str, given: Collection[str], trainable: bool, field: str) -> PeftModel:
    """See `attach`; what fails leaves the model as PEFT left it."""
    scored = field == "reward.ref"
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name, is_trainable=trainable, torch_device=READ_BY)
        else:
            model = PeftModel.from_pretrained(
                model, str(folder), adapter_name=name, is_trainable=trainable, torch_device=READ_BY
            )
    except Exception as error:  # what a wrong value in adapter_config.json leads to has any type
        if out_of_memory(error):
            raise
        raise CorruptFile(
            field, str(folder), f"does not fit this base ({type(error).__name__}: {what_differs(str(error))})",
            "Use the base that it was trained on.",
        ) from error  # fmt: skip
    # The trainers' checkpoints are written by PEFT, which asks the hub for a base that it does not find by this name.
    base: Any = model.get_base_model()
    model.peft_config[name].base_model_name_or_path = base.config.name_or_path
    use_fast_path(model)
    placed = tensors_of(model, name).keys() | ({SCORE_KEY} if scored else set())
    if strangers := sorted(set(given) - placed):
        raise CorruptFile(
            field, str(folder), f"has tensors that this model has no place for ({some(strangers)})",
            "A reward model is no policy: name an adapter of stage=sft, stage=dpo, stage=kto or stage=ppo.",
        )  # fmt: skip
    if absent := sorted(placed - set(given) - {SCORE_KEY}):  # PEFT leaves them as they were made, and says nothing
        raise CorruptFile(
            field, str(folder), f"lacks tensors that its adapter_config.json speaks of ({some(absent)})", RESTORE
        )
    return model


def detach(model: Any, name: str) -> None:
    """Take an adapter off a model, or what there is of it; off a model that is no `PeftModel`, all that PEFT put into
    it."""
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


def what_differs(message: str) -> str:
    """The line of PyTorch's complaint about a state dict that names a tensor."""
    lines = [line.strip() for line in message.splitlines()] or [""]
    return next((line for line in lines if line.startswith("size mismatch")), lines[0])[:240]
