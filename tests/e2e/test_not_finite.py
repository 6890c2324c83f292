"""Values that are not finite are never published: each stage finds them in all its inputs and in its own training.

The status is always 2, one message names the place, and no run says `done`.
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
from stage_commands import Ready

from align.__main__ import main
from align.core.errors import MissingArtifact
from align.models.base import find_base
from align.run import file_digest, read_manifest, resolve
from align.run.checkpoints import SEAL, seal_checkpoint
from align.track import Tracker

NAN = float("nan")
INF = float("inf")
WEIGHTS = {"base": "model.safetensors", "adapter": "adapter_model.safetensors"}


class CorruptibleRuns(NamedTuple):
    """Runs and a base of their own, which a test may corrupt."""

    root: Path
    base: Path
    data: list[str]


@pytest.fixture
def place(ready: Ready, tiny_model: Path, tmp_path: Path) -> CorruptibleRuns:
    """Copy the runs up to a reward model, and their base."""
    root = Path(shutil.copytree(ready.root, tmp_path / "runs"))
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    for path in root.glob("*/*/manifest.json"):
        path.write_text(path.read_text().replace(str(tiny_model), str(base)).replace(str(ready.root), str(root)))
    return CorruptibleRuns(root, base, ready.data)


def plant(path: Path, value: float, name: str = "layers.1.mlp.up_proj") -> str:
    """Overwrite two values of one tensor, and return the tensor's name."""
    before = path.read_bytes()
    tensors = load_file(path)
    key = next(k for k in sorted(tensors) if name in k)
    tensors[key].view(-1)[[3, 5]] = value
    save_file(tensors, path, {"format": "pt"})
    assert path.read_bytes() != before
    return key


def rehash(folder: Path) -> None:
    """Update the digests of a run's files in its manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["outputs"] = {name: file_digest(folder / name) for name in manifest["outputs"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rebase(place: CorruptibleRuns) -> None:
    """Update the digest of the base in every manifest."""
    digest = find_base(path=str(place.base)).digest
    for path in place.root.glob("*/*/manifest.json"):
        manifest = json.loads(path.read_text())
        if manifest["base"]:
            manifest["base"]["digest"] = digest
        path.write_text(json.dumps(manifest))


def build_stage_line(stage: str, place: CorruptibleRuns) -> list[str]:
    """Return a command that takes a second or two."""
    model = ["model=hub", f"model.path={place.base}"]
    small = ["stage.batch_size=8", "stage.micro_batch=4"]
    on_votes = ["data.allow_simulated=true", "stage.held_out=0.3", "init=sft:s", "stage.epochs=4", *small[1:]]
    on_votes.append("stage.batch_size=4")
    lines = {
        "sft": [*model, *place.data, *small, "stage.eval_size=4", "stage.max_steps=4"],
        "full": [*model, *place.data, *small, "stage.eval_size=4", "stage.max_steps=4"],
        "sample": [*place.data, "stage.prompts=8", "init=sft:s", "project=other"],
        "reward": on_votes,
        "dpo": on_votes,
        "kto": on_votes,
        "ppo": [
            *place.data,
            *small,
            "stage.updates=3",
            "stage.normalise_on=16",
            "init=sft:s",
            "reward.ref=reward:a",
        ],
        "eval": [*place.data, "stage.prompts=8", "artifact=sft:s"],
        "export": ["artifact=sft:s"],
        "verify": ["init=sft:s", "reward.ref=reward:a", "stage.rows=2", "stage.micro_batch=1"],
    }
    return [f"stage={stage}", *lines[stage], f"run.root={place.root}", "rollout.max_new_tokens=8", "run.name=x"]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command which must end with status 2, and returns its message."""

    def command(line: list[str]) -> str:
        capfd.readouterr()
        status = main(line)
        output = capfd.readouterr()
        assert status == 2, output.out + output.err
        (message,) = [text for text in output.err.splitlines() if text.startswith("align: ")]
        assert "Traceback" not in output.err
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
def test_in_the_base(
    place: CorruptibleRuns, refused: Callable[..., str], stage: str, value: float, method: str | None
) -> None:
    key = plant(place.base / WEIGHTS["base"], value)
    rebase(place)
    message = refused([*build_stage_line(stage, place), *([f"method={method}"] if method else [])])
    assert "model.path=" in message
    assert f"{key} in model.safetensors holds 2 values that are nan or infinite" in message


def test_a_base_that_its_dtype_cannot_hold(place: CorruptibleRuns, refused: Callable[..., str]) -> None:
    key = plant(place.base / WEIGHTS["base"], 1e6)
    rebase(place)
    message = refused([*build_stage_line("sample", place), "dtype=float16"])
    assert f"dtype=float16: {key} in model.safetensors holds 2 values beyond what it can hold" in message


@pytest.mark.parametrize("stage", ["sample", "reward", "dpo", "kto", "ppo", "eval", "export", "verify"])
def test_in_the_adapter(place: CorruptibleRuns, refused: Callable[..., str], stage: str) -> None:
    key = plant(place.root / "sft" / "s" / "artifact" / WEIGHTS["adapter"], NAN)
    rehash(place.root / "sft" / "s")
    message = refused(build_stage_line(stage, place))
    assert key in message
    assert "adapter_model.safetensors" in message
    assert ("artifact" if stage == "export" else "adapter") in message.partition("=")[0]


@pytest.mark.parametrize("where", ["layers.1.mlp.up_proj", "score"])
@pytest.mark.parametrize("stage", ["ppo", "verify"])
def test_in_the_reward_model(place: CorruptibleRuns, refused: Callable[..., str], stage: str, where: str) -> None:
    path = place.root / "reward" / "a" / "artifact" / WEIGHTS["adapter"]
    key = plant(path, NAN, where)
    rehash(place.root / "reward" / "a")
    message = refused(build_stage_line(stage, place))
    assert f"reward.ref={path}: {key} holds 2 values" in message


