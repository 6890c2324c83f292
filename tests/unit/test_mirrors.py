"""Real services in this process, without a network: they store all that is mirrored, once, and no secret."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from file_search import read_all_text, stop_wandb
from safetensors.numpy import save_file
from synthetic_runs import write_run_folder

from align.__main__ import main
from align.core.redaction import register_secret
from align.mirrors import Artifact, GuardedMirror, MirroredRun, Table, iter_flat_items, open_mirror
from align.run.weights import adapter_digest

pytestmark = pytest.mark.usefixtures("blank_plots")

TOKEN = "hf_" + "pL4nTeDhUb" * 4
GIVEN = "pl4nted-password"
SERVICES = ("wandb", "mlflow", "trackio")
ADAPTER = "ad" * 32


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that trackio writes to: it reads the setting once, at import."""
    if "trackio" in sys.modules:
        return Path(sys.modules["trackio"].TRACKIO_DIR)
    return tmp_path_factory.mktemp("trackio")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, trackio_folder: Path, no_network: None) -> None:
    """Unset all servers, and set a token of the hub, with which trackio would ask the hub for the user's name."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "WANDB_API_KEY", "WANDB_MODE", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(trackio_folder))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(trackio_folder))


def require_service(service: str) -> None:
    pytest.importorskip(service, reason=f"{service} is not installed: pip install 'align-rlhf[{service}]'")


def build_run(root: Path, resumed: bool = False, **more: Any) -> MirroredRun:
    """Build a run in a project named after the test, because all tests share trackio's folder."""
    folder = root / "ppo" / "x y é"
    (folder / "artifact").mkdir(parents=True, exist_ok=True)
    (folder / "artifact" / "adapter_model.safetensors").write_text("weights")
    inputs = {"init": Artifact("sft:s", "init", "5f" * 32, root / "sft/s/artifact", {})}
    config = {"stage": {"name": "ppo", "lr": 0.1}, "seed": 3, **more}
    return MirroredRun(f"p-{root.name}", "ppo:x y é", "1d" * 8, root, folder, config, inputs, resumed)


def build_adapter(root: Path, digest: str = ADAPTER) -> Artifact:
    return Artifact("ppo:x y é", "model", digest, root / "ppo/x y é/artifact", {"base": {"id": "pocket"}})


def build_samples(*answers: str) -> dict[str, Table]:
    return {"samples": Table(["prompt", "answer"], [["Why?", answer] for answer in answers])}


def open_service_mirror(service: str, run: MirroredRun) -> GuardedMirror:
    require_service(service)
    return open_mirror(service, run)


def read_back(service: str, run: MirroredRun) -> dict[str, Any]:
    """Return a service's record of a run: rows as pairs of step and loss, settings, samples, artifacts by alias."""
    return {"mlflow": read_mlflow, "trackio": read_trackio, "wandb": read_wandb}[service](run)


def read_mlflow(run: MirroredRun) -> dict[str, Any]:
    from mlflow import MlflowClient

    store = f"sqlite:///{run.root / 'mlflow/mlflow.db'}"
    client = MlflowClient(store, store)
    experiment = client.get_experiment_by_name(run.project)
    (run_record,) = client.search_runs([experiment.experiment_id])
    loss = client.get_metric_history(run_record.info.run_id, "loss")
    table = [json.loads(path.read_text()) for path in (run.root / "mlflow/artifacts").rglob("samples.json")]
    models = client.search_model_versions(f"name = '{run.project}'")
    return {
        "rows": sorted((entry.step, entry.value) for entry in loss),
        "settings": run_record.data.params,
        "samples": [row[table[0]["columns"].index("answer")] for row in table[0]["data"]],
        "status": run_record.info.status,
        "digests": [entry.tags["align.digest"] for entry in models],
        "source": [entry.source for entry in models],
        "read": [(entry.dataset.name, entry.dataset.digest) for entry in run_record.inputs.dataset_inputs],
        "result": run_record.data.metrics.get("result/win_rate.value"),
    }


