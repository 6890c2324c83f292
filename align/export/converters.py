"""llama.cpp's own converters to GGUF, found and run. `llama-cpp-python` carries them in its source archive alone:

    python -m align.export.converters [llama_cpp_python-VERSION.tar.gz]

unpacks them from the archive given, or from the one that pip downloads, to where `export=gguf` looks for them. A clone
of llama.cpp has them too: `export.converters=FOLDER`.
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
from align.core.files import open_binary, user_path
from align.core.outputs import FOLDER_SEAL, digests_of, refuse_foreign_folder, seal_folder
from align.rollout.engine_process import last_words, run_quietly
from align.run import file_digest, json_digest
from align.run.atomic import publish

PACKAGE = "llama-cpp-python"
HF, LORA = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
NEEDED = re.compile(rf"[^/]+/vendor/llama\.cpp/({HF}|{LORA}|LICENSE|(?:conversion|gguf-py/gguf)/[\w/]+\.py)")
COMPARE = Path(__file__).with_name("compare_gguf.py")
FIELD = "XDG_CACHE_HOME"
MOVE_AWAY = "Move the folder away, or set XDG_CACHE_HOME to another one."
INSTALL = "python -m align.export.converters"

# What the converters say in a traceback, and what that means to whoever exports.
KNOWN = (
    (
        "BPE pre-tokenizer was not recognized",
        "tokenizer",
        "llama.cpp's converter does not know how it cuts text before its merges",
        "Export it as export=merged, or train on a base whose tokenizer llama.cpp knows.",
    ),
    (
        r"Model \S+ is not supported|Architecture .+ not supported",
        "model",
        "llama.cpp's converter does not know this architecture",
        "Export it as export=merged.",
    ),
)


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/align/llama.cpp`, `~/.cache/align/llama.cpp` unless said."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "align" / "llama.cpp"


def converters_in(folder: str | None) -> Path:
    """The folder with both converters. Raises: InputError: they are not there."""
    place = user_path(folder, "export.converters") if folder else default_folder()
    for name in (HF, LORA):
        if not (place / name).is_file():
            problem = f"llama.cpp's {name} is not there"
            raise InputError("export.converters", str(place), problem, f"Run {INSTALL}, or name a clone of llama.cpp.")
    return place


def digest_of(converters: Path) -> str:
    """sha256 over their sources, hex: another converter makes another file."""
    sources = sorted([converters / HF, converters / LORA, *(converters / "conversion").rglob("*.py")])
    return json_digest([[str(path.relative_to(converters)), file_digest(path)] for path in sources])


def convert_model(converters: Path, model: Path, target: Path, name: str, weights: str) -> None:
    """A folder with a model, in fp32, as one GGUF file.

    Args:
        name: what the file says it is called.
        weights: `f16` or `f32`.

    Raises:
        InputError: the converter does not know the architecture or the tokenizer.
        RuntimeError: it fails otherwise.
    """
    words = [model, "--outfile", target, "--outtype", weights, "--model-name", name]
    _run(converters / HF, words, target, name)


def convert_adapter(converters: Path, adapter: Path, base: Path, target: Path, weights: str) -> None:
    """A folder with a plain LoRA in PEFT's format as one GGUF file. Raises: see `convert_model`.

    Args:
        base: a folder with the base's configuration.
    """
    _run(converters / LORA, ["--base", base, "--outfile", target, "--outtype", weights, adapter], target, base.name)


def first_mismatch(converters: Path, whole: Path, rounded: Path) -> str:
    """Compares two GGUF files of one model, in f32 and in f16: empty where each tensor of the second is that of the
    first, rounded; else the name of the first that is not."""
    words = [sys.executable, "-I", str(COMPARE), str(converters / "gguf-py"), str(whole), str(rounded)]
    done = run_quietly(words, "comparing GGUF files")
    if done.returncode:
        raise RuntimeError(f"comparing {rounded.name}: {last_words(done.stderr)}")
    return done.stdout.strip()


def _run(script: Path, words: list[str | Path], target: Path, name: str) -> None:
    nothing_from_a_hub = os.environ | {"HF_HUB_OFFLINE": "1"}
    words = [sys.executable, script, *words]
    done = run_quietly([str(w) for w in words], script.name, env=nothing_from_a_hub, stdin=subprocess.DEVNULL)
    if done.returncode == 0 and target.is_file():
        return
    for sign, field, problem, remedy in KNOWN:
        if re.search(sign, done.stderr):
            raise InputError(field, name, problem, remedy)
    raise RuntimeError(f"{script.name} ended with status {done.returncode}:\n{done.stderr[-4000:]}")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the converters out of the source archive, in the place of older ones that were unpacked.

    Raises:
        CorruptFile: it is no such archive.
        InputError: the folder holds something else, or was edited.
        StorageError: the folder cannot be written.
    """
    try:
        with open_binary(archive) as file_of_archive, tarfile.open(fileobj=file_of_archive) as tar:
            needed = [(m, match[1]) for m in tar if m.isfile() and (match := NEEDED.fullmatch(m.name))]
            sources = {name: file.read() for member, name in needed if (file := tar.extractfile(member))}
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        remedy = f"Download {PACKAGE} again."
        raise CorruptFile("archive", str(archive), f"cannot be read ({error})", remedy) from error
    if not {HF, LORA} <= sources.keys():
        remedy = f"Name the source archive of {PACKAGE}, 0.3.30 or newer."
        raise CorruptFile("archive", str(archive), f"holds no {LORA}", remedy)
    if folder.is_dir() and digests_of(folder) == {name: sha256(source).hexdigest() for name, source in sources.items()}:
        return  # by whatever program it was unpacked
    refuse_foreign_folder(folder, FIELD, MOVE_AWAY)
    with publish(folder, replace=FOLDER_SEAL) as part:
        for name, source in sources.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_bytes(source)
        seal_folder(part)


def download(folder: Path) -> Path:
    """The source archive in the version that is installed, or the newest. Raises: InputError: pip cannot have it."""
    try:
        wanted = f"{PACKAGE}=={metadata.version(PACKAGE)}"
    except metadata.PackageNotFoundError:
        wanted = PACKAGE
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
    done = subprocess.run([*pip, "--dest", str(folder), wanted], capture_output=True, text=True)
    found = sorted(folder.glob("llama_cpp_python-*.tar.gz"))
    if done.returncode or not found:
        problem = f"pip could not download it ({(done.stderr.strip() or 'no reason given').splitlines()[-1]})"
        raise InputError("archive", wanted, problem, f"Give the archive itself: {INSTALL} llama_cpp_python-….tar.gz")
    return found[0]


def main(words: list[str]) -> int:
    folder = default_folder()
    if set(words) & {"-h", "--help"}:
        print(__doc__)
        return 0
    try:
        with tempfile.TemporaryDirectory() as work:
            unpack(Path(words[0]) if words else download(Path(work)), folder)
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
