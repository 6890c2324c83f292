"""Which files a model is read from: one list, which its digest names and its loader is given. Imports no torch.

transformers finds weights by rules of its own: pickles where `model.safetensors` is missing, whatever
`transformers_weights` or an index names, an adapter beside the weights, `shard-00001-model-00001-of-00001.safetensors`
in front of all others. What is not on this list it never sees (`align.models.load`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeGuard

from align.core.errors import AlignError, CorruptFile, InputError
from align.core.files import check_folder, has_file, open_binary, read_text
from align.run.digests import files_digest, matching
from align.run.files import json_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "config.json", "adapter_config.json", "adapter_model.safetensors"
SCORE_KEY = "base_model.model.score.weight"
"""The head of a reward model, in its adapter's file."""
ABOUT = "base.json"
"""The file beside an exported base or adapter that names the base that it was made of: `id`, `revision`, `digest`."""
DIGITS = 16
"""Hexadecimal digits of a base's digest in the name that an exported adapter has for it."""
VALUE_HEAD_FILE = "value_head.safetensors"
"""Of PPO's critic, beside its adapter."""
TOKENIZER = (
    "tokenizer*", "*.model", "special_tokens_map.json", "chat_template*", "added_tokens.json", "vocab*", "merges.txt",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
"""A folder of chat templates, one of which would stand in front of the tokenizer's own."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5", ".distcp")
"""What holds weights that are not read: most of these formats run code as they are opened."""
LAYERS, MOST_LAYERS, MOST = ("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 10_000, 2**31
"""Names of a number of layers, and the most that any setting is believed to be."""
AGAIN = "Download or save the model again."
FLOATS, EIGHT_BITS, MOST_HEADER = ("F64", "F32", "F16", "BF16"), ("F8", "F6", "F4"), 100_000_000
"""Dtypes of safetensors that are read as weights, how those that never are begin, and its own bound of a header."""
UNQUANTISED = "Give the model as it was before: method=qlora quantises it."
PICKLED = "Save the model with safe_serialization; pickled weights are not read."


def local_base_name(base: Mapping[str, Any]) -> str:
    """Return the name by which an exported adapter names its base: the id of a hub's model, which goes with its
    revision; of any other base its name with the beginning of its digest.

    PEFT looks for the name below the working folder first, and then on a hub. A bare name such as `my-model` may be
    another model there; a name with a digest is only that of the link that the export has.

    Args:
        base: `id`, `revision` and `digest`, as in `base.json`.
    """
    digest = str(base.get("digest") or "")[:DIGITS]
    return str(base["id"]) if base.get("revision") or not digest else f"{base['id']}-{digest}"


def model_files(folder: Path, field: str = "model.path", displayed: str | None = None) -> list[Path]:
    """Everything that a model is read from: weights, configuration, tokenizer. Links are followed, as those of the
    hub's cache have to be; what they lead to is read, and so it is hashed.

    Raises:
        CorruptFile, InputError: see `model_config` and `weight_files`.
    """
    model_config(folder, field, displayed)
    weights = weight_files(folder, field, displayed)
    for path in weights:
        if path.suffix == ".safetensors":
            check_stored(path, field, displayed or str(folder))
    rest = (CONFIG, "generation_config.json", *TOKENIZER)
    return sorted({*weights, *matching(folder, rest)})


def model_digest(folder: Path, field: str = "model.path", displayed: str | None = None) -> str:
    """sha256 over the names and contents of `model_files`, hex."""
    return files_digest(model_files(folder, field, displayed))


def adapter_digest(folder: Path, bare: bool = False) -> str:
    """sha256 over the two files that an adapter is read from, as far as they are there, hex.

    Args:
        bare: no run published it, whose manifest has a hash of every file: its tokenizer and chat template count too.
    """
    return files_digest(matching(folder, (ADAPTER_CONFIG, ADAPTER_WEIGHTS, *(TOKENIZER if bare else ()))))


def tokenizer_digest(folder: Path) -> str:
    """sha256 over the tokenizer and the chat template in a folder, hex; empty where there is none."""
    files = matching(folder, TOKENIZER)
    return files_digest(files) if files else ""


def published_digest(folder: Path) -> str:
    """The digest of what a run published: of its model where it has a `config.json`, of its adapter where it has an
    `adapter_config.json`, and empty where it is neither, or a model that is not read."""
    if (folder / ADAPTER_CONFIG).is_file():
        return adapter_digest(folder)
    if not (folder / "config.json").is_file():
        return ""
    with suppress(AlignError):
        return model_digest(folder, "artifact", str(folder))
    return ""


def unhashed(folder: Path, names: Iterable[str]) -> list[str]:
    """What transformers would read of a tokenizer in a folder, and no digest names.

    Args:
        names: of the files that the tokenizer's class looks for.
    """
    hashed = {path.name for path in matching(folder, TOKENIZER)}
    found = [name for name in names if (folder / name).is_file() and name not in hashed]
    return sorted([*found, *(name for name in (TEMPLATES,) if (folder / name).is_dir())])


@contextmanager
def linked_folder(files: list[Path]) -> Iterator[Path]:
    """A folder that holds these files and no other, as links; for a library that would look for more."""
    with TemporaryDirectory(prefix="align-model-") as name:
        for path in files:
            Path(name, path.name).symlink_to(path.resolve())
        yield Path(name)


def weight_files(folder: Path, field: str = "model.path", displayed: str | None = None) -> list[Path]:
    """`model.safetensors`, or the index of a sharded model and the shards that it names.

    Args:
        field, displayed: what to call the folder in a message.

    Raises:
        CorruptFile: the index is not one, or a shard that it names is not there.
        InputError: there are no such weights, or the index names something else than files beside it.
    """
    displayed = displayed or str(folder)
    if has_file(folder / SINGLE, field, AGAIN):
        return [folder / SINGLE]
    index = folder / INDEX
    if not has_file(index, field, AGAIN):
        raise InputError(field, displayed, without_weights(folder), PICKLED)
    text = read_text(index, field, AGAIN)
    try:
        names = sorted(set(json.loads(text)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFile(field, displayed, f"{INDEX} is not an index of weights", AGAIN) from error
    for name in names:
        if not (isinstance(name, str) and Path(name).name == name and "\0" not in name):
            problem = f"{INDEX} names {name!r}, which is no file of its own folder"
            raise InputError(field, displayed, problem, "Put the shards beside the index, by their plain names.")
        if not name.endswith(".safetensors"):
            raise InputError(field, displayed, f"{INDEX} names {name!r}, which is not safetensors", PICKLED)
        if not has_file(folder / name, field, AGAIN):
            raise CorruptFile(field, displayed, f"{name}, which {INDEX} names, is missing", AGAIN)
    if not names:
        raise CorruptFile(field, displayed, f"{INDEX} names no weights", AGAIN)
    return [index, *(folder / name for name in names)]


def without_weights(folder: Path) -> str:
    """What is wrong with a folder that has neither file."""
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (*PICKLES, ".safetensors", ".gguf"))
    found = f"; what it holds is {', '.join(others[:3])}" if others else ""
    return f"there are no safetensors in {folder} by the name of {SINGLE}, and no {INDEX}{found}"


def model_config(folder: Path, field: str = "model.path", displayed: str | None = None) -> dict[str, Any]:
    """The configuration of a model that can be read as it stands.

    Raises:
        CorruptFile: it is not a JSON object.
        InputError: there is none; the folder holds an adapter; the weights are quantised already, or are said to lie
            in other files.
    """
    displayed, path = displayed or str(folder), folder / CONFIG
    check_folder(folder, field, AGAIN)
    if not has_file(path, field, AGAIN):
        raise InputError(field, displayed, f"there is no {CONFIG} in {folder}", "Give the folder of a saved model.")
    config = json_object(path, field, AGAIN)
    if has_file(generation := folder / "generation_config.json", field, AGAIN):  # transformers passes over a broken one
        json_object(generation, field, AGAIN)
    if (folder / ADAPTER_CONFIG).is_file():
        problem = f"holds {ADAPTER_CONFIG} beside {CONFIG}: to some readers it is a model, to others an adapter"
        raise InputError(field, displayed, problem, "Give adapter and base as two folders: init= and model.path=.")
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and (quantised := quantisation_of(part)):
            problem = f"its weights are quantised already ({quantised})"
            raise InputError(field, displayed, problem, UNQUANTISED)
    for key, value in config.items():  # transformers makes as many layers as it is told, before it reads a weight
        most = MOST_LAYERS if key in LAYERS else MOST
        if isinstance(value, int) and value > most:
            raise InputError(field, displayed, f"{CONFIG} says {key}={value}, which no model has", f"Correct {path}.")
    for key in ("transformers_weights", "configuration_files"):
        if config.get(key) not in (None, [], SINGLE, INDEX):
            problem = f"{CONFIG} sends the reader to other files ({key}: {config[key]!r})"
            raise InputError(field, displayed, problem, f"Remove {key} from it.")
    return config


def quantisation_of(config: dict[str, Any]) -> str:
    """How the weights of a configuration are quantised, in a word or two; empty where they are not."""
    for key in ("quantization_config", "compression_config", "quantization"):
        settings = config.get(key)
        if key == "quantization" and not (isinstance(settings, dict) and "bits" in settings):  # MLX's, who may say none
            continue
        if settings is not None:
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            four = isinstance(settings, dict) and (settings.get("load_in_4bit") or settings.get("_load_in_4bit"))
            return f"{key}: {method or 'an unknown method'}{', 4-bit' if four else ''}"
    return ""


def check_stored(path: Path, field: str, displayed: str) -> None:
    """That the tensors of a safetensors file are what they stand for: a configuration may have lost the word that they
    are quantised, and a loader then takes integers for weights, or eight bits without their scales.

    Raises:
        InputError: naming the first that is not. What cannot be read is left to the loader, which says so.
    """
    for name, tensor in header(path).items():
        kind = str(tensor.get("dtype")) if isinstance(tensor, dict) and name != "__metadata__" else "F32"
        if not kind.startswith(FLOATS) and (name.endswith("weight") or kind.startswith(EIGHT_BITS)):
            problem = f"its weights are quantised already ({name} in {path.name} is {kind})"
            raise InputError(field, displayed, problem, UNQUANTISED)


def brings_scores(adapter: Path) -> bool:
    """Whether the adapter in a folder is a reward model's."""
    return SCORE_KEY in header(adapter / ADAPTER_WEIGHTS)


def header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors; empty where it says nothing that can be read."""
    try:
        with open_binary(path) as file:
            length = int.from_bytes(file.read(8), "little")
            found = json.loads(file.read(length)) if length <= MOST_HEADER else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def count_weights(folder: Path) -> int:
    """Return the number of weights in a model's safetensors files, by their headers alone."""
    files = [path for path in weight_files(folder) if path.suffix == ".safetensors"]
    tensors = (tensor for path in files for name, tensor in header(path).items() if name != "__metadata__")
    shapes = (tensor.get("shape") for tensor in tensors if isinstance(tensor, dict))
    return sum(math.prod(shape) for shape in shapes if is_shape(shape))  # loading explains what is no shape


def is_shape(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(size, int) and size >= 0 for size in value)
