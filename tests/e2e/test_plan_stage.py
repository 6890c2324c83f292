"""Plans of a stage from the command line (`stage=plan`), made before anything is loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
WRONG = (
    "ppo stage.micro_batsch=4",
    "ppo stage.batch_size=7",
    "dpo method=full",
    "reward stage.beta=1",
    "dpo data=chitchat",
    "sft model=hub model.path=./none init=base",
)

DIRECT = ("dpo", "dpo stage.loss=simpo", "kto")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_main(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(line.split())
    output = capsys.readouterr()
    return status, output.out, output.err


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_line_is_told_what_its_stage_would_tell(line: str, here: Path, capsys: pytest.CaptureFixture[str]):
    planned = run_main(f"stage=plan stage.of={line}", capsys)
    direct = run_main(f"stage={line}", capsys)
    assert planned == direct
    assert planned[0] == 2


@pytest.mark.parametrize(
    "stage", ["sft init=base", "full", "reward", "ppo", *(f"{each} data=annotations" for each in DIRECT)]
)
def test_it_says_memory_cards_disk_and_time_and_leaves_nothing(
    stage: str, here: Path, capsys: pytest.CaptureFixture[str]
):
    status, out, error = run_main(f"stage=plan stage.of={stage} stage.throughput=1000", capsys)
    assert (status, error) == (0, "")
    for text in ("the peak is in the ", "RTX 3090, 4090, L4", "on disk: ", "at 1000 tokens a second", "yes"):
        assert text in out
    assert not [*here.iterdir()]


@pytest.mark.parametrize(
    "words",
    [
        "sft stage.micro_batch=9223372036854775807 stage.batch_size=9223372036854775807",
        "ppo stage.updates=9223372036854775807 stage.throughput=0.001",
        "sft stage.throughput=1e9",
        "ppo stage.checkpoints=9223372036854775807",
        "sft method.r=9223372036854775807",
        "reward stage.answers=9223372036854775807 stage.throughput=1",
    ],
)
def test_a_plan_of_any_size_is_short_and_soon_there(words: str, here: Path, capsys: pytest.CaptureFixture[str]):
    began = time.process_time()
    status, out, error = run_main(f"stage=plan stage.of={words}", capsys)
    assert (status, error) == (0, "")
    assert time.process_time() - began < 5
    computed = out.replace("9223372036854775807", "")
    assert max(len(number) for number in re.findall(r"[\d,.]+", computed)) < 12
    assert not re.search(r"\b(inf|nan|0\.0 s)\b", out)


def test_what_it_proposes_can_be_added_to_the_line(here: Path, capsys: pytest.CaptureFixture[str]):
    """Only the configuration of the 8B model exists."""
    (here / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, '
        '"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}'
    )
    line = f"stage=plan stage.of=ppo model=hub model.path={here} init=base method=lora stage.card=16"
    _, out, _ = run_main(line, capsys)
    (words,) = re.findall(r"16 GB +as given +add (.+)", out)
    assert re.search(r"16 GB +as given +yes", run_main(f"{line.replace('method=lora ', '')} {words}", capsys)[1])
    assert "no: no setting that could be changed" in run_main(line.replace("card=16", "card=4"), capsys)[1]


def test_measured_beside_predicted(here: Path, capsys: pytest.CaptureFixture[str]):
    sizes = "stage.batch_size=4 stage.minibatches=1 stage.normalise_on=4 rollout.batch_size=4"
    rows = "data.max_length=16 rollout.max_new_tokens=4"
    status, out, error = run_main(
        f"stage=plan stage.of=ppo init=base device=cpu stage.measure=true {sizes} {rows}", capsys
    )
    assert status == 0, error
    (deviation,) = re.findall(r"^peak: predicted .*\(([-+][\d.]+)%\)$", out, re.MULTILINE)
    assert abs(float(deviation)) < 15
    assert not [*here.iterdir()]


def test_it_answers_without_torch(here: Path):
    code = (
        "import sys; from align.__main__ import main; status = main(['stage=plan', 'stage.of=ppo']); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_help_and_the_job_are_of_the_stage_that_is_planned(here: Path, capsys: pytest.CaptureFixture[str]):
    _, help_text, _ = run_main("stage=plan stage.of=dpo --help", capsys)
    assert "stage.loss=sigmoid" in help_text
    assert "stage.measure=false" in help_text
    _, job, _ = run_main("stage=plan stage.of=dpo stage.beta=0.3 data=annotations --cfg job", capsys)
    assert "beta: 0.3" in job
    assert "of: dpo" in job
