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

from align.core.errors import InputError
from align.data.sources import RANKED_BY
from align.reward.rules import Sentiment
from align.run import Artifact, Input, Manifest
from align.run.artifacts import readable
from align.run.lineage import Gone, ancestors

POLICY = ("init", "artifact")
"""The inputs of a run that its policy came from: what it started from, or what it exports."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a judge is to the policy that it judges.

    Attributes:
        proxy: the runs in which the policy, or what it came from, was optimised against the judge or a part of it: by
            PPO, or by training on answers that it ranked (best-of-n).
        votes: the runs that learned from pairs which the judge, or a part of it, ranked with noise.
        unknown: what the lineage names and is no longer there, so that nobody can tell.
        pairs: the runs of DPO and KTO that learned from the very pairs that the judge learned from.
    """

    proxy: tuple[str, ...] = ()
    votes: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()

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
        if self.pairs:
            notes.append(f"{judge} learned from the same pairs as {', '.join(self.pairs)}, and likes what they like")
        if self.unknown:
            gone = ", ".join(self.unknown)
            notes.append(f"how {gone} was trained is not known here, and whether {judge} had a part in it")
        return notes


def standing_of(policy: Artifact, judge: set[str], root: Path, models: Sequence[Artifact] = ()) -> Standing:
    """What a judge is to a policy, by the manifests of the runs that it came through.

    Args:
        judge: what `identities` says of it.
        root: the folder of runs, for parents that moved together with it.
        models: the reward models in it.
    """
    taught = {m.manifest.inputs["data"].digest for m in models if m.manifest and "data" in m.manifest.inputs}
    proxy, votes, unknown, pairs = [], [], [], []
    if policy.manifest is None:
        return Standing(unknown=(policy.ref,))
    for ref, by in optimised(policy.manifest, root):
        if isinstance(by, Gone):
            unknown.append(by.ref)
        elif identities(by.config["reward"], by.inputs) & judge:
            proxy.append(ref)
    for found in ancestors(policy.manifest, root, POLICY):
        if isinstance(found, Gone):
            continue
        if found.stage in ("dpo", "kto") and "data" in found.inputs and found.inputs["data"].digest in taught:
            pairs.append(found.ref)
    for found in ancestors(policy.manifest, root):
        if isinstance(found, Gone):
            unknown.append(found.ref)
        elif judge & set(found.metrics.get("simulated_by", ())) and found.ref not in proxy:
            votes.append(found.ref)
    return Standing(*(tuple(dict.fromkeys(names)) for names in (proxy, votes, unknown, pairs)))


def optimised(manifest: Manifest, root: Path) -> Iterator[tuple[str, Manifest | Gone]]:
    """The runs in which a policy, or what it came from, was optimised against a reward, each with the run that had this
    reward: itself, where it is PPO; of a run that was trained on answers which best-of-n ranked, the run of
    `stage=sample`, and whatever the policy that gave these answers was optimised against."""
    for found in ancestors(manifest, root, POLICY):
        if isinstance(found, Gone):
            continue
        if found.stage == "ppo":
            yield found.ref, found
        rows = found.inputs.get("data")
        for ref in rows.details.get(RANKED_BY, ()) if rows else ():
            stage, _, name = str(ref).partition(":")
            ranker = readable(root / stage / name)
            yield found.ref, ranker or Gone(str(ref), "")
            if ranker:
                yield from optimised(ranker, root)


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


def identities(reward: Mapping[str, Any], inputs: Mapping[str, Input]) -> set[str]:
    """What a reward is made of, whatever it is called: one text for each model, function and rule that counts.

    Args:
        reward: the group `reward` of a configuration, as a manifest has it.
        inputs: of the run that has it: the reward's models and functions, in the order of the configuration.
    """
    models, functions = iter(numbered(inputs, "reward")), iter(numbered(inputs, "reward.fn"))

    def walk(part: Mapping[str, Any]) -> Iterator[str]:
        match part["name"]:
            case "learned":
                yield f"model {next(models).digest}"
            case "ensemble":
                yield from (f"model {next(models).digest}" for _ in part["refs"])
            case "fn":
                yield from of_function(next(functions))
            case "sentiment":
                yield Sentiment.name
            case "check":
                yield "check"  # whatever it asks: the rows say that
            case "rules":
                yield from (of_rule(rule) for rule in part["rules"] if rule.get("weight", 1.0))
            case "sum":
                for inner in part["parts"]:
                    found = list(walk(inner))  # whatever it weighs, its models are the next ones
                    yield from found if inner.get("weight", 1.0) else ()
            case other:
                raise ValueError(f"no reward is called {other}")

    return set(walk(reward))


def numbered(inputs: Mapping[str, Input], name: str) -> list[Input]:
    """The inputs `name`, `name.1`, `name.2`, … in order."""
    found = {(key.removeprefix(name).removeprefix(".") or "0"): key for key in inputs if key.startswith(name)}
    return [inputs[found[n]] for n in sorted(filter(str.isdigit, found), key=int)]


def of_rule(rule: Mapping[str, Any]) -> str:
    """A rule by its name, and by the pattern or tags that make it another. Not by a range of lengths: what is optimised
    for one range is optimised in what another range measures."""
    if rule["rule"] == "sentiment":
        return Sentiment.name
    return f"rule {' '.join(str(rule[key]) for key in ('rule', 'pattern', 'tags') if key in rule)}"


def of_function(read: Input) -> set[str]:
    """A function by how it was named, and by where it and what it is made of are defined."""
    return {f"function {name}" for name in (read.ref, *read.details.get("defined", ()))}


def title(reward: Mapping[str, Any], inputs: Mapping[str, Input]) -> str:
    """A judge's name for people. The arguments are those of `identities`."""
    refs = [read.ref for name, read in inputs.items() if name.startswith("reward")]
    match reward["name"]:
        case "sentiment":
            return Sentiment.name
        case "check":
            return "the checks of the rows"
        case "learned" | "fn":
            return refs[0]
        case "rules":
            return f"rules ({', '.join(str(rule['rule']) for rule in reward['rules'])})"
    return f"{reward['name']} ({', '.join(refs) or 'rules'})"
