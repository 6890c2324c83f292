"""Nothing that is not finite is published: each stage meets it in every place that it reads, and in its own training.

Always status 2 with one message that names the place, and no run that says `done`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from workshop import Ready

from align.__main__ import main
from align.core.errors import MissingArtifact
from align.models.base import find_base
from align.run import file_digest, read_manifest, resolve
from align.run.checkpoints import SEAL, seal
from align.track import Tracker

NAN, INF = float("nan"), float("inf")
WEIGHTS = {"base": "model.safetensors", "adapter": "adapter_model.safetensors"}


class Place(NamedTuple):
    """A folder with runs on a base of its own, all of which may be spoilt."""

    root: Path
    base: Path
    data: list[str]


@pytest.fixture
def place(ready: Ready, tiny_model: Path, tmp_path: Path) -> Place:
    """The runs up to a reward model; their base, too, is a copy."""
    root = Path(shutil.copytree(ready.root, tmp_path / "runs"))
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    for path in root.glob("*/*/manifest.json"):
        path.write_text(path.read_text().replace(str(tiny_model), str(base)).replace(str(ready.root), str(root)))
    return Place(root, base, ready.data)


def plant(path: Path, value: float, name: str = "layers.1.mlp.up_proj") -> str:
    """Spoil two values of one tensor, whose name is returned; and keep what hashes it in agreement, for what is asked
    is not whether a changed file is found."""
    before = path.read_bytes()
    tensors = load_file(path)
    key = next(k for k in sorted(tensors) if name in k)
    tensors[key].view(-1)[[3, 5]] = value
    save_file(tensors, path, {"format": "pt"})
    assert path.read_bytes() != before
    return key


def rehash(folder: Path) -> None:
    """A run's manifest speaks of its files as they are now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["outputs"] = {name: file_digest(folder / name) for name in manifest["outputs"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rebase(place: Place) -> None:
    """Manifests speak of the base as it is now."""
    digest = find_base(path=str(place.base)).digest
    for path in place.root.glob("*/*/manifest.json"):
        manifest = json.loads(path.read_text())
        if manifest["base"]:
            manifest["base"]["digest"] = digest
        path.write_text(json.dumps(manifest))


