"""Names that follow aliases, on a portfolio without an engine: their targets after each change of an alias."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from signing_keys import write_key_pair
from synthetic_runs import write_run_folder

from align.core.aliases import parse_aliases
from align.models.base import find_base
from align.run.alias_log import AliasTarget, append_change, read_alias_log
from align.run.signing import load_private_key, load_public_key, sign_folder
from align.run.weights import adapter_digest
from align.serve import alias_watcher
from align.serve.adapter_folders import Version
from align.serve.alias_watcher import AliasWatcher
from align.serve.errors import UnknownModel
from align.serve.startup import open_portfolio
from align.serve.tenants import LOCAL

SERVED: dict[str, Any] = {
    "chat": "@production",
    "half": {"chat": 1, "base": 1},
    "mixed": {"@production": 3, "fixed": 1},
    "fixed": "sft:a",
}


class Engine:
    """An engine that only records the digests of its loaded adapters."""

    def __init__(self) -> None:
        self.there: set[str] = set()
        self.refuses: str | None = None

    def ready(self, version: Version) -> None:
        if version.digest == self.refuses:
            raise OSError("a disk is slow")
        assert version.digest not in self.there
        self.there.add(version.digest)

    def unload(self, version: Version) -> None:
        self.there.discard(version.digest)


class Home:
    """A root folder with runs of adapters and an alias, and the names that a server resolves there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.engine = Engine()
        for i, name in enumerate("abc"):
            self.adapter(name, seed=i)
        self.adapter("other", seed=7, method="qlora")
        self.adapter("judge", seed=8, scores=True)
        self.promote("a")
        self.begin(SERVED)

    def adapter(self, name: str, seed: int, method: str = "lora", scores: bool = False, **known: Any) -> None:
        config = {"stage": {"name": "sft"}, "data": {"name": "chitchat"}, "method": {"name": method}}
        folder = write_run_folder(self.root, f"sft:{name}", base=find_base("pocket"), config=config) / "artifact"
        shape = {"peft_type": "LORA", "r": 4, "modules_to_save": ["score"] if scores else None}
        (folder / "adapter_config.json").write_text(
            json.dumps({**shape, "task_type": "SEQ_CLS" if scores else "CAUSAL_LM"})
        )
        tensors = {"base_model.model.score.weight" if scores else "x.lora_A.weight": torch.full((2,), float(seed))}
        save_file(tensors, folder / "adapter_model.safetensors")
        known = {"hardware": {"dtype": "float32"}, **known}
        write_run_folder(
            self.root, f"sft:{name}", base=find_base("pocket"), config=config, digest=adapter_digest(folder), **known
        )
        (folder / "adapter_config.json").write_text(
            json.dumps({**shape, "task_type": "SEQ_CLS" if scores else "CAUSAL_LM"})
        )

    def digest(self, name: str) -> str:
        return adapter_digest(self.root / "sft" / name / "artifact")

    def promote(self, *names: str, alias: str = "production") -> None:
        last = read_alias_log(self.root).last(alias)
        arms = [AliasTarget(f"sft:{name}", self.digest(name), 1.0 + i) for i, name in enumerate(names)]
        append_change(self.root, alias, arms, who="ann", why="so", replaces=last.seq if last else 0)

    def begin(self, served: dict[str, Any], dtypes: Sequence[str] = (), **more: Any) -> None:
        resolved = open_portfolio(parse_aliases(served, "stage.adapters"), self.root, **more)
        self.portfolio = resolved.portfolio
        self.engine = Engine()
        for version in self.portfolio.versions().values():
            self.engine.ready(version)
        self.portfolio.on_new_version = self.engine.ready
        self.portfolio.on_unused_version = self.engine.unload
        self.names = AliasWatcher(self.root, resolved.following, self.portfolio, dtypes)

    def look(self) -> None:
        self.names.update()
        assert self.engine.there == {*self.portfolio.versions()}  # all adapters are loaded, and no others

    def means(self, name: str = "chat") -> list[tuple[str, float]]:
        names_by_digest = {
            self.digest(run_name): run_name
            for run_name in ("a", "b", "c", "other", "judge")
            if (self.root / "sft" / run_name).is_dir()
        }
        return [
            (names_by_digest.get(arm.version.digest, "gone") if arm.version else "base", arm.weight)
            for arm in self.portfolio.arms(name)
        ]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "runs")


def test_each_change_is_followed(home: Home) -> None:
    assert home.means() == [("a", 1.0)]
    for name in ("b", "c", "a", "b"):
        home.promote(name)
        home.look()
        assert home.means() == [(name, 1.0)]
        assert home.means("half") == [(name, 1.0), ("base", 1.0)]
        assert home.means("mixed") == [(name, 3.0), ("a", 1.0)]
        home.look()
        assert home.means() == [(name, 1.0)]


def test_what_was_promoted_while_the_server_started_is_followed(home: Home) -> None:
    resolved = open_portfolio(parse_aliases(SERVED, "stage.adapters"), home.root)
    home.promote("b")
    home.portfolio = resolved.portfolio
    home.portfolio.on_new_version = home.engine.ready
    home.portfolio.on_unused_version = home.engine.unload
    home.names = AliasWatcher(home.root, resolved.following, home.portfolio, [])
    home.look()
    assert home.means() == [("b", 1.0)]