@pytest.mark.parametrize("what", ["weights", "optimiser"])
@pytest.mark.parametrize("stage", ["sft", "full", "reward", "dpo", "kto", "ppo"])
def test_in_a_checkpoint(
    place: CorruptibleRuns, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, stage: str, what: str
) -> None:
    line = [*build_stage_line(stage, place), "stage.save_every=1", *([] if stage == "ppo" else ["stage.log_every=1"])]
    log = Tracker.log

    def stop(self: Tracker, step: int, *args: Any) -> None:
        log(self, step, *args)
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
        optimiser_state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        optimiser_state["state"][3]["exp_avg"].view(-1)[:2] = NAN
        torch.save(optimiser_state, checkpoint / "optimizer.pt")
    else:
        plant(next(iter(checkpoint.glob("*model*.safetensors"))), NAN)
    (checkpoint / SEAL).unlink()
    seal_checkpoint(checkpoint)
    message = refused(line)
    assert "checkpoint=" in message
    assert checkpoint.name in message
    assert "holds 2 values that are nan or infinite" in message


DIVERGES = "stage.lr=1e37"
"""A learning rate whose first step makes every product of two weights overflow fp32."""


@pytest.mark.parametrize("stage", ["sft", "full", "reward", "dpo", "kto", "ppo"])
def test_in_training(place: CorruptibleRuns, refused: Callable[..., str], stage: str) -> None:
    """The first step moves every weight by the learning rate, and the next one fails. PPO takes several a batch."""
    more = {"ppo": [], "reward": ["stage.warmup=0", "stage.epochs=32", "stage.schedule=constant"]}
    message = refused([*build_stage_line(stage, place), DIVERGES, *more.get(stage, ["stage.warmup=0"])])
    # A score head starts at 0, and takes some steps to overflow; PPO takes several steps an update.
    when = {"ppo": "update 1: ", "reward": r"step \d+: "}.get(stage, "step 2: ")
    assert re.match(r"align: stage\.lr=1e\+37: " + when, message), message
    # Gradients may be finite although their norm is not: that depends on the processor's order of additions.
    assert re.search(r"\((the gradient of )?[\w.]+ (holds \d+ such values|reaches \d\.\de\+\d\d)\)", message), message
    assert "Lower stage.lr" in message
    try:
        assert resolve(f"{stage}:latest", place.root).manifest.name != "x"
    except MissingArtifact:
        assert stage in ("full", "dpo", "kto", "ppo")  # stages without an earlier run


@pytest.mark.parametrize("stage", ["sft", "dpo", "kto"])
def test_after_the_last_step(place: CorruptibleRuns, refused: Callable[..., str], stage: str) -> None:
    """The last step's loss and gradient are finite, and the weights that it leaves compute values that are not."""
    single_step = {"sft": "stage.max_steps=1", "dpo": "stage.epochs=0.01", "kto": "stage.epochs=0.01"}[stage]
    message = refused([*build_stage_line(stage, place), single_step, "stage.warmup=0", DIVERGES])
    assert message.startswith("align: stage.lr=1e+37: ")
    assert "after step 1" in message
    assert "nothing is published" in message


def test_in_held_out_scores(
    place: CorruptibleRuns, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One held-out score is infinite, and all scores of training are finite."""
    from align.reward import learned

    score_rows = learned.score_rows

    def spoil_scores(*arguments: Any) -> torch.Tensor:
        scores = score_rows(*arguments)
        scores[1] = INF
        return scores

    monkeypatch.setattr(learned, "score_rows", spoil_scores)
    message = refused(build_stage_line("reward", place))
    assert re.match(
        r"align: stage\.lr=0\.001: 1 of \d+ held-out answers .* after step 4: nothing is published", message
    )


def test_in_what_is_written(place: CorruptibleRuns, refused: Callable[..., str]) -> None:
    """Every figure and every weight is finite in fp32. Weights are written in fp16, and are not finite there."""
    single_step = ["stage.max_steps=1", "stage.warmup=0", "stage.lr=1e30", "dtype=float16"]
    message = refused([*build_stage_line("full", place), *single_step])
    assert message.startswith("align: stage.lr=1e+30: ")
    assert "model.safetensors holds" in message
    assert "nothing is published" in message


@pytest.mark.parametrize(("stage", "named"), [("sample", "init=sft:s"), ("eval", "artifact=sft:s"), ("ppo", "reward")])
def test_in_what_finite_weights_say(
    place: CorruptibleRuns, refused: Callable[..., str], stage: str, named: str
) -> None:
    """The weights are finite, and the values that they compute are not."""
    run_path = ("reward", "a") if stage == "ppo" else ("sft", "s")
    path = place.root.joinpath(*run_path, "artifact", WEIGHTS["adapter"])
    tensors = {k: torch.full_like(t, 1e30) for k, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    rehash(place.root.joinpath(*run_path))
    message = refused(build_stage_line(stage, place))
    assert named in message
    assert "nan or infinite" in message
    assert "dtype=float32" in message


def test_in_a_figure(place: CorruptibleRuns, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics of every stage pass the same check."""
    from align.core.types import StageResult
    from align.stages import sample

    run = sample.run

    def spoil_metrics(*arguments: Any) -> StageResult:
        return StageResult({**run(*arguments).metrics, "deep": {"list": [1.0, INF]}})

    monkeypatch.setattr(sample, "run", spoil_metrics)
    assert "in the end deep.list.1 is inf: nothing is published" in refused(build_stage_line("sample", place))
