"""MLflow. Without a server in the environment, it keeps a SQLite store in `mlflow/` of the folder of all runs."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from align.mirrors import Artifact, MirroredRun, MirrorUnsupported, Table, iter_flat_items

ID = "align.id"
"""Tag of an MLflow run with the id of the mirrored run."""
STEP = "align.step"
"""Tag of an MLflow run with its last step."""
DIGEST = "align.digest"
"""Tag of an MLflow model version with the artifact's digest."""
LONGEST = 6000
"""Maximum number of characters of a parameter in MLflow."""
MOST = 100
"""Maximum number of parameters in one call of MLflow."""
DATASET_DIGEST = 36
"""Maximum number of characters of a data set's digest in MLflow."""


def open_run(run: MirroredRun) -> Mlflow:
    return Mlflow(run)


def connect_client(root: Path) -> tuple[Any, str]:
    """Return an MLflow client and the artifact location for new experiments, which is empty if a server decides it.
    Without `MLFLOW_TRACKING_URI` the client writes to a SQLite store in `mlflow/` below `root`, which is created."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # otherwise it reports usage
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # an unreachable server must not delay a run
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # otherwise one for each table
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # the caller reports its failures
    server = os.environ.get("MLFLOW_TRACKING_URI")
    if server:
        return MlflowClient(server, os.environ.get("MLFLOW_REGISTRY_URI")), ""
    folder = root.resolve() / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    store = f"sqlite:///{folder / 'mlflow.db'}"
    return MlflowClient(store, store), str(folder / "artifacts")


class Mlflow:
    """A run at MLflow, written with MlflowClient alone, so that MLflow records neither the command line nor the
    checkout."""

    def __init__(self, run: MirroredRun) -> None:
        self._project = run.project
        self._client, location = connect_client(run.root)
        experiment = self._client.get_experiment_by_name(run.project)
        if experiment:
            experiment_id = experiment.experiment_id
        else:
            experiment_id = self._client.create_experiment(run.project, location or None)
        old_runs = self._client.search_runs([experiment_id], f"tags.`{ID}` = '{run.id}'") if run.resumed else ()
        if old_runs:
            self._id = old_runs[0].info.run_id
            self.last = int(old_runs[0].data.tags.get(STEP, -1))
            self._client.set_terminated(self._id, "RUNNING")
        else:
            self._id = self._client.create_run(experiment_id, run_name=run.ref, tags={ID: run.id}).info.run_id
            self.last = -1
            self._log_settings(run)

    def _log_settings(self, run: MirroredRun) -> None:
        from mlflow.entities import Param

        params = [Param(clean_name(key), str(value)[:LONGEST]) for key, value in iter_flat_items(run.settings)]
        for start in range(0, len(params), MOST):
            self._client.log_batch(self._id, params=params[start : start + MOST])
        self._log_datasets(run.inputs.items())

    def _log_datasets(self, artifacts: Iterable[tuple[str, Artifact]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        rows = []
        for name, artifact in artifacts:
            source = json.dumps({"uri": str(artifact.folder or ""), "digest": artifact.digest})
            dataset = Dataset(artifact.ref or name, artifact.digest[:DATASET_DIGEST], "local", source)
            rows.append(DatasetInput(dataset, [InputTag("mlflow.data.context", name)]))
        if rows:
            self._client.log_inputs(self._id, rows)

    def log(self, step: int, figures: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self._id, make_metrics(figures, step), tags=[RunTag(STEP, str(step))])
        for name, table in tables.items():
            columns = {"step": [step] * len(table.rows)}
            columns |= {column: [row[i] for row in table.rows] for i, column in enumerate(table.columns)}
            self._client.log_table(self._id, columns, f"{name}.json")

    def publish(self, artifact: Artifact) -> None:
        self._client.log_dict(self._id, artifact.metadata, "artifact.json")
        if artifact.kind == "data":
            self._log_datasets([("made", artifact)])
            return
        if not self._client.search_registered_models(f"name = '{self._project}'"):
            self._client.create_registered_model(self._project)
        tags = {DIGEST: artifact.digest, "align.run": artifact.ref}
        tags |= {f"align.{clean_name(key)}": str(value)[:LONGEST] for key, value in iter_flat_items(artifact.facts)}
        source = str(artifact.folder and artifact.folder.resolve())
        self._client.create_model_version(self._project, source, self._id, tags=tags, await_creation_for=0)

    def finish(self, figures: Mapping[str, Any], failed: bool) -> None:
        self._client.log_batch(
            self._id, make_metrics({f"result/{k}": v for k, v in iter_flat_items(figures)}, max(self.last, 0))
        )
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def make_metrics(figures: Mapping[str, Any], step: int) -> list[Any]:
    from mlflow.entities import Metric

    now_ms = int(time.time() * 1000)
    numbers = {clean_name(key): float(value) for key, value in figures.items() if isinstance(value, int | float)}
    return [Metric(name, value, now_ms, step) for name, value in numbers.items()]


def clean_name(key: str) -> str:
    """Return a key with every character that MLflow rejects replaced by `_`, cut to 250 characters."""
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)[:250]


def set_alias(project: str, root: Path, alias: str, artifact: Artifact | None) -> None:
    """Point an alias of the project's registered MLflow model to an artifact's newest version, or remove it if no
    artifact is given. Raises MirrorUnsupported if MLflow does not have the artifact.

    If MLflow lacks the alias's new artifact, the alias is removed, so that it does not refer to the old one.
    """
    client, _ = connect_client(root)
    has_model = bool(client.search_registered_models(f"name = '{project}'"))
    if has_model and artifact:
        versions = client.search_model_versions(f"name = '{project}' and tags.`{DIGEST}` = '{artifact.digest}'")
        if versions:
            newest = max(versions, key=lambda version: int(version.version))
            client.set_registered_model_alias(project, alias, newest.version)
            return
    if has_model:
        client.delete_registered_model_alias(project, alias)
    if artifact is not None:
        raise MirrorUnsupported(f"MLflow does not have {artifact.ref}, which was made without track=mlflow")
