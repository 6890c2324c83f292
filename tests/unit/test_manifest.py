"""Manifests: writing and reading them, the identity of a run, and the runs that it descends from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_folders import BASE, load_manifest, open_run, publish_run

from align.config.compose import build_config, compose_tree
from align.config.groups import KEYS_LEFT_OUT_IF_UNSET
from align.config.identity import list_input_names, select_identity
from align.config.root import to_plain_dict
from align.config.schemas import import_all_schemas
from align.config.stages import STAGES
from align.core.errors import CorruptFile, InputError, RunConflict
from align.run import Base, Input, Run, load_artifact, read_manifest, verify_outputs
from align.run.environment import code_digest
from align.run.lineage import GoneRun, iter_ancestors, list_training_steps
from align.run.manifest import FILE, Manifest, compute_identity, write_manifest

CONFIG = {"data": {"name": "jsonl"}, "method": {"name": "lora"}, "seed": 3}
FULL = Manifest(
    "ppo",
    "x",
    3,
    CONFIG,
    {
        "init": Input("d", "sft:latest", "/elsewhere/sft/s/artifact", "sft", "s", False),
        "data": Input("e", project="p", seq=7),
        "reward.fn": Input("f", "mine:score", details={"defined": ["f:score"]}),
        "file": Input("g", path="relative/a.jsonl"),
    },
    Base("org/m", "/models/m", "abc", "b"),
    "done",
    {"artifact/a": "1"},
    "2",
    {"kl": 1.5},
    {"started": "a", "finished": "b"},
    4,
    "",
    "c",
    {"commit": "1"},
    {"torch": "2"},
    {"device": "cpu"},
)


def compose_plain_config(*words: str) -> dict[str, Any]:
    return to_plain_dict(build_config(compose_tree(words, user_config_dir=Path("nowhere"))))


# --- The record


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "ppo" / "x"
    folder.mkdir(parents=True)
    for manifest in (FULL, replace(FULL, base=None, error="ValueError: x", status="failed", git=None)):
        write_manifest(folder, manifest)
        assert read_manifest(folder) == manifest


def test_paths_below_the_root_move_with_it(tmp_path: Path) -> None:
    old_root = tmp_path / "here"
    new_root = tmp_path / "there"
    (old_root / "ppo" / "x").mkdir(parents=True)
    init = Input("d", "sft:s", str(old_root / "sft" / "s" / "artifact"), "sft", "s", False)
    base = Base("x", str(old_root / "full" / "m" / "artifact"), None, "b")
    write_manifest(old_root / "ppo" / "x", replace(FULL, inputs={**FULL.inputs, "init": init}, base=base))
    raw = load_manifest(old_root / "ppo" / "x")
    assert (raw["inputs"]["init"]["path"], raw["base"]["path"]) == ("<root>/sft/s/artifact", "<root>/full/m/artifact")
    old_root.rename(new_root)
    manifest = read_manifest(new_root / "ppo" / "x")
    assert manifest.inputs["init"].path == str(new_root / "sft" / "s" / "artifact")
    assert manifest.base is not None
    assert manifest.base.path == str(new_root / "full" / "m" / "artifact")
    assert manifest.inputs["file"].path == "relative/a.jsonl"


ODD = [None, 0, -1, 1.5, "", "text", [], ["a"], {}, {"a": 1}, True]


def list_leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    inner = (
        [leaf for key, v in value.items() for leaf in list_leaves(v, (*path, key))] if isinstance(value, dict) else []
    )
    return [path, *inner] if path else inner


def test_whatever_stands_in_a_manifest_it_is_read_or_refused(tmp_path: Path) -> None:
    """Every key of a real manifest is removed, and replaced by a value of each kind."""
    folder = publish_run(tmp_path, "x")
    good = load_manifest(folder)
    refused = read = 0
    for path in list_leaves(good):
        for odd in (..., *ODD):
            changed = json.loads(json.dumps(good))
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            if odd is ...:
                del parent[path[-1]]
            else:
                parent[path[-1]] = odd
            (folder / FILE).write_text(json.dumps(changed))
            try:
                read_manifest(folder).as_json(tmp_path)
                read += 1
            except (CorruptFile, InputError):  # any other error fails the test
                refused += 1
    assert refused > 100
    assert read > 100


# --- Identity


SERVERS = {f"rollout.{key}" for key in ("python", "urls", "replicas", "args", "start_s", "max_gap")}
HOW = {"stage.engine", "stage.workers", "stage.ray", "eval.name", *SERVERS}
"""Settings of how a run is computed, and the name of an evaluation: its result does not depend on them."""


@pytest.mark.parametrize("stage", STAGES)
def test_a_part_that_the_stage_does_not_read_makes_no_other_run(stage: str) -> None:
    """Every leaf of the configuration is changed. The identity changes if the stage's `reads` lists its group."""
    reads = {"stage", "seed", "device", "dtype", "schema_version", *STAGES[stage].reads}
    overrides = {"data": ["stage.sources=[a.jsonl]"], "sample": ["stage.best_of=4"]}
    config = compose_plain_config(f"stage={stage}", *overrides.get(stage, []))
    before = select_identity(stage, config, ())
    for path in list_leaves(config):
        changed = json.loads(json.dumps(config))
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = "another"
        is_read = path[0] in reads and ".".join(path) not in HOW
        assert (select_identity(stage, changed, ()) != before) == is_read, path


