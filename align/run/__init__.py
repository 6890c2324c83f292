"""A run's folder: identity, lock, manifest, atomic publication, and references to what earlier runs published.

A run's identity is the part of its configuration that its stage reads, and the digest of every input. The same identity
lands in the same folder: unfinished, it is continued; finished, it is returned. The folder's own file descriptor is the
lock, so no lock file is left behind.
"""

from align.run.artifacts import WEIGHTS, Artifact, artifact_in, resolve, verify_outputs
from align.run.digests import file_digest, files_digest, folder_digest, json_digest, known_digest
from align.run.files import (
    json_object,
    out_of_memory,
    read_json,
    storage_error,
    write_json,
    write_text,
)
from align.run.folder import Run
from align.run.hub import HUB, hub_config, hub_files, hub_snapshot
from align.run.manifest import Base, Input, Manifest, read_manifest
from align.run.weights import linked_folder, model_config, model_digest, model_files, unhashed

__all__ = [
    "HUB",
    "WEIGHTS",
    "Artifact",
    "Base",
    "Input",
    "Manifest",
    "Run",
    "artifact_in",
    "file_digest",
    "files_digest",
    "folder_digest",
    "hub_config",
    "hub_files",
    "hub_snapshot",
    "json_digest",
    "json_object",
    "known_digest",
    "linked_folder",
    "model_config",
    "model_digest",
    "model_files",
    "out_of_memory",
    "read_json",
    "read_manifest",
    "resolve",
    "storage_error",
    "unhashed",
    "verify_outputs",
    "write_json",
    "write_text",
]