def stage_line(stage: str, place: Place) -> list[str]:
    """A command that works in a second or two."""
    model = ["model=hub", f"model.path={place.base}"]
    small = ["stage.batch_size=8", "stage.micro_batch=4"]
    judged = ["data.allow_simulated=true", "stage.held_out=0.3", "init=sft:s", "stage.epochs=4", *small[1:]]
    judged.append("stage.batch_size=4")
    lines = {
        "sft": [*model, *place.data, *small, "stage.eval_size=4", "stage.max_steps=4"],
        "full": [*model, *place.data, *small, "stage.eval_size=4", "stage.max_steps=4"],
        "sample": [*place.data, "stage.prompts=8", "init=sft:s", "project=other"],
        "reward": judged,
        "dpo": judged,
        "kto": judged,
        "ppo": [
            *place.data, *small, "stage.updates=3", "stage.normalise_on=16", "init=sft:s", "reward.ref=reward:a",
        ],
        "eval": [*place.data, "stage.prompts=8", "artifact=sft:s"],
        "export": ["artifact=sft:s"],
        "verify": ["init=sft:s", "reward.ref=reward:a", "stage.rows=2", "stage.micro_batch=1"],
    }  # fmt: skip
    return [f"stage={stage}", *lines[stage], f"run.root={place.root}", "rollout.max_new_tokens=8", "run.name=x"]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that has to end with status 2, and returns its message."""

    def command(line: list[str]) -> str:
        capfd.readouterr()
        status = main(line)
        said = capfd.readouterr()
        assert status == 2, said.out + said.err
        (message,) = [text for text in said.err.splitlines() if text.startswith("align: ")]
        assert "Traceback" not in said.err
        root = next(Path(word.removeprefix("run.root=")) for word in line if word.startswith("run.root="))
        for path in root.glob("*/x/manifest.json"):
            assert read_manifest(path.parent).status == "failed"
        return message

    return command


READERS = ("sft", "full", "sample", "reward", "dpo", "kto", "ppo", "eval", "export", "verify")


@pytest.mark.parametrize(
    ("stage", "value", "method"),
    [*((stage, NAN, None) for stage in READERS), ("sft", INF, "qlora"), ("sft", -INF, "lora"), ("sft", NAN, "lora")],
)
def test_in_the_base(place: Place, refused: Callable[..., str], stage: str, value: float, method: str | None) -> None:
    key = plant(place.base / WEIGHTS["base"], value)
    rebase(place)
    said = refused([*stage_line(stage, place), *([f"method={method}"] if method else [])])
    assert "model.path=" in said
    assert f"{key} in model.safetensors holds 2 values that are nan or infinite" in said


def test_a_base_that_its_dtype_cannot_hold(place: Place, refused: Callable[..., str]) -> None:
    key = plant(place.base / WEIGHTS["base"], 1e6)
    rebase(place)
    said = refused([*stage_line("sample", place), "dtype=float16"])
    assert f"dtype=float16: {key} in model.safetensors holds 2 values beyond what it can hold" in said


@pytest.mark.parametrize("stage", ["sample", "reward", "dpo", "kto", "ppo", "eval", "export", "verify"])
def test_in_the_adapter(place: Place, refused: Callable[..., str], stage: str) -> None:
    key = plant(place.root / "sft" / "s" / "artifact" / WEIGHTS["adapter"], NAN)
    rehash(place.root / "sft" / "s")
    said = refused(stage_line(stage, place))
    assert key in said
    assert "adapter_model.safetensors" in said
    assert ("artifact" if stage == "export" else "adapter") in said.partition("=")[0]


@pytest.mark.parametrize("where", ["layers.1.mlp.up_proj", "score"])
@pytest.mark.parametrize("stage", ["ppo", "verify"])
def test_in_the_reward_model(place: Place, refused: Callable[..., str], stage: str, where: str) -> None:
    path = place.root / "reward" / "a" / "artifact" / WEIGHTS["adapter"]
    key = plant(path, NAN, where)
    rehash(place.root / "reward" / "a")
    said = refused(stage_line(stage, place))
    assert f"reward.ref={path}: {key} holds 2 values" in said


@pytest.mark.parametrize("what", ["weights", "optimiser"])
@pytest.mark.parametrize("stage", ["sft", "full", "reward", "dpo", "kto", "ppo"])
def test_in_a_checkpoint(
    place: Place, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, stage: str, what: str
) -> None:
    line = [*stage_line(stage, place), "stage.save_every=1", *([] if stage == "ppo" else ["stage.log_every=1"])]
    log = Tracker.log

    def stop(self: Tracker, step: int, *rest: Any) -> None:
        log(self, step, *rest)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", stop)
        assert main(line) == 130
    run = place.root / stage / "x"
    checkpoint = max(run.glob("checkpoints/checkpoint-*"))
    if stage == "ppo":
        plant(checkpoint / "state.safetensors", NAN, "policy.3" if what == "weights" else "optimiser.3.exp_avg")
    elif what == "optimiser":
        kept = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        kept["state"][3]["exp_avg"].view(-1)[:2] = NAN
        torch.save(kept, checkpoint / "optimizer.pt")
    else:
        plant(next(iter(checkpoint.glob("*model*.safetensors"))), NAN)
    (checkpoint / SEAL).unlink()
    seal(checkpoint)
    said = refused(line)
    assert "checkpoint=" in said
    assert checkpoint.name in said
    assert "holds 2 values that are nan or infinite" in said


DIVERGES = "stage.lr=1e37"
"""One step of it, and no product of two weights is a number in fp32."""


@pytest.mark.parametrize("stage", ["sft", "full", "reward", "dpo", "kto", "ppo"])
def test_in_training(place: Place, refused: Callable[..., str], stage: str) -> None:
    """The first step moves every weight by the learning rate, and the next one finds out; PPO takes several a batch."""
    more = {"ppo": [], "reward": ["stage.warmup=0", "stage.epochs=32", "stage.schedule=constant"]}
    said = refused([*stage_line(stage, place), DIVERGES, *more.get(stage, ["stage.warmup=0"])])
    # A score head starts at 0, and takes some steps to overflow; PPO takes several steps an update.
    when = {"ppo": "update 1: ", "reward": r"step \d+: "}.get(stage, "step 2: ")
    assert re.match(r"align: stage\.lr=1e\+37: " + when, said), said
    # Gradients may be numbers where their norm is none: that is a matter of the processor's order of additions.
    assert re.search(r"\((the gradient of )?[\w.]+ (holds \d+ such values|reaches \d\.\de\+\d\d)\)", said), said
    assert "Lower stage.lr" in said
    try:
        assert resolve(f"{stage}:latest", place.root).manifest.name != "x"
    except MissingArtifact:
        assert stage in ("full", "dpo", "kto", "ppo")  # of which there is no earlier run


@pytest.mark.parametrize("stage", ["sft", "dpo", "kto"])
def test_after_the_last_step(place: Place, refused: Callable[..., str], stage: str) -> None:
    """The last step's loss and gradient were good, and what it left says nothing that is a number."""
    one = {"sft": "stage.max_steps=1", "dpo": "stage.epochs=0.01", "kto": "stage.epochs=0.01"}[stage]
    said = refused([*stage_line(stage, place), one, "stage.warmup=0", DIVERGES])
    assert said.startswith("align: stage.lr=1e+37: ")
    assert "after step 1" in said
    assert "nothing is published" in said


