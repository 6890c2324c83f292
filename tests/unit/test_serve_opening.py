"""Names of a server's command line: they resolve to adapters, all on one base in one precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from served_adapters import publish_adapter_run, write_adapter_files, write_exported_adapter
from signing_keys import write_key_pair

from align.core.aliases import parse_aliases
from align.core.errors import InputError, MissingArtifact
from align.models.base import find_base
from align.run.signing import NotSigned, load_private_key, load_public_key, sign_folder
from align.serve.adapter_folders import NotLoadable
from align.serve.startup import ResolvedNames, open_portfolio
from align.serve.tenants import Tenant

POCKET = find_base()
TENANT = Tenant("t")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Runs on two bases and in two precisions, the newest of ppo on the other base."""
    root = tmp_path_factory.mktemp("served") / "runs"
    tiny = find_base(str(tiny_model))
    publish_adapter_run(root, "a", POCKET, value=1)
    publish_adapter_run(root, "b", POCKET, value=2)
    publish_adapter_run(root, "plain", POCKET, "lora", value=3)
    publish_adapter_run(root, "p", POCKET, value=4, stage="ppo")
    publish_adapter_run(root, "tiny", tiny, value=5, stage="ppo")
    write_exported_adapter(root.parent / "export", POCKET.digest)
    write_exported_adapter(root.parent / "export-of-other", tiny.digest)
    write_exported_adapter(root.parent / "export-of-pocket", POCKET.digest, id="pocket")
    write_exported_adapter(root.parent / "export-of-another-pocket", tiny.digest, id="pocket")
    write_adapter_files(root.parent / "stranger")
    return root


def resolve_names(root: Path, adapters: Any, **more: Any) -> ResolvedNames:
    return open_portfolio(parse_aliases(adapters, "stage.adapters"), root, **more)


def list_labels(resolved: ResolvedNames) -> dict[str, list[str]]:
    return {name: [arm.label for arm in arms] for name, arms in resolved.portfolio.names(TENANT).items()}


def test_names_and_what_they_are_divided_into(root: Path) -> None:
    adapters = {"support": "sft:a", "chat": {"support": 3, "sft:b": 1, "base": 1}, "plain": "base", "also": "support"}
    resolved = resolve_names(root, adapters)
    assert list_labels(resolved) == {
        "pocket": ["base"],
        "support": ["sft:a"],
        "chat": ["support", "sft:b", "base"],
        "plain": ["base"],
        "also": ["support"],
    }
    portfolio = resolved.portfolio
    assert (portfolio.base, portfolio.method, set(resolved.artifacts)) == (POCKET, "qlora", {"sft:a", "sft:b"})
    first = portfolio.choose("support", TENANT, None).version
    assert first is not None
    assert first.folder == (root / "sft" / "a" / "artifact").absolute()
    assert portfolio.choose("also", TENANT, None).version == first
    assert portfolio.choose("plain", TENANT, None).version is None
    assert {portfolio.choose("chat", TENANT, str(u)).arm for u in range(60)} == {"support", "sft:b", "base"}


def test_latest_is_the_newest_on_the_base_of_the_others(root: Path) -> None:
    resolved = resolve_names(root, {"new": "ppo:latest", "old": "sft:a"})
    assert list_labels(resolved)["new"] == ["ppo:p"]
    assert list_labels(resolve_names(root, {"new": "ppo:latest"}, path="pocket"))["new"] == ["ppo:p"]
    assert list_labels(resolve_names(root, {"new": "ppo:latest"}))["new"] == ["ppo:tiny"]


def test_without_adapters_the_base_as_it_is(root: Path) -> None:
    resolved = resolve_names(root, None)
    assert (resolved.portfolio.base, resolved.portfolio.method, list_labels(resolved)) == (
        POCKET,
        "lora",
        {"pocket": ["base"]},
    )
    assert resolve_names(root, None, method="qlora").portfolio.method == "qlora"
    assert resolve_names(root, {"plain": "base"}).portfolio.method == "lora"


def test_a_path_is_told_to_nobody(root: Path) -> None:
    resolved = resolve_names(root, {"chat": {str(root.parent / "export"): 1, "sft:a": 1}})
    assert list_labels(resolved)["chat"] == ["export", "sft:a"]


def test_an_export_alone_names_its_base(root: Path) -> None:
    resolved = resolve_names(root.parent / "nothing", {"support": str(root.parent / "export-of-pocket")})
    assert (resolved.portfolio.base, resolved.portfolio.method) == (POCKET, "qlora")
    assert resolved.portfolio.choose("support", TENANT, None).version is not None


