"""Signatures: the files that they cover, refused keys, and compatibility with the official tool."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from served_adapters import write_adapter_files
from signing_keys import KeyPair, write_key_pair

from align.core.errors import InputError
from align.run.digests import file_digest
from align.run.receipt import RECEIPT, read_verified_receipt, write_receipt
from align.run.signing import (
    PASSPHRASE,
    SIGNATURE,
    NotSigned,
    load_private_key,
    load_public_key,
    sign_folder,
    verify_signature,
)
from align.run.weights import compute_published_digest

FIELD = "export.sign"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return write_key_pair(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def export(tmp_path: Path, keys: KeyPair) -> Path:
    """An adapter as stage=export leaves it, with a link to its base, signed."""
    base = tmp_path / "bases" / "tiny-dequantised"
    base.mkdir(parents=True)
    (base / "model.safetensors").write_bytes(b"weights")
    folder = write_adapter_files(tmp_path / "export")
    (folder / "base.json").write_text(json.dumps({"id": "tiny", "revision": "", "digest": "d"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "launch").mkdir()
    (folder / "launch" / "vllm.sh").write_text("vllm\n")
    (folder / "tiny-d").symlink_to("../bases/tiny-dequantised", target_is_directory=True)
    write_receipt(folder, [{"name": "transformers", "verdict": "pass"}], [[1]], {"artifact": "a"})
    sign_folder(folder, load_private_key(str(keys.private), FIELD))
    return folder


def read_problem(folder: Path, keys: KeyPair) -> str:
    """Return what is wrong with a folder's signature, or an empty string if it is valid."""
    try:
        verify_signature(folder, load_public_key(str(keys.public), "export.verify"), "export.path", "x")
    except NotSigned as error:
        return error.problem
    return ""


def list_files(folder: Path) -> list[str]:
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in paths if not name.startswith("tiny/"))


