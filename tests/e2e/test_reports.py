"""Reports of real runs: every figure has a name, the live page changes nothing, and the page says how a run ended."""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from stage_commands import Ready

from align.__main__ import main
from align.data.chat.encode import IGNORE_INDEX
from align.report import live
from align.report.figure_labels import FIGURES, build_figure_table
from align.run import read_manifest
from align.run.lineage import iter_manifests
from align.track import read_rows

pytestmark = pytest.mark.usefixtures("no_network")
LIVE = [
    ("sft", []),
    ("full", []),
    ("sample", ["stage.prompts=24", "project=again"]),
    ("reward", ["data.allow_simulated=true", "stage.batch_size=8", "stage.held_out=0.3", "stage.epochs=2"]),
    ("dpo", ["data.allow_simulated=true", "stage.batch_size=8", "stage.held_out=0.3"]),
    ("kto", ["data.allow_simulated=true", "stage.batch_size=8", "stage.held_out=0.3"]),
    ("ppo", ["stage.eval_every=1", "stage.eval_prompts=4", "stage.shown=2"]),
]


def read_page(folder: Path) -> str:
    return html.unescape((folder / "report.html").read_bytes().decode())


def build_stage_command(ready: Ready, tiny_model: Path, stage: str, words: list[str]) -> list[str]:
    if stage == "ppo":
        return [*ready.ppo, *words]
    if stage in ("reward", "dpo", "kto"):
        return [f"stage={stage}", "init=sft:s", *words]
    base = ["init=sft:s"] if stage == "sample" else ["model=hub", f"model.path={tiny_model}", "stage.epochs=2"]
    return [f"stage={stage}", *base, *ready.data, "rollout.max_new_tokens=12", *words]


@pytest.mark.parametrize(("stage", "words"), LIVE)
def test_the_live_page_changes_nothing(
    ready: Ready, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, stage: str, words: list[str]
):
    """The page is written at every step, with curves. Metrics and weights are those of a run without it, to the bit."""
    command = [*build_stage_command(ready, tiny_model, stage, words), f"run.root={ready.root}"]
    folders = [ready.root / stage / name for name in ("quiet", "watched")]
    assert main([*command, "run.name=quiet"]) == 0
    pages: list[str] = []
    write = live.Report.write

    def record_page(report: live.Report, path: Path) -> Path:
        pages.append(html.unescape(report.html()))
        return write(report, path)

    monkeypatch.setattr(live, "WRITE_INTERVAL_S", 0.0)
    monkeypatch.setattr(live, "MAX_TIME_SHARE", float("inf"))
    monkeypatch.setattr(live.Report, "write", record_page)
    assert main([*command, "run.name=watched"]) == 0

    quiet, watched = ((folder / "metrics.jsonl").read_bytes() for folder in folders)
    assert quiet == watched
    assert read_manifest(folders[0]).digest == read_manifest(folders[1]).digest
    *running, last = pages
    assert len(running) >= 2
    assert all("Running" in page for page in running)
    progress = r"Running, (step|update) \d of \d|Running: all 24 prompts are done"
    assert any(re.search(progress, page) for page in running)
    assert "cpu, float32" in running[-1]
    assert re.search(r"Data</dt><dd>((?!</dd>).)*\d (row|pair|prompt|unwanted answer)s?", running[-1])
    assert ("<img" in running[-1]) == (stage != "sample")  # its metrics are logged once
    assert "Figures so far" in running[-1]
    assert "refresh" not in last
    assert last == read_page(folders[1])


def test_every_figure_is_declared_and_no_cell_is_blank(ready: Ready):
    """All finished runs of this session are checked."""
    pages: dict[str, Any] = {}
    for folder, manifest in iter_manifests(ready.root):
        if manifest.done:
            assert {row[0] for row in build_figure_table(manifest.metrics)} <= {figure.label for figure in FIGURES}, (
                folder
            )
            page = read_page(folder)
            assert not re.search(r"<(td|th|dd|dt)[^>]*>\s*</", page), folder
            pages[manifest.stage] = page
    assert pages.keys() >= {"sft", "sample", "annotate", "reward"}
    assert '<a href="../../sft/s/report.html">sft:s</a>' in pages["reward"]
    assert "init=sft:s" in pages["reward"]


