"""A LoRA adapter's two files, read and found whole: PEFT's own, whoever wrote them.

What puts an adapter on a model (`align.models.adapters`) and what writes one for others (`align.models.lowering`) both
read it here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND as ALL_LINEAR
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from align.core.errors import AlignError, CorruptFile, InputError, MissingArtifact
from align.core.files import check_folder, check_readable, has_file
from align.models.finite import RESTORE, check_tensors
from align.run import json_object
from align.run.digests import same_bytes
from align.run.weights import SCORE_KEY

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
RETRAIN = "Restore it from a copy, or train again with resume=never."

Factors = tuple[Tensor, Tensor]
"""`lora_A` [rank, in features] and `lora_B` [out features, rank] of one module."""

OTHER_FORWARD = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
    "monteclora_config", "use_bdlora", "use_qalora",
)  # fmt: skip
"""Settings of PEFT under which an adapter is more than a product added to a layer: active from some token on, drawn at
random, routed, on layers that stand twice. The forward that rollouts and updates share computes none of them."""

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""These initialisations take their share out of the base's weights, and PEFT takes it again whenever such an adapter is
loaded: on the untouched base, or beside another adapter, it is another model."""


def files_of_adapter(folder: Path) -> list[Path]:
    """Return the two files of an adapter, as far as they are there."""
    return [path for name in (CONFIG_FILE, WEIGHTS_FILE) if (path := folder / name).is_file()]


def adapter_config(folder: Path, field: str = "adapter", alone: bool = False) -> dict[str, Any]:
    """The PEFT configuration of a LoRA adapter.

    Args:
        field: what the user calls it.
        alone: nobody else will be asked of the model that it is put on, neither another adapter nor the base.

    Raises:
        CorruptFile: it is not there, or not JSON.
        InputError: it is not LoRA; LoRA by a forward of another kind; or it changes the base, and is not alone.
    """
    check_folder(folder, field, RETRAIN)
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


def read_tensors(folder: Path, field: str = "adapter") -> dict[str, Tensor]:
    """The tensors of a saved adapter.

    Args:
        field: what the user calls it.

    Raises:
        CorruptFile: the file is missing, truncated or not safetensors, or a value is not finite.
    """
    path = folder / WEIGHTS_FILE
    remedy = "Restore the file, or train the adapter again."
    if has_file(path, field, remedy):
        check_readable(path, field, remedy)
    try:
        with same_bytes(files_of_adapter(folder), field, str(folder)):
            tensors = load_file(path)
    except AlignError:
        raise
    except (OSError, SafetensorError) as error:
        message = str(error).splitlines()[0][:120]
        if not path.is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            message = f"there is no such file{', and the pickle beside it is not read' if pickled else ''}"
        raise CorruptFile(field, str(path), f"cannot be read ({message})", remedy) from error
    check_tensors(tensors.items(), field, str(path), RESTORE)
    return tensors


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT adapter on disk, its files read and found whole.

    Attributes:
        config: `adapter_config.json` as it stands.
        shapes: shape of each tensor, by its key in the file.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each adapted module: `lora_A` is [rank, in features], `lora_B` [out features, rank]."""
        found = ((KEY.fullmatch(key), shape) for key, shape in self.shapes.items())
        return {m["module"]: shape[0] for m, shape in found if m and m["side"] == "A"}

    @property
    def scores(self) -> bool:
        """Whether it is a reward model's: a head of scores travels with it."""
        return SCORE_KEY in self.shapes


