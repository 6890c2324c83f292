"""llama.cpp's own converters to GGUF: found, unpacked and run. `llama-cpp-python` has them only in its source archive:

    python -m align.export.converters [llama_cpp_python-VERSION.tar.gz]

unpacks them from this archive, or from the one that pip downloads, to where `export=gguf` looks for them. A clone of
llama.cpp has them too: `export.converters=FOLDER`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zlib
from hashlib import sha256
from importlib import metadata
from pathlib import Path

from align.core.errors import CorruptFile, InputError
from align.core.files import open_binary, parse_user_path
from align.core.outputs import FOLDER_SEAL, hash_files, refuse_foreign_folder, seal_folder
from align.rollout.engine_process import find_error_line, run_and_capture
from align.run import file_digest, json_digest
from align.run.atomic import publish_folder

PACKAGE = "llama-cpp-python"
HF = "convert_hf_to_gguf.py"
LORA = "convert_lora_to_gguf.py"
NEEDED = re.compile(rf"[^/]+/vendor/llama\.cpp/({HF}|{LORA}|LICENSE|(?:conversion|gguf-py/gguf)/[\w/]+\.py)")
COMPARE = Path(__file__).with_name("compare_gguf.py")
FIELD = "XDG_CACHE_HOME"
MOVE_AWAY = "Move the folder away, or set XDG_CACHE_HOME to another one."
INSTALL = "python -m align.export.converters"

# Pattern in a converter's traceback → field, problem and remedy.
KNOWN = (
    (
        "BPE pre-tokenizer was not recognized",
        "tokenizer",
        "llama.cpp's converter does not know its pre-tokenizer",
        "Export it as export=merged, or train on a base whose tokenizer llama.cpp knows.",
    ),
    (
        r"Model \S+ is not supported|Architecture .+ not supported",
        "model",
        "llama.cpp's converter does not know this architecture",
        "Export it as export=merged.",
    ),
)


def get_default_folder() -> Path:
    """Return the folder for unpacked converters: `$XDG_CACHE_HOME/align/llama.cpp`, by default
    `~/.cache/align/llama.cpp`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "align" / "llama.cpp"


def find_converters(folder: str | None) -> Path:
    """Return the folder with llama.cpp's two converter scripts, `folder` or the default one, or raise InputError if one
    is missing."""
    path = parse_user_path(folder, "export.converters") if folder else get_default_folder()
    for name in (HF, LORA):
        if not (path / name).is_file():
            problem = f"llama.cpp's {name} is not there"
            raise InputError("export.converters", str(path), problem, f"Run {INSTALL}, or name a clone of llama.cpp.")
    return path


def compute_converter_digest(converters: Path) -> str:
    """Return a SHA-256 digest of the converters' source files, in hex.

    Other sources may write another file.
    """
    sources = sorted([converters / HF, converters / LORA, *(converters / "conversion").rglob("*.py")])
    return json_digest([[str(path.relative_to(converters)), file_digest(path)] for path in sources])


def convert_model(converters: Path, model: Path, target: Path, name: str, weights: str) -> None:
    """Run llama.cpp's converter on a folder with an fp32 model, to write one GGUF file at `target`.

    Args:
        name: name of the model in the file.
        weights: `f16` or `f32`.

    Raises:
        InputError: The converter does not support the architecture or the tokenizer.
        RuntimeError: It fails for another reason.
    """
    arguments = [model, "--outfile", target, "--outtype", weights, "--model-name", name]
    _run_converter(converters / HF, arguments, target, name)


def convert_adapter(converters: Path, adapter: Path, base: Path, target: Path, weights: str) -> None:
    """Run llama.cpp's converter on a folder with a plain PEFT LoRA adapter, to write one GGUF file at `target`.

    Raises as `convert_model`.

    Args:
        base: folder with the base's configuration.
    """
    _run_converter(
        converters / LORA, ["--base", base, "--outfile", target, "--outtype", weights, adapter], target, base.name
    )


