"""Key pairs in the format of openssl."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec


class KeyPair(NamedTuple):
    """The files of a key pair."""

    private: Path
    public: Path


def write_key_pair(folder: Path, name: str = "key", key: Any = None, word: bytes = b"") -> KeyPair:
    """Write the two files of a key pair.

    Args:
        key: a private key; None for a new one on P-256.
        word: the passphrase of the private key's file; empty for none.
    """
    private_key = key or ec.generate_private_key(ec.SECP256R1())
    private = folder / f"{name}.pem"
    public = folder / f"{name}.pub"
    encryption = form.BestAvailableEncryption(word) if word else form.NoEncryption()
    private.write_bytes(private_key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, encryption))
    public.write_bytes(private_key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    return KeyPair(private, public)
