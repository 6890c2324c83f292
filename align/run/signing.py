"""Signatures of exports, by OpenSSF's `model-signing` and the user's own key pair. No network is used.

`model.sig` lies in the folder that it signs. It covers every file there except itself, Git's own files, and a base that
lies beside an adapter (`find_linked_base`). A link to a file is signed as the file.
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
from align.core.files import open_binary, parse_user_path, read_bytes
from align.run.digests import file_digest
from align.run.weights import ABOUT, ADAPTER_CONFIG, build_local_base_name

SIGNATURE = "model.sig"
PASSPHRASE = "ALIGN_SIGNING_PASSWORD"
"""Name of the environment variable with the passphrase of a private key."""
CURVES = ("secp256r1", "secp384r1", "secp521r1")
GIT = (".git", ".gitattributes", ".github", ".gitignore")
MOST = 64 * 2**20
"""Maximum number of bytes read from the file of a signature or a key."""
MAKE = "docs/exporting.md has the commands that make a key pair."
AGAIN = "Fetch it again, or export it again with export.sign=KEY."


class NotSigned(CorruptFile):
    """Error for a folder that has no valid signature, or whose files differ from the signed ones.

    The message names only paths in the folder.
    """


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """A private key for `model-signing`, with the fingerprint of its public key.

    Attributes:
        fingerprint: SHA-256 of the file of its public key as openssl writes it, in hex.
        by: its `model_signing.signing.Config`.
    """

    fingerprint: str
    by: Any = field(repr=False)


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key for `model-signing`, with its fingerprint.

    Attributes:
        fingerprint: SHA-256 of its file as openssl writes it, in hex.
        by: its `model_signing.verifying.Config`, with the key's content.
    """

    fingerprint: str
    by: Any = field(repr=False)


def load_private_key(key_path: str, setting: str) -> PrivateKey:
    """Load a private key from a PEM file, with the passphrase in `ALIGN_SIGNING_PASSWORD` if it is encrypted.

    Args:
        key_path: path of its file.
        setting: name of the setting in a message.

    Raises:
        InputError: The key cannot be used, or the package is not installed.
    """
    signing = import_model_signing(setting, key_path).signing
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    path = parse_user_path(key_path, setting)
    text = read_key(key_path, setting)
    require(
        b"PUBLIC KEY-" not in text,
        setting,
        key_path,
        "is a public key, which only verifies",
        "Name the private one.",
    )
    passphrase: Any = None
    try:
        try:
            key = load_pem_private_key(text, None)
        except TypeError:  # it has a passphrase
            passphrase = os.environ.get(PASSPHRASE, "").encode()
            require(
                bool(passphrase),
                setting,
                key_path,
                "has a passphrase",
                f"Set it as {PASSPHRASE} in the environment.",
            )
            key = load_pem_private_key(text, passphrase)
    except InputError:
        raise
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        problem = f"does not open with the passphrase in {PASSPHRASE}" if passphrase else "holds no private key in PEM"
        raise InputError(setting, key_path, problem, MAKE) from error
    return PrivateKey(
        compute_fingerprint(key.public_key(), setting, key_path),
        signing.Config().use_elliptic_key_signer(private_key=path, password=passphrase),
    )


def load_public_key(key_path: str, setting: str) -> PublicKey:
    """Load a public key from a PEM file. The file is not read again later.

    Args and Raises: as `load_private_key`.
    """
    verifying = import_model_signing(setting, key_path).verifying
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    path = parse_user_path(key_path, setting)
    text = read_key(key_path, setting)
    remedy = "Name the public key that belongs to it: openssl pkey -in KEY -pubout -out PUBLIC_KEY."
    require(b"PRIVATE KEY-" not in text, setting, key_path, "is a private key, which only its owner has", remedy)
    try:
        key = load_pem_public_key(text)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(setting, key_path, "holds no public key in PEM", MAKE) from error
    fingerprint = compute_fingerprint(key, setting, key_path)
    # model_signing does not follow links and fails at a broken one: `verify_signature` looks for unsigned files itself.
    config = verifying.Config().use_elliptic_key_verifier(public_key=path).set_ignore_unsigned_files(True)
    return PublicKey(fingerprint, config)


def import_model_signing(setting: str, key_path: str) -> Any:
    """Import and return the package `model_signing`, which takes half a second.

    Raises:
        InputError: It is not installed.
    """
    require_extra("sign", setting, key_path)
    import model_signing

    return model_signing


def read_key(key_path: str, setting: str) -> bytes:
    return read_bytes(parse_user_path(key_path, setting), setting, "Name the file of a key.")[:MOST]