def test_a_selection_of_votes_and_soft_labels_make_another_run_and_their_absence_none() -> None:
    words = ("stage=reward", "data=annotations")
    identity = select_identity("reward", compose_plain_config(*words), ())
    assert not {*KEYS_LEFT_OUT_IF_UNSET} & {*identity["data"]}
    choices = (
        "data.annotators=[ann]",
        "data.exclude_annotators=[ann]",
        "data.min_gold_accuracy=0.5",
        "data.soft_labels=true",
    )
    for choice in choices:
        assert select_identity("reward", compose_plain_config(*words, choice), ()) != identity


def test_answers_for_people_are_the_same_run_whatever_the_reward() -> None:
    identities = [
        select_identity("sample", compose_plain_config("stage=sample", f"reward={name}"), ())
        for name in ("learned", "sentiment")
    ]
    assert identities[0] == identities[1]
    assert "reward" not in identities[0]


def test_the_name_of_an_input_makes_no_other_run_and_its_digest_does(tmp_path: Path) -> None:
    names = {
        "data.path": "data",
        "data.eval_path": "eval_data",
        "init": "init",
        "artifact": "artifact",
        "reward.ref": "reward",
        "reward.refs": "reward",
        "model.path": "base",
        "model.revision": "base",
        "export.sign": "signer",
        "export.verify": "signer",
    }
    assert list_input_names() == names
    config = compose_plain_config("stage=ppo", "data=jsonl", "data.path=a.jsonl", "init=sft:latest", "model=pocket")
    respelled = compose_plain_config(
        "stage=ppo", "data=jsonl", "data.path=./a.jsonl", "init=sft:s", "reward.ref=reward:r"
    )
    inputs = {"data": Input("1"), "init": Input("2"), "reward": Input("3")}
    identity = compute_identity("ppo", config, inputs, BASE)
    assert compute_identity("ppo", respelled, inputs, BASE) == identity
    for name in inputs:
        assert compute_identity("ppo", config, inputs | {name: Input("x")}, BASE) != identity
    assert compute_identity("ppo", config, inputs, replace(BASE, digest="x")) != identity
    # Names of inputs that were not resolved stay in the identity as they are spelled.
    assert compute_identity("ppo", config, {}, None) != compute_identity("ppo", respelled, {}, None)


def test_one_run_by_two_spellings_and_an_unrelated_group(tmp_path: Path) -> None:
    with open_run(tmp_path, data={"name": "jsonl", "path": "a.jsonl"}, export={"name": "merged"}) as run:
        run.begin("a: 1\n")
        run.publish({})
    with open_run(tmp_path, data={"name": "jsonl", "path": "../here/a.jsonl"}, export={"name": "adapter"}) as reopened:
        assert (reopened.folder, reopened.done) == (run.folder, True)
    with open_run(tmp_path, run.name, method={"name": "qlora"}) as reopened:
        assert reopened.done
    with pytest.raises(RunConflict, match=r"method\.name"):
        open_run(tmp_path, run.name, method={"name": "lora"})


