"""Runs of `stage=ppo` with each kind of reward, and their measurements during training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_commands import Ready

from align.__main__ import main
from align.annotate.store import Store
from align.models.adapters import read_tensors
from align.ppo.monitor import rank_answers
from align.run import read_manifest
from align.track import read_rows

Run = Callable[..., Path]


@pytest.fixture
def ppo(ready: Ready, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs PPO with more words, and returns the run's folder."""

    def run(*words: str) -> Path:
        assert main([*ready.ppo, f"run.root={ready.root}", *words]) == 0, capfd.readouterr().err
        return Path(capfd.readouterr().out.splitlines()[-1])

    return run


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return read_rows(folder / "metrics.jsonl")


# The reward.


@pytest.fixture
def without_ref(ready: Ready) -> Ready:
    """The command line without `reward.ref`, which only a learned reward has."""
    return ready._replace(ppo=[w for w in ready.ppo if not w.startswith("reward.")])


@pytest.mark.parametrize("stage", [[], ["stage=sample", "stage.best_of=2"]], ids=["ppo", "sample"])
def test_a_reward_model_of_another_chat_template_is_refused(
    without_ref: Ready, stage: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    other_reward = shutil.copytree(without_ref.root / "reward" / "a" / "artifact", tmp_path / "other")
    template = other_reward / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    command = [*stage, *without_ref.data, "init=sft:s", "rollout.max_new_tokens=12"] if stage else without_ref.ppo
    assert main([*command, f"run.root={without_ref.root}", f"reward.ref={other_reward}"]) == 2
    assert f"reward.ref={other_reward}: was trained with a chat template that differs" in capfd.readouterr().err


def test_a_function_as_the_reward(
    without_ref: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    source = tmp_path / "my_reward.py"
    source.write_text("def longer(chats):\n    return [len(chat[-1]['content']) for chat in chats]\n")
    monkeypatch.syspath_prepend(tmp_path)
    command = [*without_ref.ppo, f"run.root={without_ref.root}", "reward=fn", "reward.fn=my_reward:longer"]
    assert main(command) == 0
    folder = Path(capfd.readouterr().out.splitlines()[-1])
    manifest = read_manifest(folder)
    assert manifest.inputs["reward.fn"].ref == "my_reward:longer"
    assert "reward" not in manifest.inputs  # no reward model was needed
    assert "my_reward:longer" in (folder / "report.html").read_text()
    source.write_text(source.read_text() + "# another version\n")
    assert main(command) == 0
    assert Path(capfd.readouterr().out.splitlines()[-1]) != folder  # the function is an input like any other


def test_an_ensemble_and_its_disagreement(without_ref: Ready, capfd: pytest.CaptureFixture[str]):
    refs = "reward.refs=['reward:a','reward:b']"
    command = [*without_ref.ppo, f"run.root={without_ref.root}", "reward=ensemble", refs, "reward.combine=min"]
    assert main([*command, "stage.tripwires.disagreement=0.001", "stage.tripwires.patience=1"]) == 0
    stdout = capfd.readouterr().out
    assert "the members of the ensemble disagree" in stdout
    folder = Path(stdout.splitlines()[-1])
    assert all(row["disagreement"] > 0 for row in read_metrics(folder))
    inputs = read_manifest(folder).inputs
    assert (inputs["reward"].name, inputs["reward.1"].name) == ("a", "b")


def test_without_any_reward_model_the_critic_starts_from_the_policy(
    without_ref: Ready, capfd: pytest.CaptureFixture[str]
):
    rules = "reward.rules=[{rule: regex, pattern: '[aeiou]'}, {rule: length, low: 2, high: 9}]"
    words = ["reward=rules", rules, "stage.value_backbone=own"]
    assert main([*without_ref.ppo, f"run.root={without_ref.root}", *words]) == 0
    critic = Path(capfd.readouterr().out.splitlines()[-1]) / "artifact" / "value"
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert {p.name for p in critic.iterdir()} == {"value_head.safetensors"} | adapter


def test_a_reward_that_tells_nothing_apart(without_ref: Ready, capfd: pytest.CaptureFixture[str]):
    command = [*without_ref.ppo, f"run.root={without_ref.root}", "reward=rules", "reward.rules=[{rule: json}]"]
    assert main([*command, "run.name=flat"]) == 2
    assert "the same score" in capfd.readouterr().err
    assert main([*command, "run.name=off", "stage.normalise=off"]) == 0


def test_a_bare_folder_is_a_reward_model_of_this_base(without_ref: Ready, tmp_path: Path):
    """A folder from a hub has no manifest, so its base is not recorded."""
    bare = shutil.copytree(without_ref.root / "reward" / "a" / "artifact", tmp_path / "bare")
    assert main([*without_ref.ppo, f"run.root={without_ref.root}", f"reward.ref={bare}"]) == 0


# Measurements during training.


def test_held_out_prompts_choose_what_is_published(ppo: Run):
    words = ["stage.updates=5", "stage.eval_every=2", "stage.eval_prompts=6", "stage.shown=3", "stage.lr=2e-2"]
    best = ppo(*words)
    last = ppo(*words, "stage.publish=last")
    assert read_metrics(best) == read_metrics(last)  # the published update does not change training
    start, *updates = read_metrics(best)
    assert all(abs(row["sampler_kl"]) < 1e-9 for row in updates)  # the policy that learns is the one that sampled
    assert start.keys() == {"step", "held_out_score", "held_out_kl", "held_out_objective"}
    assert (start["step"], start["held_out_kl"]) == (0, 0.0)  # the policy starts as the reference
    measured = {row["step"]: row["held_out_objective"] for row in updates if "held_out_objective" in row}
    assert list(measured) == [2, 4, 5]
    for folder, update in ((best, max(measured, key=lambda step: measured[step])), (last, 5)):
        metrics = read_manifest(folder).metrics
        assert (metrics["published_update"], metrics["updates"], metrics["held_out_prompts"]) == (update, 5, 6)
        objectives = start["held_out_objective"], measured[update]
        assert (metrics["objective_before"], metrics["objective_after"]) == objectives
        assert metrics["beats_start"] == (objectives[1] > objectives[0])
        assert metrics["last_score"] == (updates[3]["score"] + updates[4]["score"]) / 2  # no update is on both sides
    metrics = read_manifest(best).metrics
    equal_tensors = [
        torch.equal(a, b) for a, b in zip(*(read_tensors(r / "artifact").values() for r in (best, last)), strict=True)
    ]
    assert all(equal_tensors) == (metrics["published_update"] == 5)
    samples = read_rows(best / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [0, 0, 0, 2, 2, 2, 4, 4, 4, 5, 5, 5]
    for row, timing in zip(updates, read_rows(best / "timing.jsonl")[1:], strict=True):
        for phase in ("rollout", "score", "estimate", "update"):
            tokens = timing[f"{phase}_tok_s"] * timing[f"{phase}_s"]
            assert tokens == pytest.approx(8 * row["length"], rel=0.1)  # a clock of 0.1 ms, a rate of 0.1
    assert len({json.dumps(sample["prompt"]) for sample in samples}) == 3
    assert samples[0]["prompt"][-1]["role"] == "user"
    assert samples[0]["prompt"][-1]["content"] in (best / "report.html").read_text()


def test_the_best_update_is_published_not_the_last(
    ppo: Run, ready: Ready, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """The objective falls from the start on: update 1 is published, with a warning that it does not beat the start."""
    import align.ppo.loop as loop

    objectives = iter([2.0, 1.0, 0.0])
    evaluate = loop.evaluate_held_out

    def report_falling_objective(*arguments: Any, **settings: Any) -> Any:
        figures, samples = evaluate(*arguments, **settings)
        return {**figures, "held_out_objective": next(objectives)}, samples

    words = ["stage.eval_prompts=6", "stage.warmup=0", "stage.lr=1e-2"]
    monkeypatch.setattr(loop, "evaluate_held_out", report_falling_objective)
    assert main([*ready.ppo, f"run.root={ready.root}", *words, "stage.updates=2", "stage.eval_every=1"]) == 0
    *lines, last = capfd.readouterr().out.splitlines()
    best = Path(last)
    warning = "WARNING: no update that was measured beats the start on held-out prompts"
    assert lines[-2] == "update 1 is published: held-out objective 1.00 (start 2.00)"
    assert lines[-1].startswith(warning)
    assert read_manifest(best).metrics["beats_start"] is False
    assert (
        "No update that was measured beats the start on 6 held-out prompts: update 1 of 2"
        in (best / "report.html").read_text()
    )
    monkeypatch.setattr(loop, "evaluate_held_out", evaluate)
    single_update = ppo(*words, "stage.updates=1", "stage.eval_every=1")
    assert read_manifest(best).metrics["published_update"] == 1
    pairs = zip(*(read_tensors(r / "artifact").items() for r in (best, single_update)), strict=True)
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


def test_held_out_scores_are_on_one_scale_and_their_prompts_on_one_side(
    ppo: Run, ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Running moments would make a better policy look worse. A prompt that a file repeats is on one side only."""
    import align.ppo.loop as loop

    source = Path(next(w for w in ready.data if w.startswith("data.path=")).removeprefix("data.path="))
    doubled = tmp_path / "twice.jsonl"
    doubled.write_text(source.read_text() * 2)
    evaluate = loop.evaluate_held_out
    recorded_moments = []

    def record_moments(workers: Any, answers: Any, moments: Any, *args: Any, **kwargs: Any) -> Any:
        held_out = {p.conversation.messages for p in workers.held_out}
        assert not held_out & {p.conversation.messages for p in workers.prompts}
        recorded_moments.append(moments)
        return evaluate(workers, answers, moments, *args, **kwargs)

    monkeypatch.setattr(loop, "evaluate_held_out", record_moments)
    words = ["stage.updates=3", "stage.eval_every=1", "stage.eval_prompts=6", "stage.normalise=running"]
    ppo(*words, f"data.path={doubled}")
    assert len(recorded_moments) == 4  # the start and each update
    assert len(set(recorded_moments)) == 1


def test_what_is_measured_on_is_the_file_that_was_given_for_it(
    ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    import align.ppo.loop as loop

    questions = [f"What about {i}?" for i in range(9)]
    path = tmp_path / "measured.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions) + '{"prompt": 7}\n')
    evaluate = loop.evaluate_held_out
    prompts = []

    def record_prompts(workers: Any, answers: Any, *args: Any, **kwargs: Any) -> Any:
        prompts.append([p.conversation.messages[-1].content for p in answers.prompts])
        return evaluate(workers, answers, *args, **kwargs)

    monkeypatch.setattr(loop, "evaluate_held_out", record_prompts)
    command = [w for w in ready.ppo if not w.startswith("data.held_out=")]
    command += [f"run.root={ready.root}", f"data.eval_path={path}", "stage.eval_every=2", "data.on_bad_row=skip"]
    assert main([*command, "stage.eval_prompts=6"]) == 0
    stdout = capfd.readouterr().out
    assert "6 of data.eval_path to measure on" in stdout
    sampled = Path(stdout.splitlines()[-1])
    assert prompts[0] == prompts[1]  # at the start and after updates
    assert len(set(prompts[0])) == 6
    assert set(prompts[0]) < set(questions)
    assert "6 prompts to measure on" in (sampled / "report.html").read_text()
    assert main(command) == 0  # by default, all prompts
    complete = Path(capfd.readouterr().out.splitlines()[-1])
    assert set(prompts[-1]) == set(questions)
    metrics = read_manifest(complete).metrics
    assert (metrics["held_out_prompts"], metrics["skipped_rows"]) == (9, 1)  # the file is read once
    assert metrics["prompts"] == read_manifest(sampled).metrics["prompts"]  # no prompt is held out of training


def test_a_tripwire_stops_the_run_and_asks_a_person(ppo: Run, ready: Ready):
    words = ["stage.tripwires.entropy=100", "stage.tripwires.patience=2", "stage.tripwires.action=stop"]
    folder = ppo(*words, "stage.updates=6", "stage.tripwires.suspects=3", "project=suspects")
    assert len(read_metrics(folder)) == 2
    manifest = read_manifest(folder)
    assert manifest.metrics["tripped"] == ["entropy"]
    with Store.open(f"sqlite:///{ready.root / 'annotations.db'}", create_if_missing=False) as store:
        items = list(store.items("suspects"))
    assert len(items) == 3
    for item in items:
        assert [c.sampling["role"] for c in item.candidates] == ["policy", "reference"]
        assert [sorted(c.sampling) for c in item.candidates] == [
            ["role", "run", "score", "temperature", "wires"],
            ["role", "run", "score", "temperature"],
        ]
    tripped_wires = [item.candidates[0].sampling["wires"] for item in items]
    assert all(wires.keys() == {"entropy"} for wires in tripped_wires)
    assert tripped_wires == sorted(tripped_wires, key=lambda wires: wires["entropy"])  # the least first
    assert (folder / "artifact" / "adapter_model.safetensors").is_file()


def test_epochs_end_early_when_the_policy_has_moved_too_far(ppo: Run):
    words = ["stage.epochs=4", "stage.minibatches=2", "stage.lr=5e-2", "stage.warmup=0"]
    unlimited = ppo(*words)
    limited = ppo(*words, "stage.max_approx_kl=1e-4")
    assert {row["steps"] for row in read_metrics(unlimited)} == {8}
    assert all(1 <= row["steps"] < 8 for row in read_metrics(limited))


def test_a_sum_of_a_model_and_rules(without_ref: Ready, capfd: pytest.CaptureFixture[str]):
    parts = "{name: learned, ref: 'reward:a'}, {name: rules, weight: 0.5, rules: [{rule: length, low: 2, high: 5}]}"
    assert main([*without_ref.ppo, f"run.root={without_ref.root}", "reward=sum", f"reward.parts=[{parts}]"]) == 0
    assert read_metrics(Path(capfd.readouterr().out.splitlines()[-1]))[0]["score_std"] > 0


def test_what_is_handed_over_shows_what_tripped(without_ref: Ready, capfd: pytest.CaptureFixture[str]):
    """All prompts of the batch differ, so all are handed over. A wire's metric is the mean over the items."""
    refs = ["reward=ensemble", "reward.refs=['reward:a','reward:b']", "stage.tripwires.disagreement=1e-6"]
    ends = ["stage.tripwires.patience=1", "stage.tripwires.action=stop", "stage.tripwires.kl=-9", "project=disputed"]
    assert main([*without_ref.ppo, f"run.root={without_ref.root}", *refs, *ends, "stage.tripwires.entropy=null"]) == 0
    (row,) = read_metrics(Path(capfd.readouterr().out.splitlines()[-1]))
    with Store.open(f"sqlite:///{without_ref.root / 'annotations.db'}", create_if_missing=False) as store:
        samplings = [item.candidates[0].sampling for item in store.items("disputed")]
    assert len(samplings) == 8
    values_by_wire = {wire: [sampling["wires"][wire] for sampling in samplings] for wire in samplings[0]["wires"]}
    assert {wire: sum(values) / 8 for wire, values in values_by_wire.items()} == {
        wire: pytest.approx(row[wire], rel=1e-4, abs=1e-6) for wire in ("disagreement", "kl")
    }
    assert rank_answers(values_by_wire, [sampling["score"] for sampling in samplings]) == list(range(8))
    assert sum(sampling["score"] for sampling in samplings) / 8 == pytest.approx(row["raw_score"], rel=1e-4)


def test_a_tripwire_warns_once(ppo: Run, ready: Ready, capfd: pytest.CaptureFixture[str]):
    wires = ["stage.tripwires.entropy=100", "stage.tripwires.patience=2"]
    assert main([*ready.ppo, f"run.root={ready.root}", *wires, "stage.updates=4"]) == 0
    warnings = [line for line in capfd.readouterr().out.splitlines() if "entropy" in line and "below 100" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("update 2:")
