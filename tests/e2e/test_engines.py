"""Stages sample with an engine that has weights of its own, which `sync` alone updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_commands import Ready

from align.__main__ import main
from align.core.types import Rollout
from align.models.actors import Actor, AdapterPool, ModelActor, save_snapshot
from align.models.load import load_base
from align.rollout import registry
from align.rollout.hf import HfEngine
from align.run import Base, model_digest
from align.track import read_rows

STATE = "stage.eval_every=2", "stage.eval_prompts=4", "stage.updates=3"


@dataclass
class SnapshotEngine:
    """An engine that answers from a second copy of the base and from snapshots on disk, as a server would.

    Attributes:
        calls: the called methods, in order.
        spoke: the digest of the weights of each answer; None is the base.
    """

    engine: HfEngine
    folder: Path
    calls: list[str] = field(default_factory=list)
    spoke: list[str | None] = field(default_factory=list)
    pool: Any = None
    base: Any = None

    @property
    def temperature(self) -> float:
        return self.engine.temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        self.engine.temperature = temperature

    def load(self, base: Base, method: str, dtype: torch.dtype) -> None:
        self.calls.append("load")
        self.base = base
        self.dtype = dtype
        self.pool = AdapterPool(load_base(base, method, torch.device("cpu"), dtype))
        self.digests: dict[Actor, str | None] = {}
        self.wholes: dict[str, Actor] = {}

    def sync(self, actor: Actor) -> None:
        self.calls.append("sync")
        previous = self.digests.get(actor)
        digest = None
        if not actor.is_bare_base:
            folder = save_snapshot(actor, self.base, self.folder)
            digest = folder.name
            if (folder / "config.json").is_file():
                full_base = replace(self.base, path=str(folder), digest=model_digest(folder))
                self.wholes[digest] = ModelActor(load_base(full_base, "lora", torch.device("cpu"), self.dtype))
            else:
                assert self.pool.add(folder) == digest
        self.digests[actor] = digest
        if previous not in (None, *self.digests.values(), *self.wholes):
            self.pool.remove(previous)

    def generate(
        self, prompts: Sequence[Sequence[int]], actor: Actor | Sequence[Actor], seeds: Sequence[int]
    ) -> Rollout:
        self.calls.append("generate")
        actors = actor if isinstance(actor, Sequence) else [actor] * len(prompts)
        digests = [self.digests[row_actor] for row_actor in actors]
        self.spoke += dict.fromkeys(digests)
        actor_by_digest = {
            digest: self.wholes[digest] if digest in self.wholes else self.pool.actor(digest) for digest in digests
        }
        assert len(getattr(self.pool.model, "peft_config", ())) <= 2  # the policy's newest and the reference's
        return self.engine.generate(prompts, [actor_by_digest[digest] for digest in digests], seeds)

    def close(self) -> None:
        self.calls.append("close")
        self.pool = None


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[SnapshotEngine]:
    """Engines that were built for stages, in order."""
    built: list[SnapshotEngine] = []
    build_engine: Any = registry.build_engine

    def build_snapshot_engine(*arguments: Any) -> SnapshotEngine:
        built.append(SnapshotEngine(build_engine(*arguments), tmp_path / "snapshots"))
        return built[-1]

    monkeypatch.setattr(registry, "build_engine", build_snapshot_engine)
    return built


def build_full_command(ready: Ready, model: Path) -> list[str]:
    """Return a PPO command that trains every weight, from the base and against a rule."""
    rule = "reward.rules=[{rule: regex, pattern: '[aeiou]'}, {rule: length, low: 2, high: 9}]"
    arguments = [word for word in ready.ppo if not word.startswith(("reward.", "init="))]
    return [*arguments, "init=base", "model=hub", f"model.path={model}", "method=full", "reward=rules", rule]


def read_last_folder(capfd: pytest.CaptureFixture[str]) -> Path:
    return Path(capfd.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("init", ["sft", "full"])
def test_ppo_learns_the_same_to_the_bit_by_an_engine_with_weights_of_its_own(
    ready: Ready,
    engines: list[SnapshotEngine],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tiny_model: Path,
    init: str,
):
    arguments = {
        "sft": ready.ppo,
        "full": build_full_command(ready, tiny_model),
    }[init]
    arguments = [*arguments, f"run.root={ready.root}", *STATE]
    assert main([*arguments, f"run.name=by-an-engine-from-{init}"]) == 0, capfd.readouterr().err
    engine_folder = read_last_folder(capfd)
    (engine,) = engines
    assert engine.calls[0] == "load"
    assert engine.calls[1:-1] == ["sync", "generate"] * ((len(engine.calls) - 2) // 2)
    assert engine.calls[-1] == "close"
    # The reference's samples, the start on the held-out prompts, then three updates, with these prompts after the
    # second and the third.
    assert len(engine.spoke) == 1 + 1 + 3 + 2
    reference, start, first, second, measured, third, last = engine.spoke
    assert start == first
    assert (reference is None) == (init != "sft")
    if init != "sft":
        assert first is not None
    else:
        assert first == reference
    assert len({first, second, third, last}) == 4
    assert measured == third

    monkeypatch.undo()
    assert main([*arguments, f"run.name=by-the-model-from-{init}"]) == 0, capfd.readouterr().err
    assert read_rows(engine_folder / "metrics.jsonl") == read_rows(read_last_folder(capfd) / "metrics.jsonl")


def test_an_engine_that_misses_an_update_is_seen(
    ready: Ready, engines: list[SnapshotEngine], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """A stale engine shows in the KL between sampler and learner, which is otherwise rounding error."""
    sync = SnapshotEngine.sync
    monkeypatch.setattr(SnapshotEngine, "sync", lambda self, actor: actor in self.digests or sync(self, actor))
    assert main([*ready.ppo, f"run.root={ready.root}", *STATE, "stage.lr=0.01", "run.name=stale"]) == 0
    _, *updates = read_rows(read_last_folder(capfd) / "metrics.jsonl")  # after the start's measurement
    first, *later = (row["sampler_kl"] for row in updates)
    assert abs(first) < 1e-5
    assert all(abs(kl) > 1e-3 for kl in later)


def test_an_engine_is_closed_whatever_happens(
    ready: Ready, engines: list[SnapshotEngine], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def raise_error(self: Any, *arguments: Any) -> None:
        self.calls.append("generate")
        raise RuntimeError("the server is gone")

    monkeypatch.setattr(SnapshotEngine, "generate", raise_error)
    assert main([*ready.ppo, f"run.root={ready.root}", "run.name=fails"]) == 1
    assert "the server is gone" in capfd.readouterr().err
    assert engines[0].calls == ["load", "sync", "generate", "close"]


@pytest.mark.parametrize("stage", ["sample", "eval of a whole model"])
def test_sample_and_eval_ask_an_engine_the_same_way(
    ready: Ready,
    engines: list[SnapshotEngine],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tiny_model: Path,
    stage: str,
):
    ppo = build_full_command(ready, tiny_model) if "whole" in stage else ready.ppo
    name = "whole" if "whole" in stage else "adapter"
    assert main([*ppo, f"run.root={ready.root}", f"run.name={name}"]) == 0, capfd.readouterr().err
    engines.clear()
    settings = ["stage.prompts=4", "stage.candidates=2", "project=engines"]
    if stage != "sample":
        settings = [f"artifact=ppo:{name}", "stage.prompts=6"]
    arguments = [f"stage={stage.split()[0]}", *settings, f"run.root={ready.root}"]
    arguments += ["rollout.max_new_tokens=8", "device=cpu", *ready.data]
    assert main([*arguments, f"run.name={name}-by-an-engine"]) == 0, capfd.readouterr().err
    engine_folder = read_last_folder(capfd)
    assert all((engine.calls[0], engine.calls[-1]) == ("load", "close") for engine in engines)
    # One engine for each base; a whole model is a base of its own.
    spoke = [engine.spoke for engine in engines]
    assert [len(set(digests)) for digests in spoke] == ([1] if stage == "sample" else [1, 1])
    assert [None in digests for digests in spoke] == ([False] if stage == "sample" else [True, True])
    monkeypatch.undo()
    (ready.root / "answers.db").unlink(missing_ok=True)  # so that the answers are made again
    assert main([*arguments, f"run.name={name}-by-the-model"]) == 0, capfd.readouterr().err
    file = "metrics.jsonl" if stage == "sample" else "artifact/samples.jsonl"
    assert (engine_folder / file).read_text() == (read_last_folder(capfd) / file).read_text()
