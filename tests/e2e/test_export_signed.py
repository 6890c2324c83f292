"""`stage=export export.sign=KEY`: what leaves is signed, what is checked has to be, and the key itself stays unseen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from signing_keys import Pair, pair
from workshop import SFT, Workshop

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
def keys(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def signed(shop: Workshop, keys: Pair) -> Path:
    return shop.run("export", "artifact=sft:a", f"export.sign={keys.private}")


def checked(shop: Workshop, folder: Path, key: Path) -> int:
    return shop.status(
        "stage=export", "artifact=sft:a", "export=check", f"export.path={folder}", f"export.verify={key}"
    )


def test_an_export_that_is_signed(shop: Workshop, signed: Path, keys: Pair, tmp_path: Path) -> None:
    """Its manifest has the fingerprint, by which the run is known wherever the key lies; no file has the key."""
    manifest, fingerprint = read_manifest(signed), file_digest(keys.public)
    assert (manifest.inputs["signer"].digest, manifest.metrics["signed_by"]) == (fingerprint, fingerprint)
    assert f"artifact/{SIGNATURE}" in manifest.outputs
    assert fingerprint[:12] in shop.told[signed]
    secret = keys.private.read_text().splitlines()[1]
    for path in shop.root.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    moved = shutil.copy(keys.private, tmp_path / "moved.pem")
    assert shop.run("export", "artifact=sft:a", f"export.sign={moved}") == signed
    assert "finished already" in shop.said
    assert shop.run("export", "artifact=sft:a") != signed  # unsigned, it is another export


def test_a_check_asks_for_the_signature(shop: Workshop, signed: Path, keys: Pair, tmp_path: Path) -> None:
    assert checked(shop, signed, keys.public) == 0, shop.said
    assert checked(shop, signed, pair(tmp_path, "other").public) == 2
    assert "is by another key" in shop.said
    copied = Path(shutil.copytree(signed / "artifact", tmp_path / "copied"))
    assert checked(shop, copied, keys.public) == 0, shop.said  # the base beside it as files now
    receipt = json.loads((copied / "receipt.json").read_text())
    receipt["rows"] = [row | {"verdict": "pass"} for row in receipt["rows"]]
    (copied / "receipt.json").write_text(json.dumps(receipt))
    assert checked(shop, copied, keys.public) == 2
    assert "receipt.json is not the file that was signed" in shop.said
    (copied / SIGNATURE).unlink()
    assert checked(shop, copied, keys.public) == 2
    assert f"has no signature ({SIGNATURE})" in shop.said


def test_each_kind_of_several_is_signed_by_itself(shop: Workshop, keys: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """As each travels by itself."""
    monkeypatch.setattr("align.export.preflight.KINDS", ("adapter", "merged"))  # gguf needs converters
    folder = shop.run("export", "artifact=sft:a", "export=all", f"export.sign={keys.private}")
    assert {path.parent.name for path in folder.rglob(SIGNATURE)} == {"adapter", "merged"}
    assert checked(shop, folder, keys.public) == 0, shop.said
    (folder / "artifact" / "merged" / "more").write_text("")
    assert checked(shop, folder, keys.public) == 2
    assert "more is not among the files that were signed" in shop.said


def test_a_key_that_is_none_costs_no_time(shop: Workshop, keys: Pair, tmp_path: Path) -> None:
    """It is refused before the run has a folder; and where a key has no use, that is said."""
    before = {path.name for path in (shop.root / "export").glob("*")}  # nothing, where this test comes first
    inside = shutil.copy(keys.private, shop.root / "key.pem")
    for words, says in (
        ((f"export.sign={keys.public}",), "is a public key"),
        ((f"export.sign={tmp_path}/none",), "export.sign"),
        ((f"export.sign={inside}",), "lies in the folder of the runs"),
        ((f"export.verify={keys.public}",), "is for export=check and stage=serve"),
        (("export=check", "export.path=x", f"export.sign={keys.private}"), "is not for export=check"),
    ):
        shop.refuses("stage=export", "artifact=sft:a", *words, says=says)
    Path(inside).unlink()
    assert {path.name for path in (shop.root / "export").glob("*")} == before


def test_what_is_served_and_promoted(shop: Workshop, signed: Path, keys: Pair) -> None:
    """A run whose export is signed may be promoted; a server takes the export itself, and nothing that is unsigned."""
    (shop.root / "gates").mkdir()
    shutil.copy(keys.public, shop.root / "gates" / "release.pub")
    gate = "alias: production\nconditions:\n  - {signature: release.pub}\n"
    (shop.root / "gates" / "production.yaml").write_text(gate)
    promote = ("stage=registry", "stage.action=promote", "stage.alias=production", "stage.why=test")
    assert shop.status(*promote, "artifact=sft:a") == 0, shop.said
    assert "is signed by" in shop.said
    serve = ("stage=serve", f"export.verify={keys.public}")
    shop.refuses(*serve, "stage.adapters={chat: '@production'}", says=f"has no signature ({SIGNATURE})")
    (signed / "artifact" / "added.json").write_text("{}")
    shop.refuses(*promote, f"artifact=export:{signed.name}", says="added.json is not among the files that were signed")
    (signed / "artifact" / "added.json").unlink()
    assert shop.status(*promote, f"artifact=export:{signed.name}") == 0, shop.said
