"""Tasks of lm-eval: their names, and the files that their digest covers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from lm_eval_folder import write_task_folder

from align.core.errors import CorruptFile, InputError
from align.evals.suite.probes import LM_EVAL, HarnessTask, Probe, build_harness_input
from align.evals.suite.tasks import parse_tasks

GIVEN = {"name": "arc", "lm_eval": "arc_easy", "include": "tasks"}
pytest.importorskip("lm_eval")


def compute_digest(folder: Path, task: str = "choose") -> str:
    return build_harness_input(HarnessTask(task, str(folder)), "eval.tasks, arc").digest


def test_a_task_names_one_of_lm_evals() -> None:
    (task,) = parse_tasks([{**GIVEN, "metric": "acc_norm", "prompts": 7}], allow_code=False)
    assert task.probe == Probe(LM_EVAL, harness=HarnessTask("arc_easy", "tasks", "acc_norm"))
    assert (task.has_own_prompts, task.path, task.prompts) == (True, "", 7)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"include": None}, "include"),
        ({"include": ""}, "include"),
        ({"lm_eval": 3}, "lm_eval"),
        ({"metric": ""}, "metric"),
        ({"path": "rows.jsonl"}, "path"),
        ({"probe": "choice"}, "probe"),
        ({"check": {"kind": "regex", "pattern": "a"}}, "check"),
        ({"template": True}, "template"),
        ({"lm_eval": "ifeval"}, "docs/checkers.md"),
        ({"lm_eval": None}, "include"),
    ],
)
def test_a_wrong_one_is_refused_by_its_key(more: Mapping[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_tasks([{**GIVEN, **more}], allow_code=False)


def test_the_digest_covers_the_folder_and_the_data_that_it_names(tmp_path: Path) -> None:
    folder = write_task_folder(tmp_path / "tasks")
    outside_path = tmp_path / "elsewhere.jsonl"
    (folder / "more.jsonl").rename(outside_path)
    (folder / "more.yaml").write_text(
        (folder / "more.yaml").read_text().replace(f"{folder}/more.jsonl", str(outside_path))
    )
    digests = [compute_digest(folder), compute_digest(folder, "more")]
    assert compute_digest(folder) == digests[0]
    for path in (outside_path, folder / "shots.jsonl", folder / "choose.yaml"):
        path.write_text(path.read_text() + "\n")
        digests.append(compute_digest(folder))
    (folder / "utils.py").write_text("a = 1\n")
    digests.append(compute_digest(folder))
    assert len({*digests}) == len(digests)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "utils.pyc").write_bytes(b"a")
    assert compute_digest(folder) == digests[-1]


@pytest.mark.parametrize(
    ("asks", "said"),
    [
        ("dataset_path: allenai/ai2_arc", "names a dataset of a hub"),
        ("group: g\ntask: [{task: t, dataset_path: allenai/ai2_arc}]", "names a dataset of a hub"),
        ("dataset_kwargs: {data_files: {test: there/*.jsonl}}", "is no file"),
        ("dataset_kwargs: {data_files: {}}", "names no file"),
        ("dataset_kwargs: {data_dir: there}", "no digest records"),
        ("custom_dataset: !function utils.rows", "no digest records"),
        ("class: !function task.Mine", "no digest records"),
        ("include: ../other.yaml", "is no YAML file of the folder"),
        ("include: template", "is no YAML file of the folder"),
    ],
)
def test_data_that_no_digest_would_cover_are_refused(asks: str, said: str, tmp_path: Path) -> None:
    folder = write_task_folder(tmp_path / "tasks")
    (folder / "_other_yaml").write_text(asks)
    with pytest.raises(InputError, match=said) as refused:
        compute_digest(folder)
    assert "_other_yaml" in str(refused.value)


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    folder = write_task_folder(tmp_path / "tasks")
    (folder / "choose.yaml").write_text("task: [")
    with pytest.raises(CorruptFile, match=r"choose\.yaml"):
        compute_digest(folder)
    (folder / "choose.yaml").write_text("task: !!python/object/apply:os.getcwd []")
    with pytest.raises(CorruptFile, match=r"choose\.yaml"):
        compute_digest(folder)


def test_without_lm_eval_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"align-rlhf\[evals\]"):
        compute_digest(write_task_folder(tmp_path / "tasks"))


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        compute_digest(tmp_path / "nowhere")