# --- The files of a done run


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "samples.jsonl", "report.html"])
def test_a_file_beside_the_artifact_that_was_changed_is_found_out(tmp_path: Path, name: str) -> None:
    with open_run(tmp_path, "x") as run:
        run.begin("a: 1\n")
        for name_beside in ("metrics.jsonl", "samples.jsonl", "report.html"):
            (run.folder / name_beside).write_text("{}\n")
        run.publish({})
    verify_outputs(run.folder, read_manifest(run.folder).outputs)
    (run.folder / name).write_text("changed")
    with pytest.raises(CorruptFile, match="sha256 differs"):
        verify_outputs(run.folder, read_manifest(run.folder).outputs)


def test_a_run_names_the_code_that_made_it(tmp_path: Path) -> None:
    manifest = read_manifest(publish_run(tmp_path, "x"))
    assert manifest.code == code_digest()
    assert len(manifest.code) == 64
    assert manifest.digest == load_artifact(tmp_path / "sft" / "x", "x").digest


# --- The graph


def publish_child(root: Path, name: str, parent: Path, stage: str = "ppo") -> Path:
    """Publish a run that starts from another run. Returns its folder."""
    init = load_artifact(parent, f"{parent.parent.name}:{parent.name}").as_input()
    with open_run(root, name, inputs={"init": init}, stage={"name": stage}) as run:
        run.begin("a: 1\n")
        (run.artifact / "adapter_config.json").write_text("{}")
        (run.artifact / "adapter_model.safetensors").write_text(name)
        run.publish({})
    return run.folder


def list_ancestor_refs(folder: Path, root: Path) -> list[str]:
    ancestors = iter_ancestors(read_manifest(folder), root)
    return [f"{'gone ' if isinstance(ancestor, GoneRun) else ''}{ancestor.ref}" for ancestor in ancestors]