def read_adapter(source: Path) -> Adapter:
    """Read an adapter's files whole and check that they hang together.

    Raises:
        MissingArtifact: a file is not there.
        CorruptFile: a file is truncated or not what its name says, a value is not finite, or a `lora_A` lacks its
            `lora_B` or disagrees with it in rank.
        InputError: it is not a LoRA adapter.
    """
    written = "Point at a folder that `save_pretrained` of PEFT wrote."
    check_folder(source, CONFIG_FILE, written)
    if not (source / CONFIG_FILE).is_file():
        raise MissingArtifact(CONFIG_FILE, str(source), "the file is not there", written)
    config = json_object(source / CONFIG_FILE, CONFIG_FILE, written)
    if config.get("peft_type") != "LORA":
        raise InputError(
            "peft_type", config.get("peft_type"), "only LoRA adapters are read", "Train with method=qlora."
        )
    weights = source / WEIGHTS_FILE
    if not weights.is_file():
        raise MissingArtifact(WEIGHTS_FILE, str(source), "the file is not there", RETRAIN)

    def corrupt(problem: str) -> CorruptFile:
        return CorruptFile(WEIGHTS_FILE, str(source), problem, RETRAIN)

    shapes = {}
    try:
        with safe_open(weights, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                tensor = file.get_tensor(key)
                if not torch.isfinite(tensor).all():
                    raise corrupt(f"{key} holds values that are not finite")
                shapes[key] = tuple(tensor.shape)
    except SafetensorError as error:
        raise corrupt(f"is truncated or damaged ({error})") from error
    if not shapes:
        raise corrupt("holds no tensors")

    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        if match := KEY.fullmatch(key):
            sides.setdefault(match["module"], {})[match["side"]] = shape
    for module, pair in sides.items():
        if pair.keys() != {"A", "B"}:
            raise corrupt(f"{module} has lora_{''.join(pair)} alone")
        if pair["A"][0] != pair["B"][1]:
            raise corrupt(f"the two sides of {module} have ranks {pair['A'][0]} and {pair['B'][1]}")
    adapter = Adapter(config, shapes)
    if not config.get("rank_pattern") and set(adapter.ranks.values()) - {config.get("r")}:
        raise corrupt(f"holds ranks {sorted(set(adapter.ranks.values()))} where {CONFIG_FILE} says r={config.get('r')}")
    return adapter


def check_targets(config: Mapping[str, Any], adapted: Collection[str], modules: Collection[str]) -> None:
    """Checks that a file has the modules that its configuration names, and no others: PEFT passes over the others, and
    leaves those that are not there as the base has them.

    Args:
        adapted: modules that the file has tensors of.
        modules: of the base, that can be adapted.

    Raises:
        InputError: naming the modules.
    """
    targets = config.get("target_modules")
    if targets is None or str(targets).lower() == ALL_LINEAR:  # PEFT finds out which these are
        return
    read = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "target_parameters")
    asked = SimpleNamespace(target_modules=targets, **{key: config.get(key) for key in read})
    meant = {module for module in {*adapted, *modules} if check_target_module_exists(asked, module)}
    said = targets if isinstance(targets, str) else some(sorted(map(str, targets)))
    if more := sorted(set(adapted) - meant):
        problem = f"leaves out {some(more)}, and {WEIGHTS_FILE} has their tensors: PEFT would pass over them"
        raise InputError("target_modules", said, problem, f"Name them in {CONFIG_FILE}, or remove the tensors.")
    if absent := sorted(meant - set(adapted)):
        problem = f"names {some(absent)}, and {WEIGHTS_FILE} has no tensors of theirs"
        raise InputError("target_modules", said, problem, f"Leave them out in {CONFIG_FILE}, or train it again.")


def adaptable(model: nn.Module) -> list[str]:
    """The modules of a base that PEFT can adapt."""
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding, Conv1D))]


def some(names: Sequence[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def factors_in(source: Path) -> dict[str, Factors]:
    """`lora_A` and `lora_B` of each module of an adapter that was read and found whole."""
    tensors = load_file(source / WEIGHTS_FILE)
    found = {match["module"]: key for key in tensors if (match := KEY.fullmatch(key)) and match["side"] == "A"}
    return {module: (tensors[key], tensors[key.replace(".lora_A.", ".lora_B.")]) for module, key in found.items()}


def head_in(source: Path) -> Tensor:
    """The head of a reward model [D], fp32."""
    with safe_open(source / WEIGHTS_FILE, framework="pt") as file:
        return file.get_tensor(SCORE_KEY).float().squeeze(0)