def read_trackio(run: MirroredRun) -> dict[str, Any]:
    from trackio import Api, SQLiteStorage

    (run_record,) = Api().runs(run.project)
    logs = SQLiteStorage.get_logs(run.project, run_record.name)
    artifact = SQLiteStorage.get_artifact_manifest(run.project, "models", f"sha256-{ADAPTER[:16]}")
    return {
        "rows": [(row["step"], row["loss"]) for row in logs if "loss" in row],
        "settings": {name: str(value) for name, value in iter_flat_items(run_record.config)},
        "samples": [entry["answer"] for row in logs for entry in row.get("samples", {}).get("_value", [])],
        "digests": [artifact["metadata"]["digest"]] if artifact else [],
        "source": [entry["ref"] for entry in artifact["manifest"]] if artifact else [],
        "result": next((row["result/win_rate.value"] for row in logs if "result/win_rate.value" in row), None),
    }


def read_wandb(run: MirroredRun) -> dict[str, Any]:
    """Return the text of wandb's files, to search in: wandb itself only reads them to send them."""
    stop_wandb()
    files = sorted((run.folder / "wandb").glob("offline-run-*/*.wandb"))
    return {"text": b"\n".join(path.read_bytes() for path in files).decode("latin-1"), "files": files}


@pytest.mark.parametrize("service", SERVICES)
def test_a_run_is_all_there(service: str, tmp_path: Path):
    run = build_run(tmp_path)
    mirror = open_service_mirror(service, run)
    mirror.log(1, {"loss": 0.5, "time/s": 1.0, "text": "no figure"}, build_samples("Because.", "So."))
    mirror.log(2, {"loss": float("nan"), "kl": 1}, {})
    mirror.publish(build_adapter(tmp_path))
    mirror.finish({"win_rate": {"value": 0.75}, "ended_by": "epochs"}, failed=False)
    contents = read_back(service, run)
    if service == "wandb":
        for text in ("no figure", ADAPTER, f"sha256-{ADAPTER[:16]}", "5f" * 32, "p-test_a_run", "ppo/x y", "file://"):
            assert text in contents["text"], text
        assert list((run.folder / "wandb").glob("offline-run-*/files/media/table/samples_*.json"))
        return
    assert contents["rows"][0] == (1, 0.5)
    assert [step for step, _ in contents["rows"]] == [1, 2]
    assert {"stage.lr": "0.1", "inputs.init.digest": "5f" * 32}.items() <= contents["settings"].items()
    assert contents["samples"] == ["Because.", "So."]
    assert (contents["digests"], contents["result"]) == ([ADAPTER], 0.75)
    assert "ppo/x" in contents["source"][0]
    assert service != "mlflow" or (contents["status"], contents["read"]) == ("FINISHED", [("sft:s", "5f" * 18)])


