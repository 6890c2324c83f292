"""Judges that are part of a policy's reward are recognised in any spelling, combination and ancestor."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from align.config.scorers import CHOICES, build_reward_spec, parse_reward_part
from align.core.errors import InputError
from align.data.sources import find_rankers
from align.evals.judges.identity import (
    ScorerRelation,
    build_voter_name,
    find_scorer_relation,
    find_voting_parts,
    get_scorer_title,
    list_scorer_parts,
)
from align.reward.inputs import require_matching_reasoning, resolve_reward_inputs
from align.run import Artifact, Base, Input, file_digest, load_artifact, read_manifest
from align.run.manifest import parse_input

BASE = Base("org/tiny", "/models/tiny", None, "b" * 64)
MODEL_A, MODEL_B = ({"ref": f"reward:{name}", "digest": name * 64, "path": f"/r/{name}/artifact"} for name in "ab")
FUNCTION = {"ref": "mine:score", "digest": "f", "defined": ["f:score", "/m/mine.py:score"]}
NO_CODE = {"allow_code": False, "unsafe_code": False}
LENGTH = {"rule": "length", "low": 1, "high": 9}

# Rewards of the configuration, the inputs that their runs record, and the parts that identify each.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "learned": ({"name": "learned", "ref": "reward:a"}, {"reward": MODEL_A}, {"a"}),
    "by path": ({"name": "learned", "ref": "/r/a"}, {"reward": MODEL_A | {"ref": "/r/a"}}, {"a"}),
    "another": ({"name": "learned", "ref": "reward:b"}, {"reward": MODEL_B}, {"b"}),
    "ensemble": (
        {"name": "ensemble", "refs": ["reward:b", "reward:a"]},
        {"reward": MODEL_B, "reward.1": MODEL_A},
        {"a", "b"},
    ),
    "sum": (
        {"name": "sum", "parts": [{"name": "rules", "rules": [LENGTH]}, {"name": "learned", "ref": "reward:a"}]},
        {"reward": MODEL_A},
        {"a", "length"},
    ),
    "nested": (
        {
            "name": "sum",
            "parts": [
                {"name": "ensemble", "refs": ["reward:b", "reward:b"]},
                {"name": "fn", "fn": "mine:score"},
                {"name": "sum", "parts": [{"name": "learned", "ref": "reward:a"}]},
            ],
        },
        {"reward": MODEL_B, "reward.1": MODEL_B, "reward.2": MODEL_A, "reward.fn": FUNCTION},
        {"a", "b", "fn"},
    ),
    "weighs nothing": (
        {
            "name": "sum",
            "parts": [{"name": "learned", "ref": "reward:a", "weight": 0}, {"name": "learned", "ref": "reward:b"}],
        },
        {"reward": MODEL_A, "reward.1": MODEL_B},
        {"b"},
    ),
    "fn": ({"name": "fn", "fn": "mine:score"}, {"reward.fn": FUNCTION}, {"fn"}),
    "fn by another module": (
        {"name": "fn", "fn": "yours:mark"},
        {"reward.fn": FUNCTION | {"ref": "yours:mark", "digest": "y"}},
        {"fn"},
    ),
    "fn of an edited file": (
        {"name": "fn", "fn": "pkg.mine:score"},
        {"reward.fn": {"ref": "pkg.mine:score", "digest": "g", "defined": ["g:score", "/m/mine.py:score"]}},
        {"fn"},
    ),
    "other fn": (
        {"name": "fn", "fn": "mine:other"},
        {"reward.fn": {"ref": "mine:other", "digest": "f", "defined": ["f:other", "/m/mine.py:other"]}},
        {"other"},
    ),
    "rules": ({"name": "rules", "rules": [{"rule": "sentiment"}, LENGTH]}, {}, {"vader", "length"}),
    "another range": ({"name": "rules", "rules": [LENGTH | {"high": 30}]}, {}, {"length"}),
    "regex": ({"name": "rules", "rules": [{"rule": "regex", "pattern": "a"}]}, {}, {"regex a"}),
    "another regex": ({"name": "rules", "rules": [{"rule": "regex", "pattern": "b"}]}, {}, {"regex b"}),
    "json": ({"name": "rules", "rules": [{"rule": "json"}]}, {}, {"json"}),
    "sentiment": ({"name": "sentiment"}, {}, {"vader"}),
    "check": ({"name": "check", "check": None, "score": "all", **NO_CODE}, {}, {"check"}),
    "check of all rows": (
        {"name": "check", "check": {"kind": "regex", "pattern": "a"}, "score": "parts", **NO_CODE},
        {},
        {"check"},
    ),
    "sentiment in a sum": (
        {"name": "sum", "parts": [{"name": "rules", "rules": [{"rule": "sentiment"}]}]},
        {},
        {"vader"},
    ),
}


def list_parts(kind: str) -> set[str]:
    config, inputs, _ = KINDS[kind]
    return list_scorer_parts(config, parse_inputs(inputs))


def parse_inputs(inputs: Mapping[str, Any]) -> dict[str, Input]:
    return {name: parse_input(record, Path()) for name, record in inputs.items()}


def write_run(
    root: Path,
    stage: str,
    name: str,
    inputs: Mapping[str, Any],
    reward: Any = None,
    metrics: Any = None,
    base: Any = None,
    reasoning: str = "keep",
) -> dict[str, Any]:
    """Write a finished run's manifest and weights, and return the input record that a later run has of it."""
    folder = root / stage / name
    (folder / "artifact").mkdir(parents=True)
    config = {
        "reward": reward or {"name": "learned", "ref": "reward:latest"},
        "data": {"reasoning": reasoning},
        "method": {},
    }
    manifest = {
        "schema_version": 2,
        "status": "done",
        "stage": stage,
        "name": name,
        "inputs": dict(inputs),
        "config": config,
        "identity": {"config": config, "inputs": {}},
        "metrics": metrics or {},
        "base": base,
        "outputs": {},
        "hardware": {},
        "times": {"finished": "2026-01-01T00:00:00.000000+00:00"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "artifact" / "adapter_model.safetensors").write_text(str(folder))
    return {
        "ref": f"{stage}/{name}",
        "path": str(folder / "artifact"),
        "digest": load_artifact(folder, name).digest,
        "whole": False,
        "stage": stage,
        "name": name,
    }


def build_artifact(record: Mapping[str, Any]) -> Artifact:
    folder = Path(record["path"])
    return Artifact(record["ref"], folder, record["digest"], BASE, False, read_manifest(folder.parent))


def test_the_run_that_ranked_winners_is_known_from_copies_in_folders_and_patterns(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    write_run(root, "sample", "best", {"reward": MODEL_A}, KINDS["learned"][0])
    run = root / "sample" / "best"
    winners = run / "artifact" / "winners.jsonl"
    winners.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"]["stage"] = {"best_of": 4}
    manifest["outputs"] = {"artifact/winners.jsonl": file_digest(winners)}
    (run / "manifest.json").write_text(json.dumps(manifest))
    copies = tmp_path / "copies"
    copies.mkdir()
    shutil.copy(winners, copies / "a-part.jsonl")
    (copies / "b-part.jsonl").write_text(json.dumps({"prompt": "c", "completion": "d"}) + "\n")
    for path in (copies, copies / "*-part.jsonl"):
        assert find_rankers(Input("d" * 64, path=str(path)), root) == ("sample:best",)
    for path in ("chitchat", copies / "b-part.jsonl", copies / "b-*"):
        assert find_rankers(Input("d" * 64, path=str(path)), root) == ()


def test_every_kind_of_reward_is_here() -> None:
    assert {config["name"] for config, _, _ in KINDS.values()} == CHOICES.keys()


@pytest.mark.parametrize(("reward", "judge"), list(product(KINDS, KINDS)))
def test_a_judge_with_a_part_of_the_reward_is_a_proxy(tmp_path: Path, reward: str, judge: str) -> None:
    config, inputs, counts = KINDS[reward]
    trained = write_run(tmp_path, "ppo", "p", inputs, config)
    relation = find_scorer_relation(build_artifact(trained), list_parts(judge), tmp_path)
    assert relation.proxy == (("ppo:p",) if counts & KINDS[judge][2] else ())
    assert relation.role == ("proxy" if relation.proxy else "gold")


def test_a_proxy_is_refused_unless_asked_for() -> None:
    with pytest.raises(InputError, match=r"ppo:p, which was optimised against it") as error:
        ScorerRelation(proxy=("ppo:p",)).require_independent("vader", "ppo:p", False)
    assert "stage.allow_proxy=true" in error.value.remedy
    ScorerRelation(proxy=("ppo:p",)).require_independent("vader", "ppo:p", True)
    ScorerRelation(votes=("reward:a",), unknown=("sft:s",)).require_independent("vader", "ppo:p", False)


def test_what_a_policy_came_through_counts(tmp_path: Path) -> None:
    """After ppo on rules, a dpo run, an export and a ppo run on a model are optimised against the rules too."""
    rules, inputs, _ = KINDS["rules"]
    first = write_run(tmp_path, "ppo", "first", inputs, rules)
    second = write_run(tmp_path, "dpo", "second", {"init": first})
    exported = write_run(tmp_path, "export", "out", {"artifact": second})
    last = write_run(tmp_path, "ppo", "last", {"init": exported, "reward": MODEL_A}, KINDS["learned"][0])
    assert find_scorer_relation(build_artifact(last), list_parts("sentiment"), tmp_path).proxy == ("ppo:first",)
    assert find_scorer_relation(build_artifact(last), list_parts("learned"), tmp_path).proxy == ("ppo:last",)
    assert find_scorer_relation(build_artifact(last), list_parts("another"), tmp_path) == ScorerRelation()


def test_who_ranked_what_a_policy_was_trained_on_is_a_proxy(tmp_path: Path) -> None:
    """A policy that imitates the model's choice of answers of a policy of PPO on rules is optimised against both."""
    optimised = write_run(tmp_path, "ppo", "p", {}, KINDS["rules"][0])
    write_run(tmp_path, "sample", "best", {"init": optimised, "reward": MODEL_A}, KINDS["learned"][0])
    rows = {"digest": "w" * 64, "path": "winners.jsonl", "ranked_by": ["sample:best"]}
    imitates = write_run(tmp_path, "sft", "s", {"data": rows})
    policy = build_artifact(write_run(tmp_path, "dpo", "d", {"init": imitates}))
    for judge, proxy in (("learned", ("sft:s",)), ("sentiment", ("ppo:p",)), ("another", ()), ("json", ())):
        assert find_scorer_relation(policy, list_parts(judge), tmp_path).proxy == proxy, judge
    shutil.rmtree(tmp_path / "sample")
    relation = find_scorer_relation(policy, list_parts("learned"), tmp_path)
    assert (relation.proxy, relation.unknown) == ((), ("sample:best",))


def test_who_ranked_pairs_without_noise_is_not_called_noisy(tmp_path: Path) -> None:
    write_run(tmp_path, "sample", "best", {}, KINDS["sentiment"][0])
    rows = {"digest": "w" * 64, "path": "pairs.jsonl", "ranked_by": ["sample:best"]}
    policy = build_artifact(write_run(tmp_path, "dpo", "d", {"data": rows}, metrics={"simulated_by": ["vader"]}))
    assert find_scorer_relation(policy, list_parts("sentiment"), tmp_path) == ScorerRelation(proxy=("dpo:d",))


def test_a_base_that_a_run_made_counts(tmp_path: Path) -> None:
    full_model = write_run(tmp_path, "ppo", "whole", {}, KINDS["sentiment"][0])
    base = {"id": "x", "path": full_model["path"], "revision": None, "digest": full_model["digest"]}
    adapter = write_run(tmp_path, "sft", "s", {"base": {"id": "x", "digest": full_model["digest"]}}, base=base)
    assert find_scorer_relation(build_artifact(adapter), list_parts("rules"), tmp_path).proxy == ("ppo:whole",)
    own_base = {**base, "path": str(tmp_path / "ppo" / "own" / "artifact")}
    policy = write_run(tmp_path, "ppo", "own", {}, KINDS["json"][0], base=own_base)  # a whole model is its own base
    assert find_scorer_relation(build_artifact(policy), list_parts("json"), tmp_path).proxy == ("ppo:own",)


def test_a_reward_model_that_came_from_an_optimised_policy_is_no_policy(tmp_path: Path) -> None:
    """The policy was optimised against the reward model, not against the reward of its backbone."""
    optimised = write_run(tmp_path, "ppo", "before", {}, KINDS["sentiment"][0])
    reward = write_run(tmp_path, "reward", "r", {"init": optimised})
    policy = write_run(tmp_path, "ppo", "p", {"reward": reward}, {"name": "learned", "ref": "reward:r"})
    assert find_scorer_relation(build_artifact(policy), list_parts("sentiment"), tmp_path).proxy == ()


def test_noisy_votes_leave_a_judge_a_judge(tmp_path: Path) -> None:
    reward = write_run(tmp_path, "reward", "r", {}, metrics={"simulated_by": ["vader"]})
    policy = write_run(tmp_path, "ppo", "p", {"reward": reward}, {"name": "learned", "ref": "reward:r"})
    relation = find_scorer_relation(build_artifact(policy), list_parts("sentiment"), tmp_path)
    assert (relation, relation.role) == (ScorerRelation(votes=("reward:r",)), "gold")
    assert relation.describe("vader") == [
        "vader also ranked, as a simulated annotator with noise, the pairs that reward:r learned from"
    ]
    assert find_scorer_relation(build_artifact(policy), list_parts("json"), tmp_path) == ScorerRelation()
    direct = write_run(tmp_path, "dpo", "d", {}, metrics={"simulated_by": ["vader"]})
    assert find_scorer_relation(build_artifact(direct), list_parts("sentiment"), tmp_path) == ScorerRelation(
        votes=("dpo:d",)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_votes_name_the_parts_of_the_reward_that_made_them(kind: str) -> None:
    config, inputs, _ = KINDS[kind]
    name = build_voter_name(config, parse_inputs(inputs))
    listed = find_voting_parts(list_parts(kind), name)
    assert listed == ({f"function {name}"} if config["name"] == "fn" else list_parts(kind))
    for other in KINDS:
        assert find_voting_parts(list_parts(other), name) == listed & list_parts(other), other


def test_a_judge_of_a_function_knows_its_votes(tmp_path: Path) -> None:
    policy = write_run(tmp_path, "dpo", "d", {}, metrics={"simulated_by": ["tastes:short", "json; 0a1b2c3d"]})
    for part in ("function tastes:short", "json"):
        assert find_scorer_relation(build_artifact(policy), {part}, tmp_path).votes == ("dpo:d",)
    assert find_scorer_relation(build_artifact(policy), {"function tastes:shorter"}, tmp_path) == ScorerRelation()


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_a_judge_of_the_very_pairs_that_a_policy_learned_from_is_no_stranger(tmp_path: Path, stage: str) -> None:
    shared_data = {"digest": "p" * 64, "path": "pairs.jsonl"}
    other_data = {"digest": "o" * 64, "path": "others.jsonl"}
    judge, other_judge = (
        write_run(tmp_path, "reward", name, {"data": data}) for name, data in (("r", shared_data), ("s", other_data))
    )
    direct = write_run(tmp_path, stage, "d", {"data": shared_data})
    policy = build_artifact(write_run(tmp_path, "ppo", "p", {"init": direct}, {"name": "sentiment"}))
    relation = find_scorer_relation(policy, list_parts("another"), tmp_path, [build_artifact(judge)])
    assert (relation, relation.role) == (ScorerRelation(pairs=(f"{stage}:d",)), "gold")
    assert relation.describe("reward:r") == [
        f"reward:r learned from the same pairs as {stage}:d, so it tends to prefer what they prefer"
    ]
    assert (
        find_scorer_relation(policy, list_parts("another"), tmp_path, [build_artifact(other_judge)]) == ScorerRelation()
    )


def test_a_reward_model_of_answers_alone_reads_no_reasoning(tmp_path: Path) -> None:
    without_reasoning, with_reasoning = (
        build_artifact(write_run(tmp_path, "reward", name, {}, reasoning=name)) for name in ("hide", "keep")
    )
    bare = Artifact("hub:org/x", tmp_path, "d", BASE, False)
    # Pairs of answers alone have no reasoning.
    require_matching_reasoning([without_reasoning, with_reasoning, bare], "hide")
    require_matching_reasoning([with_reasoning, bare], "keep")
    with pytest.raises(
        InputError, match=r"^rollout\.reasoning=keep: reward/hide was trained on answers without"
    ) as error:
        require_matching_reasoning([with_reasoning, without_reasoning], "keep")
    assert "rollout.reasoning=hide" in error.value.remedy


def test_what_is_gone_is_said(tmp_path: Path) -> None:
    first = write_run(tmp_path / "old", "ppo", "first", {}, KINDS["sentiment"][0])
    last = write_run(tmp_path / "old", "ppo", "last", {"init": first, "reward": MODEL_A}, KINDS["learned"][0])
    (tmp_path / "old").rename(tmp_path / "new")  # the runs are found by the new root
    moved = last | {"path": last["path"].replace("/old/", "/new/")}
    assert find_scorer_relation(build_artifact(moved), list_parts("sentiment"), tmp_path / "new").proxy == (
        "ppo:first",
    )
    relation = find_scorer_relation(build_artifact(moved), list_parts("sentiment"), tmp_path / "elsewhere")
    assert relation == ScorerRelation(unknown=("ppo:first",))
    assert "ppo:first" in relation.describe("vader")[0]
    bare = Artifact("hub:org/x", tmp_path, "d", BASE, False)
    assert find_scorer_relation(bare, list_parts("sentiment"), tmp_path) == ScorerRelation(unknown=("hub:org/x",))


def test_runs_of_one_name_in_several_roots_are_several(tmp_path: Path) -> None:
    """Each policy started from the policy of the same name in the previous root."""
    init: dict[str, Any] = {}
    for root, kind in (("a", "json"), ("b", "regex"), ("c", "another regex")):
        last = write_run(tmp_path / root, "ppo", "x", init, KINDS[kind][0])
        init = {"init": last}
    relation = find_scorer_relation(build_artifact(last), list_parts("json"), tmp_path / "c")
    assert relation.proxy == ("ppo:x",)
    assert find_scorer_relation(build_artifact(last), list_parts("sentiment"), tmp_path / "c") == ScorerRelation()
    shutil.rmtree(tmp_path / "b")
    relation_without_b = find_scorer_relation(build_artifact(last), list_parts("json"), tmp_path / "c")
    assert relation_without_b.unknown == ("ppo:x",)


def test_a_function_is_known_by_where_it_is_defined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scores_here.py").write_text(
        "import functools\n\ndef score(found):\n    return [1.0 for _ in found]\n\nalias = score\n\n"
        "@functools.wraps(score)\ndef wrapped(found):\n    return score(found)\n\n"
        "def other(found):\n    return [2.0 for _ in found]\n\n"
        "class Scale:\n    def __call__(self, found):\n        return [3.0 for _ in found]\n\nscale = Scale()\n"
        "part = functools.partial(score)\nbound = functools.partial(print, score)\n"
        "others = functools.partial(other)\n"
        "def deco(inner):\n    def made(found):\n        return inner(found)\n    return made\n"
        "decorated = deco(score)\ndecorated_other = deco(other)\n"
    )
    (tmp_path / "scores_there.py").write_text("from scores_here import score as mark, other, scale\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def list_function_parts(spec: str) -> set[str]:
        config = parse_reward_part("reward", {"name": "fn", "fn": spec})
        return list_scorer_parts(
            {"name": "fn", "fn": spec}, resolve_reward_inputs(build_reward_spec(config), tmp_path, BASE)
        )

    names = ("score", "alias", "wrapped", "part", "bound", "decorated")
    equal_specs = [*(f"scores_here:{name}" for name in names), "scores_there:mark"]
    assert all(
        list_function_parts(first) & list_function_parts(second) for first, second in product(equal_specs, equal_specs)
    )
    assert not any(list_function_parts(spec) & list_function_parts("scores_here:other") for spec in equal_specs)
    different_specs = [f"scores_here:{name}" for name in ("other", "others", "decorated_other", "scale")]
    assert not any(
        list_function_parts(first) & list_function_parts(second)
        for first, second in product(equal_specs, different_specs)
    )
    assert (
        list_function_parts("scores_there:other")
        & list_function_parts("scores_here:others")
        & list_function_parts("scores_here:decorated_other")
    )
    assert list_function_parts("scores_there:scale") & list_function_parts("scores_here:scale")
    assert not list_function_parts("scores_there:scale") & list_function_parts("scores_here:other")
    for module in ("scores_here", "scores_there"):
        sys.modules.pop(module)


@pytest.mark.parametrize("kind", KINDS)
def test_a_judge_has_a_name(kind: str) -> None:
    config, inputs, _ = KINDS[kind]
    name = get_scorer_title(config, parse_inputs(inputs))
    assert {"sentiment": "vader", "learned": "reward:a", "by path": "/r/a", "fn": "mine:score"}.get(kind, name) == name
    assert name
