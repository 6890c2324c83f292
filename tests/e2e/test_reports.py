"""Reports of real runs: every figure has a name, the live page changes nothing, and how a run ended is said."""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from workshop import Ready

from align.__main__ import main
from align.data.chat.encode import IGNORE_INDEX
from align.report import live
from align.report.figure_labels import FIGURES, build_figure_table
from align.run import read_manifest
from align.run.lineage import iter_manifests
from align.track import read_rows

pytestmark = pytest.mark.usefixtures("no_network")
LIVE = [
    ("sft", []), ("full", []), ("sample", ["stage.prompts=24", "project=again"]),
    ("reward", ["data.allow_simulated=true", "stage.batch_size=8", "stage.held_out=0.3", "stage.epochs=2"]),
    ("dpo", ["data.allow_simulated=true", "stage.batch_size=8", "stage.held_out=0.3"]),
    ("kto", ["data.allow_simulated=true", "stage.batch_size=8", "stage.held_out=0.3"]),
    ("ppo", ["stage.eval_every=1", "stage.eval_prompts=4", "stage.shown=2"]),
]  # fmt: skip


def page_of(folder: Path) -> str:
    return html.unescape((folder / "report.html").read_bytes().decode())


def line(ready: Ready, tiny_model: Path, stage: str, words: list[str]) -> list[str]:
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
    """Written at every step, with curves each time: the metrics are those of a run that nobody looked at, to the bit,
    and so are the weights."""
    command = [*line(ready, tiny_model, stage, words), f"run.root={ready.root}"]
    folders = [ready.root / stage / name for name in ("quiet", "watched")]
    assert main([*command, "run.name=quiet"]) == 0
    written: list[str] = []
    write = live.Report.write

    def noted(report: live.Report, path: Path) -> Path:
        written.append(html.unescape(report.html()))
        return write(report, path)

    monkeypatch.setattr(live, "WRITE_INTERVAL_S", 0.0)
    monkeypatch.setattr(live, "MAX_TIME_SHARE", float("inf"))
    monkeypatch.setattr(live.Report, "write", noted)
    assert main([*command, "run.name=watched"]) == 0

    quiet, watched = ((folder / "metrics.jsonl").read_bytes() for folder in folders)
    assert quiet == watched
    assert read_manifest(folders[0]).digest == read_manifest(folders[1]).digest
    *running, last = written
    assert len(running) >= 2
    assert all("Running" in page for page in running)
    far = r"Running, (step|update) \d of \d|Running: all 24 prompts are done"
    assert any(re.search(far, page) for page in running)
    assert "cpu, float32" in running[-1]
    assert re.search(r"Data</dt><dd>((?!</dd>).)*\d (row|pair|prompt|unwanted answer)s?", running[-1])
    assert ("<img" in running[-1]) == (stage != "sample")  # which is logged once here
    assert "Figures so far" in running[-1]
    assert "refresh" not in last
    assert last == page_of(folders[1])


def test_every_figure_is_declared_and_no_cell_is_blank(ready: Ready):
    """Of every run that this session has made so far."""
    seen: dict[str, Any] = {}
    for folder, manifest in iter_manifests(ready.root):
        if manifest.done:
            assert {row[0] for row in build_figure_table(manifest.metrics)} <= {figure.label for figure in FIGURES}, (
                folder
            )
            page = page_of(folder)
            assert not re.search(r"<(td|th|dd|dt)[^>]*>\s*</", page), folder
            seen[manifest.stage] = page
    assert seen.keys() >= {"sft", "sample", "annotate", "reward"}
    assert '<a href="../../sft/s/report.html">sft:s</a>' in seen["reward"]
    assert "init=sft:s" in seen["reward"]


def test_what_is_trained_on_is_shown_as_it_was_handed_to_the_trainer(
    ready: Ready, tiny_model: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    from align.trainers import sft

    handed: list[Any] = []
    convert = sft.to_dataset
    monkeypatch.setattr(sft, "to_dataset", lambda rows: handed.append(convert(rows)) or handed[-1])
    assert main([*line(ready, tiny_model, "sft", ["run.name=shown"]), f"run.root={ready.root}"]) == 0
    rows, page = read_rows(ready.root / "sft" / "shown" / "trained_on.jsonl"), page_of(ready.root / "sft" / "shown")
    assert len(rows) == 3
    for row, given in zip(rows, handed[0], strict=False):
        assert "".join(part["text"] for part in row["parts"]) == tiny_tokenizer.decode(given["input_ids"])
        answer = "".join(part["text"] for part in row["parts"] if part["trained"])
        assert answer == tiny_tokenizer.decode([label for label in given["labels"] if label != IGNORE_INDEX])
        assert f"<mark>{answer.removesuffix('<eos>')}<code><eos></code></mark>" in page


def test_the_command_of_a_report_runs_as_it_stands(ready: Ready, tiny_model: Path, capsys: pytest.CaptureFixture[str]):
    """It finds the run that it is to make again finished: it is the same run."""
    assert main([*line(ready, tiny_model, "sft", ["run.name=again"]), f"run.root={ready.root}"]) == 0
    said = re.search(r"Command</dt><dd><code>(.*?)</code>", page_of(ready.root / "sft" / "again"))
    assert said is not None
    assert "model=hub" in said[1]
    capsys.readouterr()
    assert main(shlex.split(said[1])[3:]) == 0
    assert "finished already" in capsys.readouterr().out


def test_a_failed_run_says_so(ready: Ready, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    def fault(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("division <by> zero")

    command = [*line(ready, tiny_model, "sft", ["run.name=broken"]), f"run.root={ready.root}"]
    with monkeypatch.context() as patch:
        patch.setattr("align.models.adapters.save_adapter", fault)
        assert main(command) == 1
    page = page_of(ready.root / "sft" / "broken")
    assert "Failed after step 4 of 4: ZeroDivisionError: division <by> zero" in page
    assert 'http-equiv="refresh"' not in page
    assert "<img" in page  # and what it had learned until then

    with monkeypatch.context() as patch:
        patch.setattr("align.evals.held_out.compute_held_out_loss", interrupt)
        assert main([*command, "run.name=cut"]) == 130
    page = page_of(ready.root / "sft" / "cut")
    assert "Interrupted. The same command continues it." in page
    assert 'http-equiv="refresh"' not in page
    assert main([*command, "run.name=cut"]) == 0
    assert "Held-out loss" in page_of(ready.root / "sft" / "cut")


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_what_is_not_right_is_in_the_page(ready: Ready, monkeypatch: pytest.MonkeyPatch, tiny_model: Path):
    """stage=verify fails, and its page shows by which fact."""
    from align.ppo import update

    right = update.policy_loss
    monkeypatch.setattr(update, "policy_loss", lambda new, old, gains, *rest: right(new, old, -gains, *rest))
    words = ["stage=verify", "model=hub", f"model.path={tiny_model}", "rollout.max_new_tokens=8", "device=cpu"]
    assert main([*words, f"run.root={ready.root}", "run.name=wrong"]) == 1
    page = page_of(ready.root / "verify" / "wrong")
    assert "Failed: PPO is not right here: closed form, no critic, first gradient" in page
    assert page.count("<td>FAILS</td>") >= 2
