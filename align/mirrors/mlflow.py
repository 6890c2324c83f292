"""MLflow. Where the environment names no server it keeps a SQLite store in `mlflow/` of the folder of all runs."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from align.mirrors import Artifact, Table, Unmirrored, Watched, flat

ID, STEP, DIGEST = "align.id", "align.step", "align.digest"
"""Tags that a run and a version of a model are found again by."""
LONGEST, MOST = 6000, 100
"""What MLflow takes: characters of a parameter, parameters in one call."""
DATASET_DIGEST = 36


def opened(run: Watched) -> Mlflow:
    return Mlflow(run)


def client_of(root: Path) -> tuple[Any, str]:
    """A client of the store, and where the files of a new experiment go; a server knows that itself."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it counts its users otherwise
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a server that is away must not hold a run up
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # it shows one for each table
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # what it fails at is told by whoever calls
    server = os.environ.get("MLFLOW_TRACKING_URI")
    if server:
        return MlflowClient(server, os.environ.get("MLFLOW_REGISTRY_URI")), ""
    folder = root.resolve() / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    store = f"sqlite:///{folder / 'mlflow.db'}"
    return MlflowClient(store, store), str(folder / "artifacts")


class Mlflow:
    """A run at MLflow, by a client of its own: nothing of MLflow's looks at the command line or at the checkout."""

    def __init__(self, run: Watched) -> None:
        self._project = run.project
        self._client, place = client_of(run.root)
        found = self._client.get_experiment_by_name(run.project)
        experiment = found.experiment_id if found else self._client.create_experiment(run.project, place or None)
        before = self._client.search_runs([experiment], f"tags.`{ID}` = '{run.id}'") if run.resumed else ()
        if before:
            self._id, self.last = before[0].info.run_id, int(before[0].data.tags.get(STEP, -1))
            self._client.set_terminated(self._id, "RUNNING")
        else:
            made = self._client.create_run(experiment, run_name=run.ref, tags={ID: run.id})
            self._id, self.last = made.info.run_id, -1
            self._tell(run)

    def _tell(self, run: Watched) -> None:
        from mlflow.entities import Param

        given = [Param(name_of(key), str(value)[:LONGEST]) for key, value in flat(run.settings)]
        for start in range(0, len(given), MOST):
            self._client.log_batch(self._id, params=given[start : start + MOST])
        self._datasets(run.inputs.items())

    def _datasets(self, given: Iterable[tuple[str, Artifact]]) -> None:
        """What the run read or made, as MLflow lists it: a name, a place and as much of a digest as it takes."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        rows = []
        for name, one in given:
            source = json.dumps({"uri": str(one.folder or ""), "digest": one.digest})
            tags = [InputTag("mlflow.data.context", name)]
            rows.append(DatasetInput(Dataset(one.ref or name, one.digest[:DATASET_DIGEST], "local", source), tags))
        if rows:
            self._client.log_inputs(self._id, rows)

    def log(self, step: int, figures: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self._id, metrics_of(figures, step), tags=[RunTag(STEP, str(step))])
        for name, table in tables.items():
            columns = {"step": [step] * len(table.rows)}
            columns |= {column: [row[i] for row in table.rows] for i, column in enumerate(table.columns)}
            self._client.log_table(self._id, columns, f"{name}.json")

    def publish(self, artifact: Artifact) -> None:
        self._client.log_dict(self._id, artifact.metadata, "artifact.json")
        if artifact.kind == "data":
            self._datasets([("made", artifact)])
            return
        if not self._client.search_registered_models(f"name = '{self._project}'"):
            self._client.create_registered_model(self._project)
        tags = {DIGEST: artifact.digest, "align.run": artifact.ref}
        tags |= {f"align.{name_of(key)}": str(value)[:LONGEST] for key, value in flat(artifact.facts)}
        where = str(artifact.folder and artifact.folder.resolve())
        self._client.create_model_version(self._project, where, self._id, tags=tags, await_creation_for=0)

    def finish(self, figures: Mapping[str, Any], failed: bool) -> None:
        self._client.log_batch(self._id, metrics_of({f"result/{k}": v for k, v in flat(figures)}, max(self.last, 0)))
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def metrics_of(figures: Mapping[str, Any], step: int) -> list[Any]:
    from mlflow.entities import Metric

    at = int(time.time() * 1000)
    numbers = {name_of(k): float(v) for k, v in figures.items() if isinstance(v, int | float)}
    return [Metric(name, value, at, step) for name, value in numbers.items()]


def name_of(key: str) -> str:
    """A key as MLflow takes it."""
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)[:250]


def named(project: str, root: Path, alias: str, artifact: Artifact | None) -> None:
    """The alias of a registered model: the project's, whose versions are what runs published. It is taken away where
    MLflow does not have what the alias means now: the version before would pass for it."""
    client, _ = client_of(root)
    known = bool(client.search_registered_models(f"name = '{project}'"))
    wanted = known and artifact and f"name = '{project}' and tags.`{DIGEST}` = '{artifact.digest}'"
    found = client.search_model_versions(wanted) if wanted else []
    if found:
        client.set_registered_model_alias(project, alias, max(found, key=lambda one: int(one.version)).version)
        return
    if known:
        client.delete_registered_model_alias(project, alias)
    if artifact is not None:
        raise Unmirrored(f"MLflow does not have {artifact.ref}, which was made without track=mlflow")
