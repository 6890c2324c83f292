"""Who may judge a policy: a scorer that it was optimised against measures how well that went, and not how good it is.

A scorer is known by what it is and not by how it is written: a reward model by the digest of its weights, a function by
the file that defines it, a rule by its name. A combination is its parts. (Gao, Schulman and Hilton, "Scaling laws for
reward model overoptimization", 2022, call the optimised reward the *proxy* and the one that judges it *gold*.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.root import RewardConfig
from align.config.scorers import (
    EnsembleReward,
    FunctionReward,
    LearnedReward,
    RulesReward,
    SentimentReward,
    SumReward,
    part_of,
    parts_of,
)
from align.errors import InputError
from align.run import Artifact, artifact_in, read_manifest
from reward.rules import Sentiment

Manifest = Mapping[str, Any]
POLICY = ("init", "artifact")
"""The inputs of a run that its policy came from: what it started from, or what it exports."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a judge is to the policy that it judges.

    Attributes:
        proxy: the runs in which the policy, or what it came from, was optimised against the judge or a part of it.
        votes: the runs that learned from pairs which the judge, or a part of it, ranked with noise.
        unknown: what the lineage names and is no longer there, so that nobody can tell.
    """

    proxy: tuple[str, ...] = ()
    votes: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def role(self) -> str:
        """What its scores are called."""
        return "proxy" if self.proxy else "gold"

    def sentences(self, judge: str) -> list[str]:
        """What a report says of it."""
        notes = []
        if self.proxy:
            runs = ", ".join(self.proxy)
            notes.append(
                f"{judge} is a proxy: {runs} was optimised against it, and its score is no evidence of quality"
            )
        if self.votes:
            runs = ", ".join(self.votes)
            notes.append(
                f"{judge} also ranked, as a simulated annotator with noise, the pairs that {runs} learned from"
            )
        if self.unknown:
            gone = ", ".join(self.unknown)
            notes.append(f"how {gone} was trained is not known here, and whether {judge} had a part in it")
        return notes


def standing_of(policy: Artifact, judge: set[str], root: Path) -> Standing:
    """What a judge is to a policy, by the manifests of the runs that it came through.

    Args:
        judge: what `identities` says of it.
        root: the folder of runs, for parents that moved together with it.
    """
    proxy, votes, unknown = [], [], []
    for manifest in (found for found in ancestry(policy, root, POLICY) if not isinstance(found, str)):
        config = manifest["identity"]["config"]
        if manifest["stage"] == "ppo" and identities(part_of("reward", config["reward"]), manifest["inputs"]) & judge:
            proxy.append(run_name(manifest))
    for found in ancestry(policy, root):
        if isinstance(found, str):
            unknown.append(found)
        elif judge & set(found.get("metrics", {}).get("simulated_by", ())):
            votes.append(run_name(found))
    return Standing(*(tuple(dict.fromkeys(names)) for names in (proxy, votes, unknown)))


def independent(of: Standing, judge: str, policy: str, allow_proxy: bool) -> None:
    """Raise where a policy would be judged by what it was optimised against, and nobody asked for that.

    Raises:
        InputError: names the runs.
    """
    if of.proxy and not allow_proxy:
        raise InputError(
            "reward", judge, f"{policy} came through {', '.join(of.proxy)}, which was optimised against it",
            "Judge by another scorer (reward=fn reward.fn=package.module:name), or add stage.allow_proxy=true: its "
            "score is then called a proxy.",
        )  # fmt: skip


def ancestry(policy: Artifact, root: Path, through: Sequence[str] | None = None) -> Iterator[Manifest | str]:
    """The manifests of a policy's run and of those that it came through, each once; in place of one that is gone, its
    name.

    Args:
        through: the inputs to follow, besides the base where a run made that; all of them unless told.
    """
    seen: set[Any] = set()

    def walk(manifest: Manifest) -> Iterator[Manifest | str]:
        yield manifest
        for key, record in manifest["inputs"].items():
            if "path" not in record or "stage" not in record or (through is not None and key not in through):
                continue
            yield from parent(record)
        made = Path((manifest.get("base") or {}).get("path", "")).parent
        if (made / "manifest.json").is_file() and made not in seen:
            seen.add(made)
            yield from walk(read_manifest(made))

    def parent(record: Mapping[str, Any]) -> Iterator[Manifest | str]:
        whole_name = record["stage"], record["name"]
        if (place := (*whole_name, record["path"], record["digest"])) in seen:
            return
        seen.add(place)
        then, now = Path(record["path"]).parent, root / record["stage"] / record["name"]
        for folder in (then, now):
            if (folder / "manifest.json").is_file():
                manifest = read_manifest(folder)
                same = folder == then or artifact_in(folder, str(folder), verify=False).digest == record["digest"]
                if same and (manifest["stage"], manifest["name"]) == whole_name:
                    yield from walk(manifest)
                    return
        yield ":".join(whole_name)

    if policy.manifest:
        yield from walk(policy.manifest)
    else:
        yield policy.ref


def run_name(manifest: Manifest) -> str:
    return f"{manifest['stage']}:{manifest['name']}"


def identities(config: RewardConfig, inputs: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """What a reward is made of, whatever it is called: one text for each model, function and rule that counts.

    Args:
        inputs: of the run that has it, where `align.stages.scoring.records` wrote down its models and functions.
    """
    models, functions = iter(numbered(inputs, "reward")), iter(numbered(inputs, "reward.fn"))

    def walk(part: RewardConfig) -> Iterator[str]:
        match part:
            case LearnedReward():
                yield f"model {next(models)['digest']}"
            case EnsembleReward():
                yield from (f"model {next(models)['digest']}" for _ in part.refs)
            case FunctionReward():
                yield from of_function(next(functions))
            case SentimentReward():
                yield Sentiment.name
            case RulesReward():
                yield from (of_rule(rule) for rule in part.rules if rule.get("weight", 1.0))
            case SumReward():
                for weight, inner in parts_of(part):
                    found = list(walk(inner))  # whatever it weighs, its models are the next ones
                    yield from found if weight else ()

    return set(walk(config))


def numbered(inputs: Mapping[str, Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """The inputs `name`, `name.1`, `name.2`, … in order."""
    found = {(key.removeprefix(name).removeprefix(".") or "0"): key for key in inputs if key.startswith(name)}
    return [inputs[found[n]] for n in sorted(filter(str.isdigit, found), key=int)]


def of_rule(rule: Mapping[str, Any]) -> str:
    """A rule by its name, and by the pattern or tags that make it another. Not by a range of lengths: what is optimised
    for one range is optimised in what another range measures."""
    if rule["rule"] == "sentiment":
        return Sentiment.name
    return f"rule {' '.join(str(rule[key]) for key in ('rule', 'pattern', 'tags') if key in rule)}"


def of_function(record: Mapping[str, Any]) -> set[str]:
    """A function by how it was named, and by where it and what it is made of are defined."""
    return {f"function {name}" for name in (record["ref"], *record.get("defined", ()))}


def title(config: RewardConfig, inputs: Mapping[str, Mapping[str, Any]]) -> str:
    """A judge's name for people."""
    refs = [str(record["ref"]) for name, record in inputs.items() if name.startswith("reward")]
    match config:
        case SentimentReward():
            return Sentiment.name
        case LearnedReward() | FunctionReward():
            return refs[0]
        case RulesReward():
            return f"rules ({', '.join(str(rule['rule']) for rule in config.rules)})"
    return f"{config.name} ({', '.join(refs) or 'rules'})"
