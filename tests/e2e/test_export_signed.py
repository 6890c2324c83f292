"""`stage=export export.sign=KEY`: exports are signed, checks require the signature, and no file has the private key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from signing_keys import KeyPair, write_key_pair
from stage_commands import SFT, Workshop

from align.run import file_digest, read_manifest
from align.run.signing import SIGNATURE

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, chats: Path, tiny_model: Path) -> Workshop:
    folder = tmp_path_factory.mktemp("signed")
    shop = Workshop(folder / "runs", Path(shutil.copy(chats, folder / "chats.jsonl")))
    model = Path(shutil.copytree(tiny_model, folder / "model"))
    shop.run("sft", "model=hub", f"model.path={model}", *SFT[:1], "stage.max_steps=4", "stage.lr=0.01", "run.name=a")
    return shop


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return write_key_pair(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def signed(shop: Workshop, keys: KeyPair) -> Path:
    return shop.run("export", "artifact=sft:a", f"export.sign={keys.private}")


def run_check(shop: Workshop, folder: Path, key: Path) -> int:
    return shop.status(
        "stage=export", "artifact=sft:a", "export=check", f"export.path={folder}", f"export.verify={key}"
    )


def test_an_export_that_is_signed(shop: Workshop, signed: Path, keys: KeyPair, tmp_path: Path) -> None:
    """The manifest has the fingerprint, which identifies the run wherever the key lies. No file has the key."""
    manifest = read_manifest(signed)
    fingerprint = file_digest(keys.public)
    assert (manifest.inputs["signer"].digest, manifest.metrics["signed_by"]) == (fingerprint, fingerprint)
    assert f"artifact/{SIGNATURE}" in manifest.outputs
    assert fingerprint[:12] in shop.outputs[signed]
    secret = keys.private.read_text().splitlines()[1]
    for path in shop.root.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    moved = shutil.copy(keys.private, tmp_path / "moved.pem")
    assert shop.run("export", "artifact=sft:a", f"export.sign={moved}") == signed
    assert "finished already" in shop.output
    assert shop.run("export", "artifact=sft:a") != signed  # unsigned, it is another export


def test_a_check_asks_for_the_signature(shop: Workshop, signed: Path, keys: KeyPair, tmp_path: Path) -> None:
    assert run_check(shop, signed, keys.public) == 0, shop.output
    assert run_check(shop, signed, write_key_pair(tmp_path, "other").public) == 2
    assert "is by another key" in shop.output
    copy = Path(shutil.copytree(signed / "artifact", tmp_path / "copied"))
    assert run_check(shop, copy, keys.public) == 0, shop.output  # the base beside it as files now
    receipt = json.loads((copy / "receipt.json").read_text())
    receipt["rows"] = [row | {"verdict": "pass"} for row in receipt["rows"]]
    (copy / "receipt.json").write_text(json.dumps(receipt))
    assert run_check(shop, copy, keys.public) == 2
    assert "receipt.json is not the file that was signed" in shop.output
    (copy / SIGNATURE).unlink()
    assert run_check(shop, copy, keys.public) == 2
    assert f"has no signature ({SIGNATURE})" in shop.output


def test_each_kind_of_several_is_signed_by_itself(
    shop: Workshop, keys: KeyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind can be published by itself."""
    monkeypatch.setattr("align.export.preflight.KINDS", ("adapter", "merged"))  # gguf needs converters
    folder = shop.run("export", "artifact=sft:a", "export=all", f"export.sign={keys.private}")
    assert {path.parent.name for path in folder.rglob(SIGNATURE)} == {"adapter", "merged"}
    assert run_check(shop, folder, keys.public) == 0, shop.output
    (folder / "artifact" / "merged" / "more").write_text("")
    assert run_check(shop, folder, keys.public) == 2
    assert "more is not among the files that were signed" in shop.output


def test_a_key_that_is_none_costs_no_time(shop: Workshop, keys: KeyPair, tmp_path: Path) -> None:
    """A bad key, and a key without a use, is refused before the run has a folder."""
    before = {path.name for path in (shop.root / "export").glob("*")}  # empty if this test runs first
    inside = shutil.copy(keys.private, shop.root / "key.pem")
    for arguments, says in (
        ((f"export.sign={keys.public}",), "is a public key"),
        ((f"export.sign={tmp_path}/none",), "export.sign"),
        ((f"export.sign={inside}",), "lies in the folder of the runs"),
        ((f"export.verify={keys.public}",), "is for export=check and stage=serve"),
        (("export=check", "export.path=x", f"export.sign={keys.private}"), "is not for export=check"),
    ):
        shop.refuses("stage=export", "artifact=sft:a", *arguments, says=says)
    Path(inside).unlink()
    assert {path.name for path in (shop.root / "export").glob("*")} == before


def test_what_is_served_and_promoted(shop: Workshop, signed: Path, keys: KeyPair) -> None:
    """A run with a signed export may be promoted. A server loads signed exports and refuses others."""
    (shop.root / "gates").mkdir()
    shutil.copy(keys.public, shop.root / "gates" / "release.pub")
    gate = "alias: production\nconditions:\n  - {signature: release.pub}\n"
    (shop.root / "gates" / "production.yaml").write_text(gate)
    promote = ("stage=registry", "stage.action=promote", "stage.alias=production", "stage.why=test")
    assert shop.status(*promote, "artifact=sft:a") == 0, shop.output
    assert "is signed by" in shop.output
    serve = ("stage=serve", f"export.verify={keys.public}")
    shop.refuses(*serve, "stage.adapters={chat: '@production'}", says=f"has no signature ({SIGNATURE})")
    (signed / "artifact" / "added.json").write_text("{}")
    shop.refuses(*promote, f"artifact=export:{signed.name}", says="added.json is not among the files that were signed")
    (signed / "artifact" / "added.json").unlink()
    assert shop.status(*promote, f"artifact=export:{signed.name}") == 0, shop.output