def find_mismatched_tensor(converters: Path, exact: Path, rounded: Path) -> str:
    """Return the name of the first tensor in `rounded`, a GGUF file, that is not the rounded tensor of the f32 file
    `exact`.

    Returns "" if all tensors agree.

    Raises:
        RuntimeError: The comparison fails.
    """
    command = [sys.executable, "-I", str(COMPARE), str(converters / "gguf-py"), str(exact), str(rounded)]
    result = run_and_capture(command, "comparing GGUF files")
    if result.returncode:
        raise RuntimeError(f"comparing {rounded.name}: {find_error_line(result.stderr)}")
    return result.stdout.strip()


def _run_converter(script: Path, arguments: list[str | Path], target: Path, name: str) -> None:
    command = [sys.executable, str(script), *map(str, arguments)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = run_and_capture(command, script.name, env=offline, stdin=subprocess.DEVNULL)
    if result.returncode == 0 and target.is_file():
        return
    for pattern, field, problem, remedy in KNOWN:
        if re.search(pattern, result.stderr):
            raise InputError(field, name, problem, remedy)
    raise RuntimeError(f"{script.name} ended with status {result.returncode}:\n{result.stderr[-4000:]}")


def unpack_converters(archive: Path, folder: Path) -> None:
    """Unpack llama.cpp's converters from the source archive of `llama-cpp-python` into a folder, replacing older ones.

    Raises:
        CorruptFile: The file is not such an archive.
        InputError: The folder holds something else, or was edited.
        StorageError: The folder cannot be written.
    """
    try:
        with open_binary(archive) as archive_file, tarfile.open(fileobj=archive_file) as tar:
            members = [(m, match[1]) for m in tar if m.isfile() and (match := NEEDED.fullmatch(m.name))]
            sources = {name: file.read() for member, name in members if (file := tar.extractfile(member))}
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        remedy = f"Download {PACKAGE} again."
        raise CorruptFile("archive", str(archive), f"cannot be read ({error})", remedy) from error
    if not {HF, LORA} <= sources.keys():
        remedy = f"Name the source archive of {PACKAGE}, 0.3.30 or newer."
        raise CorruptFile("archive", str(archive), f"holds no {LORA}", remedy)
    if folder.is_dir() and hash_files(folder) == {name: sha256(source).hexdigest() for name, source in sources.items()}:
        return  # unpacked before, by any program
    refuse_foreign_folder(folder, FIELD, MOVE_AWAY)
    with publish_folder(folder, replace=FOLDER_SEAL) as scratch:
        for name, source in sources.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(source)
        seal_folder(scratch)


def download_source_archive(folder: Path) -> Path:
    """Download the source archive of `llama-cpp-python` with pip into a folder, and return its path, or raise
    InputError.

    The version is the installed one, or else the newest.
    """
    try:
        requirement = f"{PACKAGE}=={metadata.version(PACKAGE)}"
    except metadata.PackageNotFoundError:
        requirement = PACKAGE
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
    result = subprocess.run([*pip, "--dest", str(folder), requirement], capture_output=True, text=True)
    archives = sorted(folder.glob("llama_cpp_python-*.tar.gz"))
    if result.returncode or not archives:
        problem = f"pip could not download it ({(result.stderr.strip() or 'no reason given').splitlines()[-1]})"
        raise InputError(
            "archive", requirement, problem, f"Give the archive itself: {INSTALL} llama_cpp_python-….tar.gz"
        )
    return archives[0]


def main(arguments: list[str]) -> int:
    folder = get_default_folder()
    if set(arguments) & {"-h", "--help"}:
        print(__doc__)
        return 0
    try:
        with tempfile.TemporaryDirectory() as work:
            unpack_converters(Path(arguments[0]) if arguments else download_source_archive(Path(work)), folder)
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
