"""Forgetting rewrites manifests whose digests the alias log holds, and appends the new digests to the log."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import publish_run

from align.registry import forgetting
from align.registry.forgetting import make_receipt, update_manifest_digests
from align.registry.index import query_index
from align.run.alias_log import FILE as ALIASES
from align.run.alias_log import AliasTarget, Change, append_change, read_alias_log
from align.run.manifest import compute_manifest_digests, read_manifest

RECEIPT = make_receipt("annotator", "me", ("annotator", "ann", "p", "sqlite:///x"))


def promote(root: Path, alias: str = "production") -> Change:
    """Point an alias at the run `sft:one`, with the digests of its manifests in the log."""
    manifest = read_manifest(root / "sft" / "one")
    manifests = {"sft:one": compute_manifest_digests(root / "sft" / "one", manifest)}
    return append_change(
        root, alias, [AliasTarget("sft:one", manifest.digest, manifests=manifests)], who="ann", why="so", replaces=0
    )


def find_alteration(root: Path) -> str | None:
    return query_index(root, lambda index: (index.record("sft:one") or {})["replaced"])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of runs with a promoted run, one of whose files has changed since."""
    publish_run(tmp_path, "one")
    promote(tmp_path)
    promote(tmp_path, "staging")
    assert find_alteration(tmp_path) is None
    (tmp_path / "sft" / "one" / "config.yaml").write_text("a: forgotten\n")
    return tmp_path


def test_a_promoted_run_is_not_called_altered(root: Path) -> None:
    before = (root / "sft" / "one" / "manifest.json").read_bytes()
    lines = update_manifest_digests(root, "sft:one", ["config.yaml"], RECEIPT)
    assert lines == [
        "@production (change 3) holds the new manifest of sft:one",
        "@staging (change 4) holds the new manifest of sft:one",
    ]
    assert (root / "sft" / "one" / "manifest.json").read_bytes() != before
    assert find_alteration(root) is None
    log = read_alias_log(root)
    first = log.changes[0]
    last = log.last("production")
    assert last is not None
    assert (last.arms, last.who, last.replaces) == (first.arms, "me", first.seq)
    assert last.why == f"stage.action=forget rewrote files of sft:one (forgotten/{RECEIPT.name}.json)"
    assert update_manifest_digests(root, "sft:one", ["config.yaml"], RECEIPT) == []
    assert len(read_alias_log(root).changes) == 4


def test_a_run_that_was_altered_before_stays_so(root: Path) -> None:
    manifest = root / "sft" / "one" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"loss": 1.5', '"loss": 0.5'))
    assert find_alteration(root)
    assert update_manifest_digests(root, "sft:one", ["config.yaml"], RECEIPT) == []
    assert "manifest.json was different" in (find_alteration(root) or "")


def test_killed_between_the_log_and_the_manifest_it_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(forgetting, "replace_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            update_manifest_digests(root, "sft:one", ["config.yaml"], RECEIPT)
    assert find_alteration(root)  # until the command is run again
    assert update_manifest_digests(root, "sft:one", ["config.yaml"], RECEIPT) == []
    assert find_alteration(root) is None
    assert len(read_alias_log(root).changes) == 4


def test_a_log_that_cannot_be_read_stops_no_forgetting(root: Path) -> None:
    (root / ALIASES).write_text("damaged\n")
    (line,) = update_manifest_digests(root, "sft:one", ["config.yaml"], RECEIPT)
    assert line.startswith("no alias holds the new manifest of sft:one, which is shown as altered from now on (")
    assert "forgotten" in (root / "sft" / "one" / "config.yaml").read_text()
    assert read_manifest(root / "sft" / "one").outputs["config.yaml"]