@pytest.mark.parametrize("service", SERVICES)
def test_a_resumed_run_goes_on_and_repeats_no_step(service: str, tmp_path: Path):
    first = open_service_mirror(service, build_run(tmp_path))
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)}, build_samples(f"of {step}") if step == 3 else {})
    if service != "mlflow":  # MLflow writes each call at once, so its process counts as killed
        first.finish({}, failed=True)
    resumed = open_mirror(service, build_run(tmp_path, resumed=True))
    for step in (2, 3, 4):  # the checkpoint is of step 1
        resumed.log(step, {"loss": float(step)}, build_samples(f"of {step}"))
    resumed.finish({}, failed=False)
    run = build_run(tmp_path)
    contents = read_back(service, run)
    if service == "wandb":
        assert len(contents["files"]) == 2
        assert all(run.id in path.name for path in contents["files"])
        tables = [path.read_text() for path in (run.folder / "wandb").glob("offline-run-*/files/media/table/*.json")]
        assert [sum(f"of {step}" in text for text in tables) for step in (2, 3, 4)] == [0, 1, 1]
        return
    assert contents["rows"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert contents["samples"] == ["of 3", "of 4"]


@pytest.mark.parametrize("service", SERVICES)
def test_a_secret_is_in_no_file(service: str, tmp_path: Path, trackio_folder: Path, capfd: pytest.CaptureFixture[str]):
    register_secret(GIVEN)
    run = build_run(tmp_path, store={"url": f"postgresql://u:{GIVEN}@h/d"}, data={"path": f"https://{TOKEN}@h/x.jsonl"})
    run.inputs["data"] = Artifact(f"https://u:{GIVEN}@h/rows", "data", "da" * 32, None, {})  # type: ignore[index]
    mirror = open_service_mirror(service, run)
    mirror.log(1, {"loss": 1.0, "note": f"API_KEY={GIVEN}"}, build_samples(f"my token is {TOKEN}, she said"))
    mirror.publish(Artifact("ppo:x y é", "model", ADAPTER, run.folder / "artifact", {"base": {"id": f"o/{TOKEN}"}}))
    mirror.finish({"ended_by": f"with {GIVEN}"}, failed=False)
    stop_wandb()
    texts = {**read_all_text(tmp_path), **read_all_text(trackio_folder), "said": "".join(capfd.readouterr())}
    assert [name for name, text in texts.items() if TOKEN in text or GIVEN in text] == []
    assert [name for name, text in texts.items() if "she said" in text]  # proves that the search sees the samples


def test_what_a_mirror_fails_at_is_told_once_and_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    mirror = open_service_mirror("mlflow", build_run(tmp_path))
    mirror.log(1, {"loss": 1.0}, build_samples("Because."))
    mirror.log(2, {"loss": 1.0}, build_samples("So."))
    assert capsys.readouterr().err == ""
    with sqlite3.connect(tmp_path / "mlflow/mlflow.db") as store:
        store.execute("DROP TABLE metrics")
    for step in (3, 4):
        mirror.log(step, {"loss": 1.0}, {})
    mirror.publish(build_adapter(tmp_path))
    mirror.finish({}, failed=False)
    stderr = capsys.readouterr().err
    assert stderr.count("track=mlflow is off until this run is started again") == 1
    assert "metrics" in stderr


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_that_cannot_begin_stops_nothing(service: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    require_service(service)
    run = build_run(tmp_path)
    (tmp_path / "mlflow").write_text("a file where a folder belongs")
    (run.folder / "wandb").write_text("the same")
    if service == "trackio":
        os.environ["TRACKIO_DIR"] = str(tmp_path / "another")  # not the folder of this process
    mirror = open_mirror(service, run)
    mirror.log(1, {"loss": 1.0}, {})
    mirror.finish({}, failed=False)
    assert capsys.readouterr().err.count(f"track={service} is off until this run is started again") == 1


@pytest.mark.parametrize("service", SERVICES)
def test_a_missing_package_is_named_before_any_work(
    service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, service, None)  # any import of it fails
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 9)
    overrides = ["stage=sft", "model=pocket", "data=jsonl", f"data.path={rows}", f"run.root={tmp_path / 'runs'}"]
    assert main([*overrides, f"track={service}"]) == 2
    assert f"pip install 'align-rlhf[{service}]'" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/*"))


@pytest.mark.parametrize(
    ("environment", "mode"),
    [({}, "offline"), ({"WANDB_API_KEY": "k"}, "online"), ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline")],
)
def test_wandb_is_online_only_with_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], mode: str
):
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **kwargs: calls.append(kwargs)))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for resumed in (False, True):
        open_mirror("wandb", build_run(tmp_path, resumed)).begin()
    assert [call["mode"] for call in calls] == [mode] * 2
    assert [call["resume"] for call in calls] == [None, "allow" if mode == "online" else None]
    assert (calls[0]["project"], calls[0]["dir"]) == (f"p-{tmp_path.name}", str(tmp_path / "ppo/x y é"))


class TestAliases:
    """Aliases set on the command line, for runs whose artifacts the service has, and for one that it lacks."""

    REFS = ("ppo:a", "ppo:b")

    def run_registry_action(self, root: Path, service: str, action: str, *words: str) -> str:
        line = ["stage=registry", f"stage.action={action}", "stage.alias=production", "stage.why=w", *words]
        assert main([*line, f"run.root={root}", f"track={service}", f"track.project=p-{root.name}"]) == 0
        return self.capsys.readouterr().out

    @pytest.fixture(autouse=True)
    def runs(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        for i, ref in enumerate((*self.REFS, "ppo:unknown")):
            folder = write_run_folder(tmp_path, ref) / "artifact"
            save_file({"x.lora_A.weight": np.full(2, i, np.float32)}, folder / "adapter_model.safetensors")
            write_run_folder(tmp_path, ref, digest=adapter_digest(folder))

    def publish_runs(self, service: str, root: Path) -> MirroredRun:
        run = build_run(root)
        mirror = open_service_mirror(service, run)
        for ref in self.REFS:
            folder = root / ref.replace(":", "/") / "artifact"
            mirror.publish(Artifact(ref, "model", adapter_digest(folder), folder, {}))
        mirror.finish({}, failed=False)
        self.capsys.readouterr()
        return run

    def test_mlflow(self, tmp_path: Path):
        run = self.publish_runs("mlflow", tmp_path)
        from mlflow import MlflowClient

        store = f"sqlite:///{tmp_path / 'mlflow/mlflow.db'}"
        client = MlflowClient(store, store)

        def get_production() -> str | None:
            return client.get_registered_model(run.project).aliases.get("production")

        for ref, version in (("ppo:a", 1), ("ppo:b", 2), ("ppo:a", 1)):
            assert "@production is mirrored" in self.run_registry_action(
                tmp_path, "mlflow", "promote", f"artifact={ref}"
            )
            assert int(get_production() or 0) == version
        assert "@production is mirrored" in self.run_registry_action(tmp_path, "mlflow", "retire")
        assert get_production() is None
        self.run_registry_action(tmp_path, "mlflow", "promote", "artifact=ppo:b")
        assert "does not have ppo:unknown" in self.run_registry_action(
            tmp_path, "mlflow", "promote", "artifact=ppo:unknown"
        )
        assert get_production() is None  # the alias must not stay at the version before
        self.run_registry_action(tmp_path, "mlflow", "promote", "artifact=ppo:b")
        several = self.run_registry_action(tmp_path, "mlflow", "promote", r"stage.arms={ppo\:a: 0.9, ppo\:b: 0.1}")
        assert "no service has an alias of several artifacts" in several
        assert get_production() is None

    def test_trackio(self, tmp_path: Path):
        run = self.publish_runs("trackio", tmp_path)
        from trackio import SQLiteStorage

        for ref in ("ppo:a", "ppo:b", "ppo:a"):  # the last returns to the first
            assert "@production is mirrored" in self.run_registry_action(
                tmp_path, "trackio", "promote", f"artifact={ref}"
            )
            artifact = SQLiteStorage.get_artifact_manifest(run.project, "models", "production")
            assert artifact is not None
            assert artifact["metadata"]["run"] == ref
        assert "cannot remove an alias" in self.run_registry_action(tmp_path, "trackio", "retire")
        assert "does not have ppo:unknown" in self.run_registry_action(
            tmp_path, "trackio", "promote", "artifact=ppo:unknown"
        )

    def test_wandb(self, tmp_path: Path):
        self.publish_runs("wandb", tmp_path)
        assert "@production is mirrored" in self.run_registry_action(tmp_path, "wandb", "promote", "artifact=ppo:a")
        stop_wandb()
        (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
        text = file.read_bytes().decode("latin-1")
        assert all(word in text for word in ("production", adapter_digest(tmp_path / "ppo/a/artifact"), "models"))
        assert "only on its own page" in self.run_registry_action(tmp_path, "wandb", "retire")

    def test_a_service_that_fails_undoes_no_promotion(self, tmp_path: Path):
        require_service("mlflow")
        (tmp_path / "mlflow").write_text("a file where a folder belongs")
        assert "is not mirrored: FileExistsError" in self.run_registry_action(
            tmp_path, "mlflow", "promote", "artifact=ppo:a"
        )
        (line,) = (tmp_path / "aliases.jsonl").read_text().splitlines()
        assert json.loads(line)["alias"] == "production"