def test_what_is_trained_on_is_shown_as_it_was_handed_to_the_trainer(
    ready: Ready, tiny_model: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    from align.trainers import sft

    data_sets: list[Any] = []
    convert = sft.to_dataset
    monkeypatch.setattr(sft, "to_dataset", lambda rows: data_sets.append(convert(rows)) or data_sets[-1])
    assert main([*build_stage_command(ready, tiny_model, "sft", ["run.name=shown"]), f"run.root={ready.root}"]) == 0
    rows = read_rows(ready.root / "sft" / "shown" / "trained_on.jsonl")
    page = read_page(ready.root / "sft" / "shown")
    assert len(rows) == 3
    for row, example in zip(rows, data_sets[0], strict=False):
        assert "".join(part["text"] for part in row["parts"]) == tiny_tokenizer.decode(example["input_ids"])
        answer = "".join(part["text"] for part in row["parts"] if part["trained"])
        assert answer == tiny_tokenizer.decode([label for label in example["labels"] if label != IGNORE_INDEX])
        assert f"<mark>{answer.removesuffix('<eos>')}<code><eos></code></mark>" in page


def test_the_command_of_a_report_runs_as_it_stands(ready: Ready, tiny_model: Path, capsys: pytest.CaptureFixture[str]):
    """The command finds its own run finished."""
    assert main([*build_stage_command(ready, tiny_model, "sft", ["run.name=again"]), f"run.root={ready.root}"]) == 0
    match = re.search(r"Command</dt><dd><code>(.*?)</code>", read_page(ready.root / "sft" / "again"))
    assert match is not None
    assert "model=hub" in match[1]
    capsys.readouterr()
    assert main(shlex.split(match[1])[3:]) == 0
    assert "finished already" in capsys.readouterr().out


def test_a_failed_run_says_so(ready: Ready, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    def raise_error(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("division <by> zero")

    command = [*build_stage_command(ready, tiny_model, "sft", ["run.name=broken"]), f"run.root={ready.root}"]
    with monkeypatch.context() as patch:
        patch.setattr("align.models.adapters.save_adapter", raise_error)
        assert main(command) == 1
    page = read_page(ready.root / "sft" / "broken")
    assert "Failed after step 4 of 4: ZeroDivisionError: division <by> zero" in page
    assert 'http-equiv="refresh"' not in page
    assert "<img" in page  # the curves until then

    with monkeypatch.context() as patch:
        patch.setattr("align.evals.held_out.compute_held_out_loss", interrupt)
        assert main([*command, "run.name=cut"]) == 130
    page = read_page(ready.root / "sft" / "cut")
    assert "Interrupted. The same command continues it." in page
    assert 'http-equiv="refresh"' not in page
    assert main([*command, "run.name=cut"]) == 0
    assert "Held-out loss" in read_page(ready.root / "sft" / "cut")


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_what_is_not_right_is_in_the_page(ready: Ready, monkeypatch: pytest.MonkeyPatch, tiny_model: Path):
    """The page of a failed stage=verify names the facts that are wrong."""
    from align.ppo import update

    policy_loss = update.policy_loss
    monkeypatch.setattr(update, "policy_loss", lambda new, old, gains, *args: policy_loss(new, old, -gains, *args))
    words = ["stage=verify", "model=hub", f"model.path={tiny_model}", "rollout.max_new_tokens=8", "device=cpu"]
    assert main([*words, f"run.root={ready.root}", "run.name=wrong"]) == 1
    page = read_page(ready.root / "verify" / "wrong")
    assert "Failed: PPO does not compute correctly here: closed form, no critic, first gradient" in page
    assert page.count("<td>FAILS</td>") >= 2
