"""PPO with every weight of the policy trained: a second model beside the frozen base of the other roles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stage_commands import Ready
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from align.__main__ import main
from align.ppo import loop
from align.run import file_digest, read_manifest
from align.track import read_rows


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, ready: Ready, tiny_model: Path) -> Path:
    """Build a run of `full` and two reward models on it: one with method=lora, one on an NF4 base."""
    root = tmp_path_factory.mktemp("full") / "runs"
    store = f"store.url=sqlite:///{ready.root / 'annotations.db'}"
    sft = ["stage=full", "model=hub", f"model.path={tiny_model}", "stage.max_steps=2", "stage.eval_size=2"]
    reward = ["stage=reward", "data.allow_simulated=true", "stage.batch_size=8", "stage.held_out=0.3", store]
    for line in (
        [*sft, *ready.data, "run.name=f"],
        [*reward, "init=full:f", "method=lora", "run.name=lora"],
        [*reward, "init=full:f", "run.name=nf4"],
    ):
        assert main([*line, f"run.root={root}"]) == 0
    return root


@pytest.fixture
def command(ready: Ready) -> list[str]:
    replaced = ("init=", "reward.ref=")
    ppo_words = [w for w in ready.ppo if not w.startswith(replaced)]
    return [*ppo_words, "method=full", "init=full:f", "reward.ref=reward:lora", "stage.lr=1e-3", "stage.updates=3"]


def run_to_folder(words: list[str], root: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    assert main([*words, f"run.root={root}"]) == 0, capfd.readouterr().err
    return Path(capfd.readouterr().out.splitlines()[-1])


def test_an_adapter_learns_on_a_whole_model(
    root: Path, command: list[str], ready: Ready, capfd: pytest.CaptureFixture[str]
):
    words = [word for word in command if word != "method=full"]
    folder = run_to_folder([*words, "reward.ref=reward:nf4", "stage.updates=1", "run.name=adapter"], root, capfd)
    manifest = read_manifest(folder)
    assert manifest.inputs["init"].whole
    assert manifest.base is not None
    assert Path(manifest.base.path) == root / "full" / "f" / "artifact"
    assert (folder / "artifact" / "adapter_model.safetensors").is_file()
    words = ["stage=eval", "artifact=ppo:adapter", *ready.data, "stage.prompts=4", "rollout.max_new_tokens=12"]
    evaluated = run_to_folder(words, root, capfd)
    assert math.isfinite(read_manifest(evaluated).metrics["kl"])


@pytest.mark.parametrize("backbone", ["own", "frozen"])
def test_every_weight_of_the_policy_moves_and_nothing_else(
    root: Path, command: list[str], backbone: str, capfd: pytest.CaptureFixture[str]
):
    folder = run_to_folder([*command, f"stage.value_backbone={backbone}"], root, capfd)
    before, after = (load_file(f / "artifact" / "model.safetensors") for f in (root / "full" / "f", folder))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert (folder / "artifact" / "value" / "value_head.safetensors").is_file()
    assert (folder / "artifact" / "value" / "adapter_config.json").is_file() == (backbone == "own")
    rows = read_rows(folder / "metrics.jsonl")
    assert abs(rows[0]["first_ratio"] - 1) < 1e-5
    assert abs(rows[0]["kl"]) < 1e-4 < abs(rows[-1]["kl"])
    assert read_manifest(folder).metrics["quantised_layers"] == 0
    assert AutoModelForCausalLM.from_pretrained(folder / "artifact").num_parameters() > 0


def test_recomputed_layers_change_no_weight(
    root: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    forward = LlamaMLP.forward
    passes = list[int]()

    def count_forward(*args: Any) -> torch.Tensor:
        passes.append(1)
        return forward(*args)

    monkeypatch.setattr(LlamaMLP, "forward", count_forward)
    words = [*command, "dtype=bfloat16", "stage.updates=2"]
    stored = run_to_folder([*words, "stage.gradient_checkpointing=false"], root, capfd)
    passes_stored = len(passes)
    recomputed = run_to_folder([*words, "stage.gradient_checkpointing=true"], root, capfd)
    assert 0 < passes_stored < len(passes) - passes_stored
    name = "artifact/model.safetensors"
    assert stored != recomputed
    assert file_digest(stored / name) == file_digest(recomputed / name)


def test_killed_it_goes_on_to_the_bit(
    root: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    words = [*command, "stage.save_every=1", "stage.eval_every=1", "stage.eval_prompts=4"]
    uninterrupted = run_to_folder([*words, "run.name=whole"], root, capfd)
    calls = []
    real = loop.take_gradient_steps

    def interrupt_third_call(*args: Any, **kwargs: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_gradient_steps", interrupt_third_call)
        assert main([*words, "run.name=parts", f"run.root={root}"]) == 130
    resumed = run_to_folder([*words, "run.name=parts"], root, capfd)
    for name in ("artifact/model.safetensors", "artifact/value/adapter_model.safetensors", "metrics.jsonl"):
        assert file_digest(uninterrupted / name) == file_digest(resumed / name), name


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["init=sft:s"], "was trained with method=qlora"),
        (["reward.ref=reward:nf4"], "Write method=qlora, or train the reward model with stage=reward init=full:f"),
        (["method=qlora"], "Write method=lora (an adapter) or method=full (every weight), or train the reward model"),
    ],
)
def test_what_does_not_fit_is_refused(
    root: Path, ready: Ready, command: list[str], words: list[str], told: str, capfd: pytest.CaptureFixture[str]
):
    run_root = ready.root if words[0].startswith("init") else root
    assert main([*command, *words, f"run.root={run_root}"]) == 2
    assert told in capfd.readouterr().err


def test_a_bare_adapter_is_no_whole_model(
    root: Path, ready: Ready, command: list[str], tiny_model: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(ready.root / "sft" / "s" / "artifact", bare)
    words = [*command, f"init={bare}", "model=hub", f"model.path={tiny_model}", f"run.root={root}"]
    assert main(words) == 2
    assert "is an adapter" in capfd.readouterr().err
