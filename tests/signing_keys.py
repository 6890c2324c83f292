"""Key pairs as openssl writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec


class Pair(NamedTuple):
    """The files of a key pair."""

    private: Path
    public: Path


def pair(folder: Path, name: str = "key", key: Any = None, word: bytes = b"") -> Pair:
    """Args:
    key: a private key; None for a new one on P-256.
    word: its passphrase.
    """
    made = key or ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    locked = form.BestAvailableEncryption(word) if word else form.NoEncryption()
    private.write_bytes(made.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, locked))
    public.write_bytes(made.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    return Pair(private, public)
