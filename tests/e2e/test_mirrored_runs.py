"""Training that a tracking service mirrors: killed and resumed, refused, and with a store that cannot be written to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stage_commands import Workshop

from align.run import read_manifest
from align.track import Tracker, read_rows

mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'align-rlhf[mlflow]'")
SFT = ("stage.max_steps=4", "stage.save_every=2", "stage.log_every=1", "track=mlflow", "run.name=x")


@pytest.fixture
def shop(tmp_path: Path, chats: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> Workshop:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    return Workshop(tmp_path / "runs", chats, "model=hub", f"model.path={tiny_model}")


def test_a_killed_run_is_one_run_with_each_step_once(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Tracker.log

    def interrupt_at_step_3(self: Tracker, step: int, *args: Any) -> None:
        real(self, step, *args)
        if step == 3:  # a step behind the checkpoint
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", interrupt_at_step_3)
        assert shop.status("stage=sft", *shop.data_words, *SFT) == 130
    store = f"sqlite:///{shop.root / 'mlflow/mlflow.db'}"
    client = mlflow.MlflowClient(store, store)
    (killed_run,) = client.search_runs([client.get_experiment_by_name("align").experiment_id])
    assert killed_run.info.status == "FAILED"

    folder = shop.run("sft", *SFT)
    (finished_run,) = client.search_runs([killed_run.info.experiment_id])
    assert (finished_run.info.run_id, finished_run.info.status, finished_run.info.run_name) == (
        killed_run.info.run_id,
        "FINISHED",
        "sft:x",
    )
    logged = [(entry.step, entry.value) for entry in client.get_metric_history(finished_run.info.run_id, "loss")]
    assert sorted(logged) == [(row["step"], row["loss"]) for row in read_rows(folder / "metrics.jsonl")]
    manifest = read_manifest(folder)
    (version,) = client.search_model_versions("name = 'align'")
    assert (version.tags["align.digest"], version.source) == (manifest.digest, str(folder / "artifact"))
    assert finished_run.data.params["stage.max_steps"] == "4"
    input_digests = {entry.dataset.digest for entry in finished_run.inputs.dataset_inputs}
    assert input_digests == {entry.digest[:36] for entry in manifest.inputs.values()}
    assert finished_run.data.metrics["result/loss_after"] == manifest.metrics["loss_after"]


def test_a_service_that_cannot_be_written_to_stops_no_training(shop: Workshop) -> None:
    shop.root.mkdir()
    (shop.root / "mlflow").write_text("a file where a folder belongs")
    folder = shop.run("sft", *SFT)
    assert shop.output.count("track=mlflow is off until this run is started again: FileExistsError") == 1
    assert read_manifest(folder).done


def test_a_run_whose_input_is_refused_is_not_shown(shop: Workshop, tmp_path: Path) -> None:
    rows = tmp_path / "bad.jsonl"
    rows.write_text("no JSON\n" * 9)
    assert shop.status("stage=sft", "data=jsonl", f"data.path={rows}", *SFT) == 2
    assert not (shop.root / "mlflow").exists()
    assert not list(shop.root.glob("sft/*"))
