"""Signatures of exports, by OpenSSF's `model-signing` and a key pair of one's own. Nothing is asked of a network.

`model.sig` lies in the folder that it speaks of. It covers every file there but itself, Git's own files, and the base
that lies beside an adapter (`base_beside`). A link to a file counts as the file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from align.core.distribution import require_extra
from align.core.errors import CorruptFile, InputError, require
from align.core.files import open_binary, read_bytes, user_path
from align.run.digests import file_digest
from align.run.weights import ABOUT, ADAPTER_CONFIG, local_base_name

SIGNATURE = "model.sig"
PASSPHRASE = "ALIGN_SIGNING_PASSWORD"
"""The environment variable with the passphrase of a private key."""
CURVES = ("secp256r1", "secp384r1", "secp521r1")
GIT = (".git", ".gitattributes", ".github", ".gitignore")
MOST = 64 * 2**20
"""Bytes of a signature or a key that are read."""
MAKE = "docs/exporting.md has the commands that make a key pair."
AGAIN = "Fetch it again, or export it again with export.sign=KEY."


class NotSigned(CorruptFile):
    """A folder that is not what the owner of a key signed. The message names no path but those in the folder."""


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """Attributes:
    fingerprint: sha256 of the file of its public key, as openssl writes that, hex.
    by: signs with it, see `model_signing.signing.Config`.
    """

    fingerprint: str
    by: Any = field(repr=False)


@dataclass(frozen=True, slots=True)
class PublicKey:
    """Attributes:
    fingerprint: sha256 of its file, as openssl writes that, hex.
    by: verifies with it as it was read, see `model_signing.verifying.Config`.
    """

    fingerprint: str
    by: Any = field(repr=False)


def private_key(given: str, setting: str) -> PrivateKey:
    """The key that signs.

    Args:
        given: the path of its file.
        setting: what to call it in a message.

    Raises:
        InputError: it is none that can be used, or the package is missing.
    """
    signing = package(setting, given).signing
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    path, text = user_path(given, setting), key_text(given, setting)
    require(b"PUBLIC KEY-" not in text, setting, given, "is a public key, which only verifies", "Name the private one.")
    word: Any = None
    try:
        try:
            key = load_pem_private_key(text, None)
        except TypeError:  # it has a passphrase
            word = os.environ.get(PASSPHRASE, "").encode()
            require(bool(word), setting, given, "has a passphrase", f"Set it as {PASSPHRASE} in the environment.")
            key = load_pem_private_key(text, word)
    except InputError:
        raise
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        problem = f"does not open with the passphrase in {PASSPHRASE}" if word else "holds no private key in PEM"
        raise InputError(setting, given, problem, MAKE) from error
    return PrivateKey(
        fingerprint_of(key.public_key(), setting, given),
        signing.Config().use_elliptic_key_signer(private_key=path, password=word),
    )


def public_key(given: str, setting: str) -> PublicKey:
    """The key that verifies. Its file is read now, and not again.

    Args, Raises: as `private_key`.
    """
    verifying = package(setting, given).verifying
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    path, text = user_path(given, setting), key_text(given, setting)
    remedy = "Name the public key that belongs to it: openssl pkey -in KEY -pubout -out PUBLIC_KEY."
    require(b"PRIVATE KEY-" not in text, setting, given, "is a private key, which only its owner has", remedy)
    try:
        key = load_pem_public_key(text)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(setting, given, "holds no public key in PEM", MAKE) from error
    found = fingerprint_of(key, setting, given)
    # It would walk into no link and stop at a broken one: `verified` looks for files that were not signed.
    by = verifying.Config().use_elliptic_key_verifier(public_key=path).set_ignore_unsigned_files(True)
    return PublicKey(found, by)


def package(setting: str, given: str) -> Any:
    """`model_signing`, which takes half a second.

    Raises:
        InputError: it is not installed.
    """
    require_extra("sign", setting, given)
    import model_signing

    return model_signing


def key_text(given: str, setting: str) -> bytes:
    return read_bytes(user_path(given, setting), setting, "Name the file of a key.")[:MOST]


def fingerprint_of(key: Any, setting: str, given: str) -> str:
    """sha256 of a public key in PEM, hex, by which signatures name it.

    Raises:
        InputError: it is of another kind than `model-signing` takes.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    fits = isinstance(key, EllipticCurvePublicKey) and key.curve.name in CURVES
    kind = getattr(getattr(key, "curve", None), "name", type(key).__name__.strip("_"))
    require(fits, setting, given, f"is of another kind ({kind}) than {', '.join(CURVES)}", MAKE)
    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def sign(folder: Path, key: PrivateKey) -> None:
    """`model.sig` in a folder, last of its files."""
    from model_signing import hashing

    beside = base_beside(folder)
    apart = [beside] if beside and (folder / beside).is_symlink() else []
    hashed = hashing.Config().set_ignored_paths(paths=[SIGNATURE, *apart]).set_allow_symlinks(True)
    key.by.set_hashing_config(hashed).sign(folder, folder / SIGNATURE)