def compute_fingerprint(key: Any, setting: str, key_path: str) -> str:
    """Return the SHA-256 in hex of an elliptic-curve public key in PEM, by which signatures name their key.

    Raises:
        InputError: `model-signing` does not support this kind of key.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    is_supported = isinstance(key, EllipticCurvePublicKey) and key.curve.name in CURVES
    kind = getattr(getattr(key, "curve", None), "name", type(key).__name__.strip("_"))
    require(is_supported, setting, key_path, f"is of the kind {kind}, not one of {', '.join(CURVES)}", MAKE)
    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def sign_folder(folder: Path, key: PrivateKey) -> None:
    """Sign all files of a folder with a private key, and write the signature to `model.sig` in it.

    A linked base beside an adapter is left out.
    """
    from model_signing import hashing

    base = find_linked_base(folder)
    linked_base = [base] if base and (folder / base).is_symlink() else []
    config = hashing.Config().set_ignored_paths(paths=[SIGNATURE, *linked_base]).set_allow_symlinks(True)
    key.by.set_hashing_config(config).sign(folder, folder / SIGNATURE)


def verify_signature(folder: Path, key: PublicKey, setting: str, shown: str) -> None:
    """Raise NotSigned unless `model.sig` in a folder is by `key` and covers exactly the files there, unchanged.

    Args:
        setting, shown: names of the folder in a message.

    Raises:
        NotSigned: The folder has no signature or another key's, or a file differs, is missing or was added.
    """
    from model_signing import hashing

    def not_signed(problem: str, remedy: str = AGAIN) -> NotSigned:
        return NotSigned(setting, shown, problem, remedy)

    if not os.path.lexists(folder / SIGNATURE):
        raise not_signed(f"has no signature ({SIGNATURE})", "Name an export that was made with export.sign=KEY.")
    try:
        with open_binary(folder / SIGNATURE) as file:
            text = file.read(MOST)
        signer, signed = parse_claims(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise not_signed(f"its {SIGNATURE} is no signature made with a key pair") from error
    if signer != key.fingerprint:
        raise not_signed(
            f"{SIGNATURE} is by another key ({signer[:12]}) than the one to verify ({key.fingerprint[:12]})"
        )
    with TemporaryDirectory(prefix="align-signature-") as work:
        copied_signature = Path(work, SIGNATURE)
        copied_signature.write_bytes(text)  # the bytes whose claims were read above
        try:
            copy(key.by).set_hashing_config(hashing.Config().set_allow_symlinks(True)).verify(folder, copied_signature)
        except Exception as error:  # the package raises no class of its own
            raise not_signed(describe_mismatch(folder, signed)) from error
    try:  # base.json has been verified by now
        base = find_linked_base(folder)
        if any(Path(name).parts[0] == base for name in signed):
            base = ""  # it was signed too
        added = {*iter_signed_files(folder, base)} - signed.keys()
    except OSError as error:
        raise not_signed(f"a folder in it cannot be read ({error.strerror})") from error
    if added:
        raise not_signed(f"{min(added)} is not among the files that were signed", "Remove it, if it is not needed.")


def parse_claims(text: bytes) -> tuple[str, dict[str, str]]:
    """Parse an unverified signature and return the fingerprint of its key and its mapping from file name to SHA-256.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: The text is not a signature that this version reads.
    """
    bundle = json.loads(text)
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True))
    signed = {str(resource["name"]): resource["digest"] for resource in payload["predicate"]["resources"]}
    if any(Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts for name in signed):
        raise ValueError("names a file outside of its folder")
    return str(bundle["verificationMaterial"]["publicKey"]["hint"]), signed


def find_linked_base(folder: Path) -> str:
    """Return the name of the subfolder or link that holds an adapter's base model, or an empty text if none exists.

    Many adapters share a base, so that it is not part of any. The signed `base.json` names it.
    """
    try:
        base = json.loads(read_bytes(folder / ABOUT, ABOUT)) if (folder / ADAPTER_CONFIG).is_file() else {}
        name = build_local_base_name(base) if base.get("id") else ""
        revision = base.get("revision")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    if revision or name in ("", ".", "..") or "/" in name or "\0" in name:
        return ""
    return name if (folder / name).is_dir() or (folder / name).is_symlink() else ""


def iter_signed_files(folder: Path, base: str) -> Iterator[str]:
    """Yield the relative paths of all files and folder links in a folder, except the signature, Git's files and `base`.

    A signature has to cover all of these.

    Raises:
        OSError: A folder cannot be read.
    """

    def raise_error(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=raise_error):
        if Path(parent) == folder:
            ignored = {SIGNATURE, base, *GIT}
            folders[:] = [name for name in folders if name not in ignored]  # os.walk enters those that are left
            files = [name for name in files if name not in ignored]
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]  # os.walk does not enter them
        for name in (*files, *links):
            yield Path(parent, name).relative_to(folder).as_posix()


def describe_mismatch(folder: Path, signed: Mapping[str, str]) -> str:
    """Return a message about the first signed file that is missing, changed or unreadable in a folder.

    If all are as signed, the message is that the signature was changed.

    Args:
        signed: file name → SHA-256.
    """
    for name, digest in signed.items():
        try:
            if not os.path.lexists(folder / name):
                return f"{name} was signed and is missing"
            if not (folder / name).is_file() or file_digest(folder / name) != digest:
                return f"{name} is not the file that was signed"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read ({getattr(error, 'strerror', None) or error})"
    return f"{SIGNATURE} was changed"