def test_in_held_out_scores(place: Place, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which training never saw: one of them, where all that was trained on are numbers."""
    from align.reward import learned

    score_rows = learned.score_rows

    def spoilt(*arguments: Any) -> torch.Tensor:
        scores = score_rows(*arguments)
        scores[1] = INF
        return scores

    monkeypatch.setattr(learned, "score_rows", spoilt)
    said = refused(stage_line("reward", place))
    assert re.match(r"align: stage\.lr=0\.001: 1 of \d+ held-out answers .* after step 4: nothing is published", said)


def test_in_what_is_written(place: Place, refused: Callable[..., str]) -> None:
    """Every figure is a number, and so is every weight in fp32; they are written in fp16."""
    one = ["stage.max_steps=1", "stage.warmup=0", "stage.lr=1e30", "dtype=float16"]
    said = refused([*stage_line("full", place), *one])
    assert said.startswith("align: stage.lr=1e+30: ")
    assert "model.safetensors holds" in said
    assert "nothing is published" in said


@pytest.mark.parametrize(("stage", "named"), [("sample", "init=sft:s"), ("eval", "artifact=sft:s"), ("ppo", "reward")])
def test_in_what_finite_weights_say(place: Place, refused: Callable[..., str], stage: str, named: str) -> None:
    """Weights that are numbers, and make none."""
    which = ("reward", "a") if stage == "ppo" else ("sft", "s")
    path = place.root.joinpath(*which, "artifact", WEIGHTS["adapter"])
    tensors = {k: torch.full_like(t, 1e30) for k, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    rehash(place.root.joinpath(*which))
    said = refused(stage_line(stage, place))
    assert named in said
    assert "nan or infinite" in said
    assert "dtype=float32" in said


def test_in_a_figure(place: Place, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stage brings it: the gate is one for all."""
    from align.core.types import StageResult
    from align.stages import sample

    run = sample.run

    def spoilt(*arguments: Any) -> StageResult:
        return StageResult({**run(*arguments).metrics, "deep": {"list": [1.0, INF]}})

    monkeypatch.setattr(sample, "run", spoilt)
    assert "in the end deep.list.1 is inf: nothing is published" in refused(stage_line("sample", place))
