"""Lists, checks and digests of the files from which a model or an adapter is loaded. Imports no torch.

transformers finds weights by rules of its own: pickles if `model.safetensors` is missing, files that
`transformers_weights` or an index names, an adapter beside the weights, `shard-00001-model-00001-of-00001.safetensors`
before all others. Files that are not on this list are hidden from it (`align.models.load`).
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
from align.core.files import has_file, open_binary, read_text, require_readable_folder
from align.run.digests import files_digest, match_files
from align.run.files import read_json_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SCORE_KEY = "base_model.model.score.weight"
"""Name of the tensor with a reward model's score head in its adapter's safetensors file."""
ABOUT = "base.json"
"""Name of the file in an export that identifies the base model by `id`, `revision` and `digest`."""
DIGITS = 16
"""Number of hexadecimal digits of a base's digest in the name by which an exported adapter refers to it."""
VALUE_HEAD_FILE = "value_head.safetensors"
"""Name of the file with the weights of the critic's value head, beside PPO's adapter."""
TOKENIZER = (
    "tokenizer*",
    "*.model",
    "special_tokens_map.json",
    "chat_template*",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
)
"""Glob patterns of the files of a tokenizer and its chat template."""
TEMPLATES = "additional_chat_templates"
"""Name of the folder of chat templates that transformers would read, one of which would override the tokenizer's."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5", ".distcp")
"""Suffixes of weight files that are never read, because opening most of these formats runs code."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Keys of `config.json` that hold a number of layers."""
MOST_LAYERS = 10_000
MOST = 2**31
"""Largest accepted integer in `config.json`, except for numbers of layers."""
AGAIN = "Download or save the model again."
FLOATS = ("F64", "F32", "F16", "BF16")
"""Names of the safetensors dtypes that are accepted as weights."""
EIGHT_BITS = ("F8", "F6", "F4")
"""Prefixes of safetensors dtypes with 8 bits or fewer, which are never read as weights."""
MOST_HEADER = 100_000_000
"""Maximum size in bytes of a safetensors header, the limit that safetensors itself sets."""
UNQUANTISED = "Give the model as it was before: method=qlora quantises it."
PICKLED = "Save the model with safe_serialization; pickled weights are not read."


def build_local_base_name(base: Mapping[str, Any]) -> str:
    """Return the name by which an exported adapter refers to its base model: the hub id, or `NAME-DIGEST` for other
    bases.

    That is the id of a hub's model, which is stored with its revision. Any other base has its name and the first digits
    of its digest. PEFT looks for the name below the working folder and then on a hub. A bare name such as `my-model`
    may be another model there; a name with a digest matches only the link in the export.

    Args:
        base: `id`, `revision` and `digest`, as in `base.json`.
    """
    digest = str(base.get("digest") or "")[:DIGITS]
    return str(base["id"]) if base.get("revision") or not digest else f"{base['id']}-{digest}"


def model_files(folder: Path, field: str = "model.path", displayed: str | None = None) -> list[Path]:
    """Check a model's folder and return all files that the model is read from: weights, configuration, tokenizer.

    Links are followed and hashed.

    Raises:
        CorruptFile, InputError: As `model_config` and `weight_files`.
    """
    model_config(folder, field, displayed)
    weights = weight_files(folder, field, displayed)
    for path in weights:
        if path.suffix == ".safetensors":
            refuse_quantised_tensors(path, field, displayed or str(folder))
    patterns = (CONFIG, "generation_config.json", *TOKENIZER)
    return sorted({*weights, *match_files(folder, patterns)})


def model_digest(folder: Path, field: str = "model.path", displayed: str | None = None) -> str:
    """Return the SHA-256 in hex over the names and contents of a model's weights, configuration and tokenizer files."""
    return files_digest(model_files(folder, field, displayed))


def adapter_digest(folder: Path, bare: bool = False) -> str:
    """Return the SHA-256 in hex over an adapter's `adapter_config.json` and `adapter_model.safetensors`, if they exist.

    Args:
        bare: the adapter is not a run's, whose manifest holds a hash of every file: its tokenizer and chat template are
            hashed too.
    """
    return files_digest(match_files(folder, (ADAPTER_CONFIG, ADAPTER_WEIGHTS, *(TOKENIZER if bare else ()))))


def tokenizer_digest(folder: Path) -> str:
    """Return the SHA-256 in hex over the tokenizer files and chat template in a folder; empty if none exist."""
    files = match_files(folder, TOKENIZER)
    return files_digest(files) if files else ""


def compute_published_digest(folder: Path) -> str:
    """Return the SHA-256 in hex of the adapter or the model in a run's artifact folder; empty if it holds neither.

    Also empty for a model in a format that is not read.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return adapter_digest(folder)
    if not (folder / "config.json").is_file():
        return ""
    with suppress(AlignError):
        return model_digest(folder, "artifact", str(folder))
    return ""


def list_unhashed_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the names of tokenizer files in a folder that transformers would read but no digest covers, sorted.

    Args:
        names: files that the tokenizer's class looks for.
    """
    hashed = {path.name for path in match_files(folder, TOKENIZER)}
    unhashed_names = [name for name in names if (folder / name).is_file() and name not in hashed]
    if (folder / TEMPLATES).is_dir():
        unhashed_names.append(TEMPLATES)
    return sorted(unhashed_names)


@contextmanager
def link_files(files: list[Path]) -> Iterator[Path]:
    """Yield a temporary folder with links to these files only, for a library that would also read other files there."""
    with TemporaryDirectory(prefix="align-model-") as name:
        for path in files:
            Path(name, path.name).symlink_to(path.resolve())
        yield Path(name)