def test_parents_are_found_by_digest_wherever_they_are(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    first = publish_run(root, "s")
    last = publish_child(root, "b", publish_child(root, "a", first))
    assert list_ancestor_refs(last, root) == ["ppo:b", "ppo:a", "sft:s"]
    # The folder of all runs was moved.
    moved = tmp_path / "moved"
    root.rename(moved)
    last = moved / "ppo" / "b"
    assert list_ancestor_refs(last, moved) == ["ppo:b", "ppo:a", "sft:s"]
    # A run's folder was renamed: it is found by its digest. Its manifest still has the old name.
    (moved / "sft" / "s").rename(moved / "sft" / "renamed")
    assert list_ancestor_refs(last, moved) == ["ppo:b", "ppo:a", "sft:s"]
    # Another run has the name now: it is not the parent, and the parent is listed as gone.
    shutil.rmtree(moved / "sft" / "renamed")
    publish_run(moved, "s", weights="other")
    assert list_ancestor_refs(last, moved) == ["ppo:b", "ppo:a", "gone sft:s"]
    shutil.rmtree(moved / "ppo" / "a")
    assert list_ancestor_refs(last, moved) == ["ppo:b", "gone ppo:a"]
    steps = list_training_steps(read_manifest(last), "d", moved)
    assert [(step.stage, step.name) for step in steps] == [("ppo", "a"), ("ppo", "b")]


def test_a_model_that_a_run_made_is_a_parent_too(tmp_path: Path) -> None:
    with open_run(tmp_path, "m", stage={"name": "full"}) as run:
        run.begin("a: 1\n")
        (run.artifact / "config.json").write_text('{"model_type": "llama"}')
        (run.artifact / "adapter_config.json").write_text("{}")
        run.publish({})
    base = Base(str(run.artifact), str(run.artifact), None, read_manifest(run.folder).digest)
    last = publish_run(tmp_path, "s", base=base)
    assert list_ancestor_refs(last, tmp_path) == ["sft:s", "full:m"]
    # A file of the base was edited after it was published, and a run started from the edited base.
    (run.artifact / "adapter_config.json").write_text('{"edited": true}')
    edited_digest = load_artifact(run.folder, "full:m", verify=False).digest
    assert edited_digest != base.digest
    last = publish_run(tmp_path, "edited", base=replace(base, digest=edited_digest))
    assert list_ancestor_refs(last, tmp_path) == ["sft:edited", "full:m"]


def test_a_base_is_known_by_its_digest_and_a_run_that_made_one_and_is_gone_is_said_to_be(tmp_path: Path) -> None:
    def publish_model(name: str, weights: str) -> Path:
        with open_run(tmp_path / "runs", name, stage={"name": "full"}) as run:
            run.begin("a: 1\n")
            (run.artifact / "adapter_config.json").write_text(weights)
            run.publish({})
        return run.folder

    root = tmp_path / "runs"
    model_run = publish_model("m", "{}")
    base = Base("m", str(model_run / "artifact"), None, read_manifest(model_run).digest)
    last = publish_run(root, "s", base=base)
    assert list_ancestor_refs(last, root) == ["sft:s", "full:m"]
    assert [step.name for step in list_training_steps(read_manifest(last), "d", root)] == ["m", "s"]
    copied = publish_run(root, "c", base=replace(base, path="/models/elsewhere"))
    assert list_ancestor_refs(copied, root) == ["sft:c", "full:m"]
    shutil.rmtree(model_run)
    publish_model("m", "[]")  # another model of the same name and path
    assert list_ancestor_refs(last, root) == ["sft:s", "gone full:m"]
    assert [step.name for step in list_training_steps(read_manifest(last), "d", root)] == ["m", "s"]
    assert list_ancestor_refs(copied, root) == ["sft:c"]  # no manifest names the run that made the base


def test_what_cannot_be_read_is_passed_over_and_what_is_not_done_is_no_parent(tmp_path: Path) -> None:
    last = publish_child(tmp_path, "b", publish_run(tmp_path, "s"))
    (tmp_path / "sft" / "stranger").mkdir()
    (tmp_path / "sft" / "stranger" / FILE).write_text("{}")
    shutil.rmtree(tmp_path / "sft" / "s")
    assert list_ancestor_refs(last, tmp_path) == ["ppo:b", "gone sft:s"]
    with open_run(tmp_path, "s", seed=4) as run:
        run.begin("a: 1\n")
        assert list_ancestor_refs(last, tmp_path) == ["ppo:b", "gone sft:s"]


def test_the_template_beside_an_adapter_makes_another_run(tmp_path: Path) -> None:
    folder = publish_run(tmp_path, "s")
    (folder / "artifact" / "chat_template.jinja").write_text("a")
    first = load_artifact(folder, "sft:s", verify=False).as_input()
    (folder / "artifact" / "chat_template.jinja").write_text("b")
    second = load_artifact(folder, "sft:s", verify=False).as_input()
    assert first.digest == second.digest
    assert first.tokenizer != second.tokenizer
    config = compose_plain_config("stage=sample")
    assert compute_identity("sample", config, {"init": first}, BASE) != compute_identity(
        "sample", config, {"init": second}, BASE
    )


def test_the_spelling_of_a_base_makes_no_second_folder(tmp_path: Path) -> None:
    values = {"data": {"name": "jsonl"}, "method": {"name": "qlora"}, "stage": {"name": "sft"}, "seed": 0}
    config = {**values, "run": {"root": str(tmp_path), "name": None}}
    with Run.open(config, {}, BASE, "tiny-qlora") as run:
        run.begin("a: 1\n")
        run.publish({})
    with Run.open(config, {}, replace(BASE, id="same", path="/same"), "same-qlora") as reopened:
        assert (reopened.folder, reopened.done) == (run.folder, True)


def test_the_names_in_a_sum_of_rewards_make_no_other_run() -> None:
    parts = ("reward=sum", "reward.parts=[{name:learned,ref:%s},{name:rules,rules:[{rule:json}]}]")
    first, second = (
        compose_plain_config("stage=ppo", parts[0], parts[1] % ref) for ref in ("reward:latest", "reward:r")
    )
    inputs = {"reward": Input("1")}
    assert compute_identity("ppo", first, inputs, BASE) == compute_identity("ppo", second, inputs, BASE)
    assert compute_identity("ppo", first, {}, BASE) != compute_identity("ppo", second, {}, BASE)


def test_every_stage_has_a_schema() -> None:
    assert {*import_all_schemas()["stage"], "full"} == {*STAGES}