def flip_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def run_tool(*arguments: str | Path) -> tuple[int, str]:
    """Run the official command line. Returns its exit status and output."""
    process = subprocess.run(
        [sys.executable, "-m", "model_signing", *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    return process.returncode, process.stdout + process.stderr


def test_each_file_is_covered(export: Path, keys: KeyPair, tmp_path: Path) -> None:
    """Each file of an export is changed, removed and renamed in turn, and the message names it."""
    assert read_problem(export, keys) == ""
    names = [name for name in list_files(export) if name != SIGNATURE]
    assert {RECEIPT, "tokenizer.json", "adapter_model.safetensors", "launch/vllm.sh", "base.json"} <= {*names}
    for name in names:
        for spoil, message in (
            (lambda path: flip_bit(path, path.stat().st_size // 2), f"{name} is not the file that was signed"),
            (Path.unlink, f"{name} was signed and is missing"),
            (lambda path: path.rename(path.with_name("aaa")), f"{name} was signed and is missing"),
            (lambda path: (path.unlink(), path.mkdir()), f"{name} is not the file that was signed"),
            (lambda path: (path.unlink(), os.mkfifo(path)), f"{name} is not the file that was signed"),
        ):
            copy = Path(shutil.copytree(export, tmp_path / "copy", symlinks=True))
            spoil(copy / name)
            assert message in read_problem(copy, keys), name
            shutil.rmtree(copy)


@pytest.mark.parametrize(
    ("add", "says"),
    [
        (lambda folder: (folder / "chat_template.jinja").write_text("x"), "chat_template.jinja is not among"),
        (lambda folder: (folder / "launch" / SIGNATURE).write_text("x"), f"launch/{SIGNATURE} is not among"),
        (lambda folder: (folder / ".hidden").write_text("x"), ".hidden is not among"),
        (lambda folder: os.mkfifo(folder / "pipe"), "pipe is not among"),
        (lambda folder: (folder / "more").symlink_to("/"), "more is not among"),
        (lambda folder: (folder / "loop").symlink_to("loop"), "loop is not among"),
        (lambda folder: ((folder / "launch").rename(folder / "a"), (folder / "launch").symlink_to("a")), "a/vllm.sh "),
        (lambda folder: (folder / SIGNATURE).unlink(), f"has no signature ({SIGNATURE})"),
        (lambda folder: ((folder / SIGNATURE).unlink(), os.mkfifo(folder / SIGNATURE)), "is no signature"),
        (lambda folder: (folder / SIGNATURE).write_text("{}"), "is no signature"),
        (lambda folder: (folder / SIGNATURE).write_text("[" * 100_000), "is no signature"),
    ],
)
def test_what_was_added_is_refused(export: Path, keys: KeyPair, add: Callable[[Path], object], says: str) -> None:
    add(export)
    assert says in read_problem(export, keys)


@pytest.mark.parametrize("part", ["hint", "payload", "sig"])
def test_a_signature_that_was_changed_is_refused(export: Path, keys: KeyPair, part: str) -> None:
    text = (export / SIGNATURE).read_text()
    at = text.index(f'"{part}":"') + len(part) + 24
    (export / SIGNATURE).write_text(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :])
    assert SIGNATURE in read_problem(export, keys)


def test_another_key_is_named(export: Path, keys: KeyPair, tmp_path: Path) -> None:
    other_keys = write_key_pair(tmp_path, "other")
    problem = read_problem(export, other_keys)
    assert "is by another key" in problem
    assert file_digest(keys.public)[:12] in problem, "sha256sum of the public key's file is its fingerprint"
    # The bundle now claims the other key: the signature decides, not the claim.
    text = (export / SIGNATURE).read_text().replace(file_digest(keys.public), file_digest(other_keys.public))
    (export / SIGNATURE).write_text(text)
    assert read_problem(export, other_keys) == f"{SIGNATURE} was changed"


def test_what_no_signature_covers(export: Path, keys: KeyPair, tmp_path: Path) -> None:
    """Git's files and the base beside an adapter are exempt: a link, a broken link or a copy. Other folders are not."""
    moved = Path(shutil.copytree(export, tmp_path / "elsewhere" / "deep" / "export", symlinks=True))
    assert not (moved / "tiny-d").exists()
    assert read_problem(moved, keys) == ""
    copy = Path(shutil.copytree(export, tmp_path / "copied"))
    assert (copy / "tiny-d" / "model.safetensors").is_file()
    (copy / ".git").mkdir()
    (copy / ".git" / "HEAD").write_text("ref")
    (copy / ".gitattributes").write_text("*.safetensors")
    assert read_problem(copy, keys) == ""
    (copy / "tiny-d").rename(copy / "small")
    assert "small/model.safetensors is not among" in read_problem(copy, keys)


@pytest.mark.parametrize(
    ("about", "place", "refused"),
    [
        ({"id": "tiny", "revision": ""}, "tiny", False),
        ({"id": "tiny", "revision": "r"}, "tiny", True),
        ({"id": "other"}, "tiny", True),
        ({"id": "launch"}, "launch", True),
        ({"id": "org/m"}, "org/m", True),
        ({"id": ".."}, "tiny", True),
        ([], "tiny", True),
    ],
)
def test_a_base_is_left_out_only_where_it_lies(
    export: Path, keys: KeyPair, about: object, place: str, refused: bool
) -> None:
    """Bases with the name of a signed folder, and bases from a hub, are not exempt."""
    (export / "tiny-d").unlink()
    (export / "base.json").write_text(json.dumps(about))
    sign_folder(export, load_private_key(str(keys.private), FIELD))
    assert read_problem(export, keys) == ""
    (export / place).mkdir(parents=True, exist_ok=True)
    (export / place / "model.safetensors").write_bytes(b"evil")
    problem = read_problem(export, keys)
    assert problem == (f"{place}/model.safetensors is not among the files that were signed" if refused else "")


def test_a_base_that_was_signed_too_is_covered(export: Path, keys: KeyPair, tmp_path: Path) -> None:
    """The official tool signs copies in this way, with the base in them."""
    copy = Path(shutil.copytree(export, tmp_path / "copied"))
    sign_folder(copy, load_private_key(str(keys.private), FIELD))
    assert read_problem(copy, keys) == ""
    flip_bit(copy / "tiny-d" / "model.safetensors", 0)
    assert read_problem(copy, keys) == "tiny-d/model.safetensors is not the file that was signed"


def test_a_link_to_a_file_counts_as_the_file(export: Path, keys: KeyPair) -> None:
    """The hub's cache consists of such links."""
    (export / "tokenizer.json").rename(export.parent / "blob")
    (export / "tokenizer.json").symlink_to("../blob")
    assert read_problem(export, keys) == ""
    (export.parent / "blob").write_text("[]")
    assert read_problem(export, keys) == "tokenizer.json is not the file that was signed"


def test_receipt_and_digest_stay(export: Path) -> None:
    """Receipt and digest of an export ignore the signature."""
    signed = compute_published_digest(export)
    read_verified_receipt(export)
    (export / SIGNATURE).unlink()
    assert compute_published_digest(export) == signed


def test_the_official_tool_reads_ours_and_we_read_its(export: Path, keys: KeyPair, tmp_path: Path) -> None:
    verify_arguments = ("verify", "key", export, "--signature", export / SIGNATURE, "--public_key", keys.public)
    assert run_tool(*verify_arguments, "--allow_symlinks") == (0, "Verification succeeded\n")
    (export / "tokenizer.json").write_text("[]")
    assert run_tool(*verify_arguments, "--allow_symlinks")[0] == 1
    sign_arguments = ("sign", "key", export, "--signature", export / SIGNATURE, "--private_key", keys.private)
    assert run_tool(*sign_arguments, "--allow_symlinks")[0] == 0
    assert read_problem(export, keys) == ""
    # The tool may leave files out. We refuse such a signature, since loading reads every file.
    assert run_tool(*sign_arguments, "--allow_symlinks", "--ignore-paths", export / "adapter_model.safetensors")[0] == 0
    assert read_problem(export, keys) == "adapter_model.safetensors is not among the files that were signed"
    copy = Path(shutil.copytree(export, tmp_path / "copied"))
    sign_folder(copy, load_private_key(str(keys.private), FIELD))
    verify_arguments = ("verify", "key", copy, "--signature", copy / SIGNATURE, "--public_key", keys.public)
    assert run_tool(*verify_arguments) == (0, "Verification succeeded\n")


def test_keys_that_do_not_sign(tmp_path: Path, keys: KeyPair) -> None:
    private_keys = {
        "rsa": rsa.generate_private_key(65537, 2048),
        "ed": ed25519.Ed25519PrivateKey.generate(),
        "k1": ec.generate_private_key(ec.SECP256K1()),
    }
    (tmp_path / "noise").write_bytes(os.urandom(200))
    os.mkfifo(tmp_path / "pipe")
    refused_keys = {name: write_key_pair(tmp_path, name, key) for name, key in private_keys.items()}
    for path, problem in {
        keys.public: "is a public key",
        tmp_path / "none": "there is no such file",
        tmp_path: "is a folder",
        tmp_path / "noise": "no private key in PEM",
        tmp_path / "pipe": "is a pipe",
        "\0": "is no path",
        refused_keys["rsa"].private: "kind RSAPublicKey",
        refused_keys["ed"].private: "kind Ed25519PublicKey",
        refused_keys["k1"].private: "kind secp256k1",
    }.items():
        with pytest.raises(InputError, match=FIELD) as error:
            load_private_key(str(path), FIELD)
        assert problem in str(error.value)
    for path, problem in {
        keys.private: "is a private key",
        refused_keys["rsa"].public: "kind RSAPublicKey",
        tmp_path / "noise": "no public key",
    }.items():
        with pytest.raises(InputError) as error:
            load_public_key(str(path), "export.verify")
        assert problem in str(error.value)


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()])
def test_other_curves(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    keys = write_key_pair(tmp_path, key=ec.generate_private_key(curve))
    folder = write_adapter_files(tmp_path / "adapter")
    sign_folder(folder, load_private_key(str(keys.private), FIELD))
    assert read_problem(folder, keys) == ""


def test_a_passphrase_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = write_key_pair(tmp_path, word=b"open sesame")
    folder = write_adapter_files(tmp_path / "adapter")
    monkeypatch.delenv(PASSPHRASE, raising=False)
    with pytest.raises(InputError, match=f"has a passphrase. Set it as {PASSPHRASE}"):
        load_private_key(str(locked.private), FIELD)
    monkeypatch.setenv(PASSPHRASE, "open barley")
    with pytest.raises(InputError, match="does not open with the passphrase") as error:
        load_private_key(str(locked.private), FIELD)
    assert "barley" not in str(error.value)
    monkeypatch.setenv(PASSPHRASE, "open sesame")
    sign_folder(folder, load_private_key(str(locked.private), FIELD))
    assert read_problem(folder, locked) == ""
    load_private_key(
        str(write_key_pair(tmp_path, "plain").private), FIELD
    )  # a key without a passphrase ignores the variable


def test_a_key_is_read_once(export: Path, keys: KeyPair, tmp_path: Path) -> None:
    """Servers trust the key that they were started with, even if its file changes later."""
    public_path = Path(shutil.copy(keys.public, tmp_path / "mine.pub"))
    key = load_public_key(str(public_path), "export.verify")
    shutil.copy(write_key_pair(tmp_path, "other").public, public_path)
    verify_signature(export, key, "export.path", "x")


def test_nothing_is_asked_of_a_network(export: Path, keys: KeyPair) -> None:
    code = f"""
import socket
def refused(*_, **__): raise SystemExit("asked a network")
socket.socket.connect = socket.getaddrinfo = refused
from pathlib import Path
from align.run.signing import *
sign_folder(Path({str(export)!r}), load_private_key({str(keys.private)!r}, "a"))
verify_signature(Path({str(export)!r}), load_public_key({str(keys.public)!r}, "b"), "c", "d")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stderr) == (0, "")


def test_without_the_package(keys: KeyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(InputError, match=r"pip install 'align-rlhf\[sign\]'"):
        load_private_key(str(keys.private), FIELD)