def verified(folder: Path, key: PublicKey, setting: str, shown: str) -> None:
    """Finds that a folder holds what the owner of a key signed, and nothing else.

    Args:
        setting, shown: what to call the folder in a message.

    Raises:
        NotSigned: it has no signature, or another key's; a file is another, is missing, or was added.
    """
    from model_signing import hashing

    def refused(problem: str, remedy: str = AGAIN) -> NotSigned:
        return NotSigned(setting, shown, problem, remedy)

    if not os.path.lexists(folder / SIGNATURE):
        raise refused(f"has no signature ({SIGNATURE})", "Name an export that was made with export.sign=KEY.")
    try:
        with open_binary(folder / SIGNATURE) as file:
            text = file.read(MOST)
        signer, signed = claims_of(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise refused(f"its {SIGNATURE} is no signature by a key of one's own") from error
    if signer != key.fingerprint:
        raise refused(f"{SIGNATURE} is by another key ({signer[:12]}) than the one to verify ({key.fingerprint[:12]})")
    with TemporaryDirectory(prefix="align-signature-") as work:
        read = Path(work, SIGNATURE)
        read.write_bytes(text)  # the one whose claims were read above
        try:
            copy(key.by).set_hashing_config(hashing.Config().set_allow_symlinks(True)).verify(folder, read)
        except Exception as error:  # the package has no class of its own for what it refuses
            raise refused(what_changed(folder, signed)) from error
    try:  # by now `base.json` is known to be what was signed
        beside = base_beside(folder)
        inside = any(Path(name).parts[0] == beside for name in signed)  # no base, or one that was signed too
        added = {*files_in(folder, "" if inside else beside)} - signed.keys()
    except OSError as error:
        raise refused(f"a folder in it cannot be read ({error.strerror})") from error
    if added:
        raise refused(f"{min(added)} is not among the files that were signed", "Remove it, if nobody needs it.")


def claims_of(text: bytes) -> tuple[str, dict[str, str]]:
    """What a signature says before it is verified: the fingerprint of its key, and file → sha256.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none that this version reads.
    """
    bundle = json.loads(text)
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True))
    signed = {str(one["name"]): one["digest"] for one in payload["predicate"]["resources"]}
    if any(Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts for name in signed):
        raise ValueError("names a file outside of its folder")
    return str(bundle["verificationMaterial"]["publicKey"]["hint"]), signed


def base_beside(folder: Path) -> str:
    """The name by which an adapter's folder has its base: a link, or what a copy made of it; empty where it has none.

    The base is no part of the adapter, of which many share it. `base.json`, which is signed, names the model.
    """
    try:
        said = json.loads(read_bytes(folder / ABOUT, ABOUT)) if (folder / ADAPTER_CONFIG).is_file() else {}
        name = local_base_name(said) if said.get("id") else ""
        revision = said.get("revision")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    plain = name not in ("", ".", "..") and "/" not in name and "\0" not in name and not revision
    lies = (folder / name).is_dir() or (folder / name).is_symlink()
    return name if plain and lies else ""


def files_in(folder: Path, beside: str) -> Iterator[str]:
    """The files that a signature has to cover, and whatever else is no folder.

    Raises:
        OSError: a folder cannot be read.
    """

    def failed(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=failed):
        if Path(place) == folder:
            apart = {SIGNATURE, beside, *GIT}
            folders[:], files = [n for n in folders if n not in apart], [n for n in files if n not in apart]
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]  # which nobody walks into
        for name in (*files, *links):
            yield Path(place, name).relative_to(folder).as_posix()


def what_changed(folder: Path, signed: Mapping[str, str]) -> str:
    """Why the files of a folder are not those that were signed: the first that is missing, or has another digest."""
    for name, digest in signed.items():
        try:
            if not os.path.lexists(folder / name):
                return f"{name} was signed and is missing"
            if not (folder / name).is_file() or file_digest(folder / name) != digest:
                return f"{name} is not the file that was signed"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read ({getattr(error, 'strerror', None) or error})"
    return f"{SIGNATURE} was changed"