def weight_files(folder: Path, field: str = "model.path", displayed: str | None = None) -> list[Path]:
    """Return a model's weight files, `model.safetensors` or the index and its shards, or raise InputError.

    Args:
        field, displayed: names of the folder in a message.

    Raises:
        CorruptFile: The index is invalid, or a shard that it names is missing.
        InputError: There are no such weights, or the index names files outside its folder.
    """
    displayed = displayed or str(folder)
    if has_file(folder / SINGLE, field, AGAIN):
        return [folder / SINGLE]
    index = folder / INDEX
    if not has_file(index, field, AGAIN):
        raise InputError(field, displayed, describe_missing_weights(folder), PICKLED)
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


def describe_missing_weights(folder: Path) -> str:
    other_names = sorted(p.name for p in folder.iterdir() if p.suffix in (*PICKLES, ".safetensors", ".gguf"))
    note = f"; what it holds is {', '.join(other_names[:3])}" if other_names else ""
    return f"there are no safetensors in {folder} by the name of {SINGLE}, and no {INDEX}{note}"


def model_config(folder: Path, field: str = "model.path", displayed: str | None = None) -> dict[str, Any]:
    """Read and check a model's `config.json`, and raise InputError if the model cannot be loaded, such as quantised
    ones.

    Raises:
        CorruptFile: It is not a JSON object.
        InputError: It is missing, the folder also holds an adapter, the weights are quantised, or it refers to weights
            in other files.
    """
    displayed = displayed or str(folder)
    path = folder / CONFIG
    require_readable_folder(folder, field, AGAIN)
    if not has_file(path, field, AGAIN):
        raise InputError(field, displayed, f"there is no {CONFIG} in {folder}", "Give the folder of a saved model.")
    config = read_json_object(path, field, AGAIN)
    if has_file(folder / "generation_config.json", field, AGAIN):  # transformers ignores one that is broken
        read_json_object(folder / "generation_config.json", field, AGAIN)
    if (folder / ADAPTER_CONFIG).is_file():
        problem = f"holds {ADAPTER_CONFIG} beside {CONFIG}: to some readers it is a model, to others an adapter"
        raise InputError(field, displayed, problem, "Give adapter and base as two folders: init= and model.path=.")
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and (quantised := describe_quantisation(part)):
            problem = f"its weights are quantised already ({quantised})"
            raise InputError(field, displayed, problem, UNQUANTISED)
    for key, value in config.items():  # transformers allocates all layers before it reads a weight
        if isinstance(value, int) and value > (MOST_LAYERS if key in LAYERS else MOST):
            raise InputError(
                field, displayed, f"{CONFIG} says {key}={value}, which is not a valid value", f"Correct {path}."
            )
    for key in ("transformers_weights", "configuration_files"):
        if config.get(key) not in (None, [], SINGLE, INDEX):
            problem = f"{CONFIG} sends the reader to other files ({key}: {config[key]!r})"
            raise InputError(field, displayed, problem, f"Remove {key} from it.")
    return config


def describe_quantisation(config: dict[str, Any]) -> str:
    """Return a phrase on the quantisation that a model's configuration declares, such as its method; empty if none."""
    for key in ("quantization_config", "compression_config", "quantization"):
        settings = config.get(key)
        if key == "quantization" and not (isinstance(settings, dict) and "bits" in settings):
            continue  # MLX writes this key for weights that are not quantised too
        if settings is None:
            continue
        if not isinstance(settings, dict):
            return f"{key}: an unknown method"
        is_4_bit = settings.get("load_in_4bit") or settings.get("_load_in_4bit")
        return f"{key}: {settings.get('quant_method') or 'an unknown method'}{', 4-bit' if is_4_bit else ''}"
    return ""


def refuse_quantised_tensors(path: Path, field: str, displayed: str) -> None:
    """Raise InputError if a safetensors file holds weights as integers or in 8 bits or fewer, and so quantised ones.

    The configuration may not mention them.

    A loader would take integers for weights, or eight-bit floats without their scales. A file that cannot be read is
    left to the loader.
    """
    for name, tensor in read_header(path).items():
        dtype = str(tensor.get("dtype")) if isinstance(tensor, dict) and name != "__metadata__" else "F32"
        if not dtype.startswith(FLOATS) and (name.endswith("weight") or dtype.startswith(EIGHT_BITS)):
            problem = f"its weights are quantised already ({name} in {path.name} is {dtype})"
            raise InputError(field, displayed, problem, UNQUANTISED)


def is_reward_adapter(adapter: Path) -> bool:
    """Return whether the adapter in a folder is a reward model: its weights include a score head."""
    return SCORE_KEY in read_header(adapter / ADAPTER_WEIGHTS)


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file, a mapping from tensor name to dtype and shape; empty if unreadable."""
    try:
        with open_binary(path) as file:
            length = int.from_bytes(file.read(8), "little")
            value = json.loads(file.read(length)) if length <= MOST_HEADER else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def count_weights(folder: Path) -> int:
    """Return the number of parameters of a model, from the shapes in its safetensors headers."""
    files = [path for path in weight_files(folder) if path.suffix == ".safetensors"]
    tensors = (tensor for path in files for name, tensor in read_header(path).items() if name != "__metadata__")
    shapes = (tensor.get("shape") for tensor in tensors if isinstance(tensor, dict))
    return sum(math.prod(shape) for shape in shapes if is_shape(shape))  # loading reports an invalid one


def is_shape(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(size, int) and size >= 0 for size in value)
