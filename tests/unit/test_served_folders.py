"""Folders that may be loaded at run time: below a root, links resolved, with safetensors of LoRA on the served base."""

from __future__ import annotations

import json
import os
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import BASE
from served_adapters import METHOD, publish_adapter_run, write_adapter_files, write_exported_adapter
from signing_keys import write_key_pair

from align.run import Base
from align.run.signing import load_private_key, load_public_key, sign_folder
from align.run.weights import adapter_digest
from align.serve.adapter_folders import NotLoadable, find_loadable_version, resolve_folder

OTHER = Base("org/other", "/models/other", None, "c" * 64)
PARTS = st.sampled_from(
    ["..", ".", "", "a", "out", "in", "deep", "root", "secret", "~", "...", "/", "a b", "\0", "\udc00"]
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with links out of it and within it, and a secret beside it."""
    top = tmp_path_factory.mktemp("place")
    write_exported_adapter(top / "root" / "a")
    write_exported_adapter(top / "root" / "deep" / "a")
    write_exported_adapter(top / "secret" / "a")
    write_exported_adapter(top / "root-too" / "a")
    os.symlink(top / "secret", top / "root" / "out")
    os.symlink(top / "root" / "deep", top / "root" / "in")
    os.symlink("loop", top / "root" / "loop")
    os.symlink(top / "root", top / "link")
    return top


def load_version(folder: str, *roots: Path, base: Base = BASE, method: str = METHOD):
    return find_loadable_version(folder, roots, base.digest, method)


@pytest.mark.parametrize("given", ["a", "./a", "deep/a", "in/a", "{}/root/a", "{}/link/a", "a/", "deep//a"])
def test_a_folder_under_a_root(place: Path, given: str) -> None:
    version = load_version(given.format(place), place / "root")
    assert version.folder.is_relative_to(place / "root")
    assert version.digest == adapter_digest(version.folder)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "..",
        "../secret/a",
        "deep/../a",
        "out/a",
        "{}/secret/a",
        "{}/root/../secret/a",
        "/",
        "/etc",
        "loop",
        "b",
        "{}/root-too/a",
        "a/adapter_config.json",
        "a\0",
        "~/a",
        "x" * 5000,
        "\udc00",
        "{}/root",
    ],
)
def test_no_other_folder(place: Path, given: str) -> None:
    with pytest.raises(NotLoadable) as caught:
        load_version(given.format(place), place / "root", place / "nowhere")
    if "{}" not in given:
        assert str(place) not in str(caught.value)


def test_without_roots_nothing_is_loaded(place: Path) -> None:
    with pytest.raises(NotLoadable):
        load_version(str(place / "root" / "a"))


@settings(max_examples=300)
@given(st.lists(PARTS, max_size=7), st.booleans())
def test_whatever_is_written_leads_out_of_no_root(place: Path, parts: list[str], absolute: bool) -> None:
    written_path = ("/" if absolute else "") + "/".join(parts)
    try:
        folder = resolve_folder(written_path, [place / "root"])
    except NotLoadable:
        return
    assert folder.resolve().is_relative_to((place / "root").resolve())
    assert folder.is_dir()


FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "chat_template.jinja",
    "base.json",
    "receipt.json",
)


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_read_through_a_link_out_of_the_root(tmp_path: Path, name: str) -> None:
    folder = write_exported_adapter(tmp_path / "root" / "a")
    outside = tmp_path / name
    outside.write_bytes((folder / name).read_bytes() if (folder / name).is_file() else b"{}")
    (folder / name).unlink(missing_ok=True)
    os.symlink(outside, folder / name)
    with pytest.raises(NotLoadable, match="under the roots"):
        load_version("a", tmp_path / "root")
    assert load_version("root/a", tmp_path).folder == folder


def test_a_runs_artifact_that_is_a_link(tmp_path: Path) -> None:
    folder = publish_adapter_run(tmp_path / "runs", "x")
    os.rename(folder / "artifact", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / "artifact")
    with pytest.raises(NotLoadable, match="under the roots"):
        load_version("sft/x", tmp_path / "runs")


def test_runs_by_their_folder_or_artifact(tmp_path: Path) -> None:
    folder = publish_adapter_run(tmp_path, "x")
    assert (
        load_version("sft/x", tmp_path)
        == load_version("sft/x/artifact", tmp_path)
        == load_version(str(folder), tmp_path)
    )


def test_a_run_that_is_not_done_or_was_changed(tmp_path: Path) -> None:
    folder = publish_adapter_run(tmp_path, "x")
    write_adapter_files(folder / "artifact", 2.0)
    with pytest.raises(NotLoadable, match="not those that were published") as caught:
        load_version("sft/x", tmp_path)
    assert str(tmp_path) not in str(caught.value)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"status": "failed"}))
    with pytest.raises(NotLoadable, match="no finished run"):
        load_version("sft/x", tmp_path)


@pytest.mark.parametrize(
    "write",
    [write_exported_adapter, lambda folder: publish_adapter_run(folder.parent, folder.name)],
    ids=["exported", "published"],
)
def test_of_another_base_or_precision(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    write(tmp_path / "x")
    folder = "x" if (tmp_path / "x").is_dir() else "sft/x"
    load_version(folder, tmp_path)
    with pytest.raises(NotLoadable, match=f"trained on base {'b' * 12}, and the served base is {'c' * 12}"):
        load_version(folder, tmp_path, base=OTHER)
    with pytest.raises(NotLoadable, match="method=qlora"):
        load_version(folder, tmp_path, method="lora")


def test_the_precision_that_an_export_notes(tmp_path: Path) -> None:
    write_exported_adapter(tmp_path / "x", into="original")
    load_version("x", tmp_path, method="lora")
    with pytest.raises(NotLoadable, match="method=lora"):
        load_version("x", tmp_path, method="qlora")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("base.json", None),
        ("base.json", "{}"),
        ("base.json", '{"digest": 3}'),
        ("base.json", '{"digest": ""}'),
        ("receipt.json", None),
        ("receipt.json", "{}"),
        ("receipt.json", '{"into": null}'),
    ],
)
def test_what_does_not_say_its_base_is_for_the_command_line(tmp_path: Path, file: str, text: str | None) -> None:
    folder = write_exported_adapter(tmp_path / "x")
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(NotLoadable, match=r"does not say on which.*Start the server with it in stage\.adapters"):
        load_version("x", tmp_path)


@pytest.mark.parametrize("file", ["base.json", "receipt.json", "adapter_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{" * 100_000])
def test_files_that_are_no_json_object(tmp_path: Path, file: str, content: bytes) -> None:
    (write_exported_adapter(tmp_path / "x") / file).write_bytes(content)
    with pytest.raises(NotLoadable) as caught:
        load_version("x", tmp_path)
    assert str(tmp_path) not in str(caught.value)


def damage(folder: Path, how: str) -> None:
    weights = folder / "adapter_model.safetensors"
    match how:
        case "pickle beside":
            (folder / "adapter_model.bin").write_bytes(b"")
        case "pickle alone":
            os.rename(weights, folder / "adapter_model.bin")
        case "no weights":
            weights.unlink()
        case "no configuration":
            (folder / "adapter_config.json").unlink()
        case "whole model":
            os.rename(folder / "adapter_config.json", folder / "config.json")
        case "other kind":
            (folder / "adapter_config.json").write_text('{"peft_type": "LOHA"}')


@pytest.mark.parametrize(
    "how",
    ["pickle beside", "pickle alone", "no weights", "no configuration", "whole model", "other kind"],
)
def test_what_is_no_adapter_in_safetensors(tmp_path: Path, how: str) -> None:
    damage(write_exported_adapter(tmp_path / "x"), how)
    with pytest.raises(NotLoadable) as caught:
        load_version("x", tmp_path)
    assert str(tmp_path) not in str(caught.value)


@settings(max_examples=100)
@given(st.dictionaries(st.text(string.ascii_letters + "._-/", min_size=1, max_size=12), st.binary(max_size=20)))
def test_folders_with_anything_in_them(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    """Folders with arbitrary files are refused with NotLoadable."""
    folder = tmp_path_factory.mktemp("any") / "x"
    folder.mkdir()
    for name, content in files.items():
        if name.strip("./") and "/" not in name:
            (folder / name).write_bytes(content)
    with pytest.raises(NotLoadable):
        load_version("x", folder.parent)


def test_what_nobody_signed_is_not_loaded(tmp_path: Path) -> None:
    """The message names the file, and no path of the server."""
    keys = write_key_pair(tmp_path)
    folder = write_exported_adapter(tmp_path / "adapters" / "x")
    key = load_public_key(str(keys.public), "export.verify")
    roots = [tmp_path / "adapters"]
    with pytest.raises(NotLoadable, match="has no signature"):
        find_loadable_version("x", roots, BASE.digest, METHOD, key)
    sign_folder(folder, load_private_key(str(keys.private), "export.sign"))
    assert find_loadable_version("x", roots, BASE.digest, METHOD, key).folder == folder
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(NotLoadable, match=r"tokenizer\.json is not among the files that were signed") as error:
        find_loadable_version("x", roots, BASE.digest, METHOD, key)
    assert str(tmp_path) not in str(error.value)