def test_what_failed_is_tried_again(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The retry needs no further change of the log, and waits RETRY_S seconds."""
    monkeypatch.setattr(alias_watcher, "RETRY_S", 0.0)
    home.engine.refuses = home.digest("b")
    home.promote("b")
    for _ in range(3):
        home.look()
    assert home.means() == [("a", 1.0)]
    assert len([message for message in caplog.messages if message.startswith("chat stays with sft:a")]) == 1
    home.engine.refuses = None
    monkeypatch.setattr(alias_watcher, "RETRY_S", 99.0)
    home.look()
    assert home.means() == [("b", 1.0)]


def test_a_run_that_comes_back(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alias_watcher, "RETRY_S", 0.0)
    home.promote("b")
    shutil.move(home.root / "sft" / "b", home.root / "away")
    home.look()
    assert home.means() == [("a", 1.0)]
    shutil.move(home.root / "away", home.root / "sft" / "b")
    home.look()
    assert home.means() == [("b", 1.0)]


def test_what_somebody_took_away_stays_away(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    home.begin({"chat": "@production", "fixed": "sft:a"})
    home.portfolio.unload("chat")
    home.promote("b")
    home.look()
    with pytest.raises(UnknownModel):
        home.portfolio.choose("chat", LOCAL, None)
    assert caplog.messages == []


def test_several_at_once_and_names_that_follow_the_name(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    """A name that is part of another name's mixture must have one target; other names may have several."""
    home.promote("b", "c")
    home.look()
    assert home.means() == [("a", 1.0)]
    assert any("would refer to 2 artifacts, but half refers to it" in message for message in caplog.messages)
    assert [name for name, _ in home.means("mixed")] == ["b", "c", "a"]
    home.begin({"chat": "@production"})
    home.promote("a", "b", "c")
    home.look()
    assert home.means() == [("a", 1 / 6), ("b", 2 / 6), ("c", 3 / 6)]


def test_half_of_several_that_cannot_be_read_changes_nothing(home: Home) -> None:
    home.begin({"chat": "@production"})
    home.engine.refuses = home.digest("c")
    home.promote("b", "c")
    home.look()
    assert home.means() == [("a", 1.0)]


@pytest.mark.parametrize(
    ("name", "says"),
    [("other", "was trained with method=qlora"), ("judge", "would refer to a reward model in place of a policy")],
)
def test_what_does_not_go_with_the_server(home: Home, caplog: pytest.LogCaptureFixture, name: str, says: str) -> None:
    home.promote(name)
    home.look()
    assert home.means() == [("a", 1.0)]
    assert any(says in message for message in caplog.messages)


def test_codes_of_another_dtype(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    """NF4 codes of a bf16 base differ from those of an fp32 base."""
    home.adapter("x", seed=3, method="qlora")
    home.adapter("y", seed=4, method="qlora", hardware={"dtype": "bfloat16"})
    home.promote("x", alias="quantised")
    home.begin({"chat": "@quantised"}, ["float32"])
    home.promote("y", alias="quantised")
    home.look()
    assert any("was trained on NF4 codes of a base in bfloat16" in message for message in caplog.messages)
    assert home.portfolio.arms("chat")[0].label == "sft:x"


def test_a_name_that_follows_another_keeps_nothing_of_it(home: Home) -> None:
    """The old weights are unloaded once the followed name has a new target."""
    home.begin({"lone": "sft:a", "mixed": {"lone": 1, "@production": 1}})
    home.promote("b")
    home.look()
    arms = home.portfolio.arms("lone")
    home.portfolio.replace_arms("lone", [arms[0].__class__("x", "x", None)])
    assert home.engine.there == {home.digest("b")}


def test_a_log_that_is_damaged_or_gone(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    log = home.root / "aliases.jsonl"
    text = log.read_text()
    log.write_text("{}\n")
    home.look()
    assert home.means() == [("a", 1.0)]
    assert any("is no record of an alias change" in message for message in caplog.messages)
    log.unlink()
    home.look()
    log.write_text(text)
    home.promote("b")
    home.look()
    assert home.means() == [("b", 1.0)]


def test_an_alias_that_means_what_nobody_signed(home: Home, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The name keeps its previous target, and the log gives the reason."""
    keys = write_key_pair(tmp_path)
    for name in "ab":
        sign_folder(home.root / "sft" / name / "artifact", load_private_key(str(keys.private), "export.sign"))
    home.begin({"chat": "@production"}, signer=load_public_key(str(keys.public), "export.verify"))
    home.promote("b")
    home.look()
    assert home.means() == [("b", 1.0)]
    home.promote("c")
    home.look()
    assert home.means() == [("b", 1.0)]
    assert "chat stays with sft:b" in caplog.text
    assert "has no signature" in caplog.text
    home.promote("a")
    (home.root / "sft" / "a" / "artifact" / "adapter_config.json").write_text("{}")
    home.look()
    assert len(home.means()) == 1
    assert "adapter_config.json is not the file that was signed" in caplog.text