def test_whoever_starts_the_server_vouches_for_what_says_nothing(root: Path) -> None:
    stranger = str(root.parent / "stranger")
    resolved = resolve_names(root, {"theirs": stranger}, path="pocket", method="lora")
    assert resolved.portfolio.choose("theirs", TENANT, None).version is not None
    assert resolve_names(root, {"theirs": stranger, "ours": "sft:a"}).portfolio.method == "qlora"


@pytest.mark.parametrize(
    ("adapters", "more", "field", "says"),
    [
        ({"a": "sft:a", "t": "ppo:tiny"}, {}, "stage.adapters.t", "trained on another base"),
        ({"t": "ppo:tiny"}, {"path": "pocket"}, "stage.adapters.t", "drop model="),
        ({"a": "sft:a", "p": "sft:plain"}, {}, "stage.adapters.p", "method=lora, and sft:a with method=qlora"),
        ({"a": "sft:a"}, {"method": "lora"}, "stage.adapters.a", "method=qlora, and method=lora was asked"),
        ({"a": "sft:a"}, {"method": "full"}, "method", "adapters have"),
        ({"a": "sft:nothing"}, {}, "stage.adapters.a", "no such run"),
        ({"a": "nowhere"}, {}, "stage.adapters.a", "neither a folder nor a reference"),
        ({"a": "{}/stranger"}, {}, "stage.adapters.a", "does not say which base"),
        ({"a": "{}/stranger"}, {"path": "pocket"}, "method", "it is not recorded how"),
        ({"a": "{}/export-of-other"}, {"path": "pocket"}, "stage.adapters.a", "trained on another base"),
        ({"a": "{}/export"}, {}, "stage.adapters.a", "trained on tiny, which is on no hub. Add model=hub"),
        ({"a": "{}/export-of-another-pocket"}, {}, "stage.adapters.a", "trained on another base"),
        ({"a": "{}/export", "b": "a", "c": "b"}, {}, "stage.adapters.c", "b refers to other names itself"),
        ({"a": "b", "b": "a"}, {}, "stage.adapters.a", "b refers to other names itself"),
        ({"m": "{}/model"}, {}, "stage.adapters.m", "is a whole model"),
        ({"pocket": "sft:a"}, {}, "stage.adapters", "name of the base"),
    ],
)
def test_what_does_not_go_together(
    root: Path, tiny_model: Path, adapters: dict[str, str], more: dict[str, str], field: str, says: str
) -> None:
    paths = {"{}/model": str(tiny_model)}
    adapters = {name: paths.get(ref, ref.format(root.parent)) for name, ref in adapters.items()}
    with pytest.raises(InputError) as caught:
        resolve_names(root, adapters, **more)
    assert caught.value.field == field
    assert says in str(caught.value)


def test_a_missing_run_names_the_command_that_makes_it(root: Path) -> None:
    with pytest.raises(MissingArtifact, match="python -m align stage=dpo"):
        resolve_names(root, {"a": "dpo:latest"})


def test_each_adapter_has_to_be_signed(root: Path, tmp_path: Path) -> None:
    """Signatures are checked by the configured key. The base has to be signed if it is served by itself."""
    keys = write_key_pair(tmp_path)
    other_keys = write_key_pair(tmp_path, "other")
    signed = write_exported_adapter(tmp_path / "signed", POCKET.digest, id="pocket")
    sign_folder(signed, load_private_key(str(keys.private), "export.sign"))
    key = load_public_key(str(keys.public), "export.verify")
    write_exported_adapter(tmp_path / "unsigned", POCKET.digest, id="pocket")
    resolved = resolve_names(root, {"support": str(signed), "plain": "base"}, signer=key, roots=[tmp_path])
    resolved.portfolio.load("more", "signed")
    with pytest.raises(NotLoadable, match="has no signature"):
        resolved.portfolio.load("other", "unsigned")
    for adapters, signer, message in (
        ({"a": str(signed), "b": "sft:a"}, key, "stage.adapters.b=sft:a: has no signature"),
        ({"a": str(signed)}, load_public_key(str(other_keys.public), "export.verify"), "stage.adapters.a"),
        ({"plain": "base"}, key, "model=pocket: has no signature"),
        ({}, key, "model=pocket: has no signature"),
    ):
        with pytest.raises(NotSigned) as error:
            resolve_names(root, adapters, signer=signer)
        assert message in str(error.value)
    write_adapter_files(signed, value=9)
    with pytest.raises(NotSigned, match=r"adapter_model.safetensors is not the file that was signed"):
        resolve_names(root, {"support": str(signed)}, signer=key)
