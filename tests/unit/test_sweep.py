"""Sweeps by `-m`: the jobs of a command line in Hydra's grammar and order, their names, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from align.config import compose as composing
from align.config.compose import Composer, build_config, compose_tree
from align.config.root import to_plain_dict
from align.config.sweep import Job, build_jobs
from align.config.values import parse_plain_value
from align.core.errors import InputError
from align.core.redaction import mask_argument


def compose_jobs(*words: str, search: Path | None = None) -> list[Job]:
    return build_jobs(words, Composer(search))


def catch_refusal(*words: str, search: Path | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        compose_jobs(*words, search=search)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "words",
    [
        "stage=sft stage.lr=1e-4,2e-4 seed=range(0,3)",
        "seed=range(0,3) stage=sft stage.lr=1e-4,2e-4",
        "stage=sft method=lora,qlora seed=choice(3,1,2) stage.packing=true,false",
        "stage=sft seed=sort(3,1,2) stage.lr=range(1,2,0.25)",
        "stage=sft seed=1,2 stage.lr=1,2 seed=3,4",
        "stage=sft seed=1,2 stage.lr=1,2 seed=3",
        "stage=sft seed=3 stage.lr=1,2 seed=1,2",
        "stage=sft seed=tag(a,choice(1,2)) dtype='float32','bfloat16'",
        "stage=sft,full,dpo model=pocket data=jsonl data.path='a,b','c' seed=1,1",
        "stage=sft",
    ],
)
def test_jobs_and_their_order_are_those_of_hydras_basic_sweeper(words: str):
    overrides = OverridesParser.create().parse_overrides(words.split())
    theirs = [dict(w.split("=", 1) for w in job) for job in BasicSweeper.split_arguments(overrides, None)[0]]
    ours = [dict(w.split("=", 1) for w in job.words) for job in compose_jobs(*words.split())]
    parsed = [[{k: parse_plain_value(v) for k, v in job.items()} for job in jobs] for jobs in (ours, theirs)]
    assert parsed[0] == parsed[1]


def test_a_value_is_what_was_typed():
    words = ("stage=sft", "model=hub", "model.path=org/a,hub:org/b", "model.revision=12e4567,007", "stage.lr=1e-4, 3")
    assert [job.swept for job in compose_jobs(*words)][:3] == [
        {"model.path": "org/a", "model.revision": "12e4567", "stage.lr": "1e-4"},
        {"model.path": "org/a", "model.revision": "12e4567", "stage.lr": "3"},
        {"model.path": "org/a", "model.revision": "007", "stage.lr": "1e-4"},
    ]
    assert [job.config.model.revision for job in compose_jobs(*words)][:3] == ["12e4567", "12e4567", "007"]


@pytest.mark.parametrize(
    ("value", "paths"),
    [
        ("'a,b.jsonl','c d.jsonl'", ["a,b.jsonl", "c d.jsonl"]),
        ('"it\'s.jsonl",b.jsonl', ["it's.jsonl", "b.jsonl"]),
        (r"'it\'s, (é).jsonl','~/b'", ["it's, (é).jsonl", "~/b"]),
        ("'a,b.jsonl'", ["a,b.jsonl"]),
        ("my chats (v2).jsonl", ["my chats (v2).jsonl"]),
        ("choice('a,b',c)", ["a,b", "c"]),
    ],
)
def test_texts_with_commas_and_quotes(value: str, paths: list[str]):
    jobs = compose_jobs("stage=sft", "model=pocket", "data=jsonl", f"data.path={value}")
    assert [job.config.data.path for job in jobs] == paths
    assert [build_config(compose_tree(job.words)).data.path for job in jobs] == paths


MANY = (
    "stage=sft,ppo",
    "method=lora",
    "data.template_kwargs={a: 1},{b: 2},{a: 3}",
    "+experiment=one,two",
    "dtype=float32",
)


def test_each_job_is_what_its_own_command_line_makes(tmp_path: Path):
    """No value of one job remains in the next, even if a key holds a mapping, or if choices and experiments change
    from job to job."""
    write_experiment(tmp_path, "one", "stage:\n  lr: 1e-5\nmethod:\n  r: 4\n")
    write_experiment(tmp_path, "two", "defaults:\n  - override /model: pocket\n")
    jobs = compose_jobs(*MANY, search=tmp_path)
    assert len(jobs) == 12
    for job in jobs:
        assert to_plain_dict(build_config(compose_tree(job.words, tmp_path))) == to_plain_dict(job.config), job.words


def test_many_jobs_are_composed_once(monkeypatch: pytest.MonkeyPatch):
    """Hydra composes once, which takes 0.1 s. Setting and checking the swept values takes 3 ms for each job."""
    calls = []
    compose_groups = composing.compose_groups
    monkeypatch.setattr(composing, "compose_groups", lambda *args: calls.append(args) or compose_groups(*args))
    jobs = compose_jobs("stage=sft", "seed=range(0,50)", "stage.lr=1e-4,2e-4", "method.r=8,16")
    assert (len(jobs), jobs[-1].config.seed, jobs[-1].config.method.r) == (200, 49, 16)
    assert len({(job.config.seed, job.config.stage.lr, job.config.method.r) for job in jobs}) == 200
    assert len(calls) <= 2


@pytest.mark.parametrize(
    ("words", "field", "value", "said"),
    [
        ("seed=range(3,0)", "seed", "range(3,0)", "is a sweep over nothing"),
        ("method=glob(zz*)", "method", "glob(zz*)", "is a sweep over nothing"),
        ("seed=choice()", "seed", "choice()", "cannot be read as a sweep"),
        ("seed=interval(0,1)", "seed", "interval(0,1)", "has no end of values"),
        ("data.path=~/a,b", "data.path", "~/a,b", "cannot be read as a sweep. Write data.path=choice(A,B), texts in"),
        ("seed=range(0,1000000000)", "seed", "range(0,1000000000)", "makes more than 10000 jobs"),
        ("seed=range(0,200) stage.lr=range(1,100)", "seed", "range(0,200) stage.lr=range(1,100)", "more than 10000"),
        ("seed=1,-1", "seed", -1, "is not from 0 to 4294967295 (job 2 of 2; nothing was run). Give a number"),
        ("seed=1,2 stage.lr=1,x", "stage.lr", "x", "is not a number (job 2 of 4; nothing was run)"),
        ("method=lora,qlor", "method", "qlor", "Did you mean method=qlora?"),
        ("stage=sft,sftt", "stage", "sftt", "Did you mean stage=sft?"),
        ("nokey=1,2", "nokey", "1", "is not a key"),
        ("é=1,2", "é", "1,2", "is not a key"),
        ("hello", "argument", "hello", "is not of the form key=value. Write for example"),
        ("seed=-1", "seed", -1, "is not from 0 to 4294967295. Give a number"),
    ],
)
def test_what_is_refused(words: str, field: str, value: object, said: str):
    error = catch_refusal("stage=sft", *words.split())
    assert (error.field, error.value) == (field, value)
    assert said in str(error)


# --- Names


def test_a_name_that_jobs_would_share_gets_what_was_swept():
    words = ("stage=sft", "run.name=mine", "model=pocket", "data=jsonl", "data.path='a/b','c d'", "method=lora,qlora")
    names = ["mine-path=a_b-method=lora", "mine-path=a_b-method=qlora", "mine-path=c d-method=lora"]
    jobs = compose_jobs(*words)
    assert [job.config.run.name for job in jobs][:3] == names
    assert [build_config(compose_tree(job.words)).run.name for job in jobs][:3] == names


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("run.name=mine", ["mine"]),
        ("run.name=mine seed=7,7", ["mine-seed=7", "mine-seed=7"]),
        ("seed=1,2", [None, None]),
        ("run.name=a,b", ["a", "b"]),
        ("run.name=mine-${seed} seed=1,2", ["mine-1", "mine-2"]),
        ("run.name=mine stage=sft,full", ["mine", "mine"]),
        ("run.name=mine run.root=a,b", ["mine", "mine"]),
        ("run.name=a,b seed=1,2", ["a-seed=1", "a-seed=2", "b-seed=1", "b-seed=2"]),
        ("run.name=mine seed=1,2 seed=3", ["mine"]),
    ],
)
def test_names(words: str, names: list[str | None]):
    assert [job.config.run.name for job in compose_jobs("stage=sft", *words.split())] == names


def test_names_that_cannot_be_told_apart():
    error = catch_refusal("stage=sft", "model=pocket", "data=jsonl", "run.name=x", "data.path=a/b,a_b")
    assert (error.field, error.value) == ("run.name", "x-path=a_b")
    assert "Leave run.name out, or write into it what differs: 'run.name=mine-${seed}'" in str(error)
    long = "a" * 190
    assert "is too long" in str(catch_refusal("stage=sft", f"run.name={long}", "project=default,another-one"))


def test_no_name_holds_a_password():
    urls = ",".join(f"'postgresql://u:hunter2@{host}/x'" for host in "ab")
    jobs = compose_jobs("stage=sft", "run.name=x", f"store.url={urls}")
    assert [job.config.run.name for job in jobs] == [f"x-url=postgresql:__u:***@{host}_x" for host in "ab"]
    error = catch_refusal(
        "stage=sft", "run.name=x", "store.url='postgresql://u:hunter2@h/x','postgresql://u:hunter3@h/x'"
    )
    assert "hunter" not in str(error)


def test_no_name_of_a_run_or_job_holds_the_name_of_a_person():
    jobs = compose_jobs("stage=reward", "run.name=x", "data=annotations", "data.exclude_annotators=[ann],[bob]")
    assert [job.config.run.name for job in jobs] == ["x-exclude_annotators=1", "x-exclude_annotators=2"]
    assert [job.config.data.exclude_annotators for job in jobs] == [["ann"], ["bob"]]
    assert "ann" not in " ".join(map(mask_argument, jobs[0].own)).replace("annotators", "")


# --- Sweeps in group files


def write_experiment(folder: Path, name: str, text: str) -> None:
    path = folder / "experiment" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# @package _global_\n{text}", encoding="utf-8")


def test_sweeps_of_an_experiment(tmp_path: Path):
    write_experiment(
        tmp_path,
        "grid",
        "defaults:\n  - override /stage: sft\n"
        "hydra:\n  sweeper:\n    params:\n      stage.lr: 1e-4,2e-4\n      seed: range(0,2)\n      method.r: 4\n",
    )
    jobs = compose_jobs("+experiment=grid", search=tmp_path)
    assert [(j.config.stage.lr, j.config.seed, j.config.method.r) for j in jobs] == [
        (1e-4, 0, 4),
        (1e-4, 1, 4),
        (2e-4, 0, 4),
        (2e-4, 1, 4),
    ]
    jobs = compose_jobs("+experiment=grid", "seed=7", "stage.epochs=1,2", search=tmp_path)
    assert [(j.config.stage.lr, j.config.seed, j.config.stage.epochs) for j in jobs] == [
        (1e-4, 7, 1),
        (1e-4, 7, 2),
        (2e-4, 7, 1),
        (2e-4, 7, 2),
    ]
    single_config = build_config(compose_tree(["+experiment=grid"], tmp_path))  # without -m it is one run
    assert (single_config.stage.lr, single_config.seed) == (None, 0)  # the run takes the rate of its base


def test_experiments_are_swept_over(tmp_path: Path):
    for name in ("small", "large", "other"):
        write_experiment(tmp_path, name, f"method:\n  r: {len(name)}\n")
    jobs = compose_jobs("stage=sft", "+experiment=glob([l*,s*])", search=tmp_path)
    assert [job.swept for job in jobs] == [{"+experiment": "large"}, {"+experiment": "small"}]
    write_experiment(tmp_path, "slow", "stage:\n  lr: 1e-6\n")  # a key of every stage in the sweep
    jobs = compose_jobs(
        "stage=sft,dpo", "+experiment=slow", "model=pocket", "data=jsonl", "data.path=a", search=tmp_path
    )
    assert [(job.config.stage.name, job.config.stage.lr) for job in jobs] == [("sft", 1e-6), ("dpo", 1e-6)]
