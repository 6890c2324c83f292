"""Each kind of bad file, given to each stage that reads it, exits with status 2 and one message that names file and
field. There is no traceback, and nothing is published."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bad_values import assert_refused, build_reading_commands
from stage_commands import Ready, Workshop

from align.run import read_manifest


@pytest.fixture
def shop(ready: Ready) -> Workshop:
    return Workshop(ready.root, ready.root)


@pytest.mark.parametrize("key", ["project", "data.path", "store.url"])
def test_half_a_character_on_the_command_line(
    shop: Workshop, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
):
    """Bytes that are no UTF-8 reach Python as lone surrogates; a group file may write one as an escape."""
    printed = "***" if key == "store.url" else "a\\udcffb"
    assert_refused(shop, ["stage=sft", f"{key}=a\udcffb"], f"{key}={printed}", "UTF-8")
    (tmp_path / "conf" / "track").mkdir(parents=True)
    group, _, leaf = key.partition(".")
    setting_yaml = f'{group}:\n  {leaf}: "a\\ud83d"\n' if leaf else f'{group}: "a\\ud83d"\n'
    (tmp_path / "conf" / "track" / "mine.yaml").write_text(
        f"# @package _global_\ndefaults: [/track/none]\n{setting_yaml}"
    )
    monkeypatch.chdir(tmp_path)
    assert shop.run_command("stage=sft", "track=mine", "--cfg", "job") == 2, shop.output
    monkeypatch.setenv("ALIGN_STORE_URL", "sqlite:///a\udcff.db")
    assert_refused(shop, ["stage=sft"], "store.url", "UTF-8")


def test_half_a_character_in_lines(tmp_path: Path):
    process = subprocess.run(
        [sys.executable, "-m", "align", "-"],
        input=b"stage=sft project=\xff\n",
        capture_output=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert process.returncode == 2, process
    assert b"project=\\udcff" in process.stderr


# --- Failures of the user's function

"""One test for each place that may fail. Other failures of a function are tested in `test_scorers`."""


def test_a_function_that_exits_is_named_and_ends_nothing_with_status_0(
    shop: Workshop, ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Other failures of a function are tested in `test_scorers`."""
    (tmp_path / "mine_exits.py").write_text("import sys\ndef score(c):\n    sys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    command = [word for word in ready.ppo if not word.startswith("reward")]
    part_spec = "{name: fn, fn: 'mine_exits:score'}"
    for reward in (["reward=fn", "reward.fn=mine_exits:score"], ["reward=sum", f"reward.parts=[{part_spec}]"]):
        assert_refused(shop, [*command, *reward], "reward.fn=mine_exits:score")


def test_ctrl_c_in_a_function_is_an_interruption(
    shop: Workshop, ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "mine_ctrl.py").write_text("def score(c):\n    raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(tmp_path)
    command = [word for word in ready.ppo if not word.startswith("reward")]
    full_command = [*command, "reward=fn", "reward.fn=mine_ctrl:score", f"run.root={shop.root}", "run.name=ctrl"]
    assert shop.run_command(*full_command) == 130
    assert read_manifest(shop.root / "ppo" / "ctrl").status == "interrupted"


# --- Too little memory


@pytest.mark.parametrize(
    "place",
    [
        "align.evals.held_out.compute_held_out_loss",
        "align.stages.sft.find_base",
        "align.models.load.AutoModelForCausalLM.from_pretrained",  # loaders blame the files for whatever goes wrong
    ],
)
def test_too_little_memory_is_not_our_fault(
    shop: Workshop, ready: Ready, tiny_model: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    """The errors that count as too little memory are tested in `test_run`."""
    monkeypatch.setattr(place, lambda *_, **__: bytearray(1 << 60))
    assert_refused(
        shop, build_reading_commands(ready, tiny_model, chats)["sft"], "memory=", "too little", "stage.micro_batch"
    )
