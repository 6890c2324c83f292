"""The identity of a judge: the settings and weights that can change its verdicts, and its part in a policy's training.

A report is about one judge, and a gate checks that its judge is the same one. A scorer that a policy was optimised
against measures how well that worked, and not how good the policy is. Names and paths of files are not part of an
identity: a reward model is identified by the digest of its weights, a function by the digests of the files that define
it, a rule by its name. (Gao, Schulman and Hilton, "Scaling laws for reward model overoptimization", 2022, call the
optimised reward the *proxy* and the one that judges it *gold*.) Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.errors import require
from align.data.sources import RANKED_BY
from align.evals.text import quote_beginning
from align.report.figure_text import flatten_metrics
from align.reward.rules import Sentiment
from align.run import Artifact, Input, Manifest, json_digest
from align.run.artifacts import try_read_manifest
from align.run.lineage import GoneRun, iter_ancestors

POLICY = ("init", "artifact")
"""Names of the inputs of a run that its policy came from: `init` starts a training, `artifact` is exported."""
IGNORED = ("ref", "refs", "fn", "timeout")
"""Keys of a reward's configuration that are left out of its identity, because they name input files or do not change a
verdict."""
ASKS = "asks"
"""Key of `JudgeIdentity.made_of` that holds the yes/no question."""
SEPARATOR = "; "
"""Separates the parts of a reward in the name that votes have for it."""
SHA256 = re.compile(r"[0-9a-f]{64}:")


# Scorers


def list_numbered_inputs(inputs: Mapping[str, Input], name: str) -> list[Input]:
    """Return a run's inputs `name`, `name.1`, `name.2`, … in the order of their numbers."""
    keys = {(key.removeprefix(name).removeprefix(".") or "0"): key for key in inputs if key.startswith(name)}
    return [inputs[keys[number]] for number in sorted(filter(str.isdigit, keys), key=int)]


def get_scorer_title(reward: Mapping[str, Any], inputs: Mapping[str, Input]) -> str:
    """Return the display name of a reward function or reward model that is used as a judge. The arguments are as in
    `list_scorer_parts`."""
    refs = [scorer.ref for name, scorer in inputs.items() if name.startswith("reward")]
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


def list_scorer_parts(reward: Mapping[str, Any], inputs: Mapping[str, Input]) -> set[str]:
    """Return a set with one text, such as `model <digest>`, for each reward model, function and rule in a reward
    configuration. Two rewards with a text in common overlap. Members of a sum and rules with weight 0 are left out.

    A rule is identified by its name, with its pattern or tags. A range of lengths is left out: optimising for one range
    also optimises what another range measures.

    Args:
        reward: the group `reward` of a configuration, as in a manifest.
        inputs: of the run with this configuration: the reward's models and functions, in the order of the
            configuration.
    """
    models = iter(list_numbered_inputs(inputs, "reward"))
    functions = iter(list_numbered_inputs(inputs, "reward.fn"))

    def list_parts(part: Mapping[str, Any]) -> Iterator[str]:
        match part["name"]:
            case "learned":
                yield f"model {next(models).digest}"
            case "ensemble":
                yield from (f"model {next(models).digest}" for _ in part["refs"])
            case "fn":
                function = next(functions)
                yield from (f"function {name}" for name in (function.ref, *function.details.get("defined", ())))
            case "sentiment":
                yield Sentiment.name
            case "check":
                yield "check"  # the rows say what it asks
            case "rules":
                for rule in part["rules"]:
                    if rule.get("weight", 1.0):
                        names = " ".join(str(rule[key]) for key in ("rule", "pattern", "tags") if key in rule)
                        yield Sentiment.name if rule["rule"] == "sentiment" else f"rule {names}"
            case "sum":
                for inner in part["parts"]:
                    inner_parts = list(list_parts(inner))  # also of one without a weight, which has inputs too
                    yield from inner_parts if inner.get("weight", 1.0) else ()
            case other:
                raise ValueError(f"no reward is called {other}")

    return set(list_parts(reward))


def build_voter_name(reward: Mapping[str, Any], inputs: Mapping[str, Input]) -> str:
    """Return the name of a reward in the votes of a simulated annotator: the parts of `list_scorer_parts`, joined.

    Unless it is the sentiment score or a single function, a digest of its settings and inputs follows.

    Args:
        reward, inputs: as in `list_scorer_parts`.
    """
    if reward["name"] == "fn":
        return inputs["reward.fn"].ref
    parts = sorted(list_scorer_parts(reward, inputs))
    if reward["name"] != "sentiment":
        parts.append(identify_scorer(reward, inputs).digest[:8])
    return SEPARATOR.join(parts)


def find_voting_parts(parts: set[str], voter_name: str) -> set[str]:
    """Return the parts of a scorer that the name of a reward in votes lists.

    Args:
        parts: of the scorer, see `list_scorer_parts`.
        voter_name: see `build_voter_name`.
    """
    listed = SEPARATOR.join(("", voter_name, f"function {voter_name}", ""))
    return {part for part in parts if f"{SEPARATOR}{part}{SEPARATOR}" in listed}


# Identities


@dataclass(frozen=True, slots=True)
class JudgeIdentity:
    """All settings and weights of a judge that can change its verdicts.

    Attributes:
        title: for people.
        made_of: the settings and digests, as JSON.
    """

    title: str
    made_of: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of `made_of` as JSON, in hex."""
        return json_digest(self.made_of)

    @property
    def asks(self) -> str:
        """The judge's yes/no question. Empty for a judge of pairs."""
        return str(self.made_of.get(ASKS, ""))

    def as_dict(self) -> dict[str, Any]:
        """Return the judge as reports store it: `title`, `identity` (its digest) and `made_of` (its settings)."""
        return {"title": self.title, "identity": self.digest, "made_of": dict(self.made_of)}


def identify_scorer(reward: Mapping[str, Any], inputs: Mapping[str, Input]) -> JudgeIdentity:
    """Build the judge identity of a reward: all settings and weights that can change its scores.

    Args:
        reward: the group `reward` with its defaults, see `align.config.scorers.build_reward_spec`.
        inputs: of the run: the reward's models and functions, in the order of the configuration.
    """
    models = iter(list_numbered_inputs(inputs, "reward"))
    functions = iter(list_numbered_inputs(inputs, "reward.fn"))

    def identify_model() -> list[str]:
        model = next(models)
        return [model.digest, *([model.tokenizer] if model.tokenizer else [])]

    def identify_part(part: Mapping[str, Any]) -> dict[str, Any]:
        settings = {key: value for key, value in part.items() if key not in IGNORED}
        match part["name"]:
            case "learned":
                return {**settings, "model": identify_model()}
            case "ensemble":
                return {**settings, "models": [identify_model() for _ in part["refs"]]}
            case "fn":
                function = next(functions)
                places = [place for place in function.details.get("defined", ()) if SHA256.match(place)]
                name = f"{function.digest}:{function.ref.rpartition(':')[2]}"
                return {**settings, "function": [name, *sorted(places)]}
            case "rules":
                rules = [{**rule, "weight": float(rule.get("weight", 1.0))} for rule in part["rules"]]
                return {**settings, "rules": rules}
            case "sum":
                return {**settings, "parts": [identify_part(inner) for inner in part["parts"]]}
        return settings

    return JudgeIdentity(get_scorer_title(reward, inputs), identify_part(reward))


def list_differing_keys(one: JudgeIdentity, other: JudgeIdentity) -> list[str]:
    """Return the dotted keys of the settings in which two judges differ."""
    settings, other_settings = (dict(flatten_metrics(judge.made_of)) for judge in (one, other))
    return [key for key in {**settings, **other_settings} if settings.get(key) != other_settings.get(key)]


def describe_judge_difference(one: JudgeIdentity, other: JudgeIdentity) -> str:
    """Describe up to three settings in which two judges differ, with both values, for error messages. Returns an empty
    string if they do not differ."""
    settings = [dict(flatten_metrics(judge.made_of)) for judge in (one, other)]
    keys = list_differing_keys(one, other)
    parts = [f"{key} {' and '.join(format_setting(values.get(key), key) for values in settings)}" for key in keys[:3]]
    return ", ".join(parts) + (f", and {len(keys) - 3} more" if len(keys) > 3 else "")


def format_setting(value: Any, key: str = "") -> str:
    """Format a setting of a judge's identity for display. SHA-256 digests are cut to 12 digits, and a yes/no question
    (`key=asks`) to its beginning."""
    if key == ASKS and value is not None:
        return quote_beginning(str(value))
    if isinstance(value, list):
        return f"[{', '.join(map(format_setting, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {format_setting(inner_value)}' for key, inner_value in value.items())}}}"
    return "none" if value is None else re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", str(value))


# The relation of a scorer to a policy


@dataclass(frozen=True, slots=True)
class ScorerRelation:
    """The part that a reward used as a judge had in the training of the policy it now judges.

    Attributes:
        proxy: the runs in which the policy, or an ancestor, was optimised against the scorer or a part of it: by PPO,
            or by training on answers that it ranked (best-of-n).
        votes: the runs that learned from pairs which the scorer, or a part of it, ranked with noise.
        unknown: deleted runs of the lineage, whose training is not known.
        pairs: the runs of DPO and KTO that learned from the same pairs as the scorer.
    """

    proxy: tuple[str, ...] = ()
    votes: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()

    @property
    def role(self) -> str:
        """`proxy` if the policy was optimised against this reward, otherwise `gold`."""
        return "proxy" if self.proxy else "gold"

    def describe(self, judge: str) -> list[str]:
        """Return warning sentences for a report, one for each kind of training in which this reward took part.

        Args:
            judge: title of the judge.
        """
        sentences = (
            (
                self.proxy,
                "{judge} is a proxy: {runs} was optimised against it, and its score is no evidence of quality",
            ),
            (
                self.votes,
                "{judge} also ranked, as a simulated annotator with noise, the pairs that {runs} learned from",
            ),
            (self.pairs, "{judge} learned from the same pairs as {runs}, so it tends to prefer what they prefer"),
            (self.unknown, "how {runs} was trained is not known here, and whether {judge} had a part in it"),
        )
        return [sentence.format(judge=judge, runs=", ".join(runs)) for runs, sentence in sentences if runs]

    def require_independent(self, judge: str, policy: str, allow_proxy: bool) -> None:
        """Raise InputError if the policy was optimised against the judge and `allow_proxy` (`stage.allow_proxy`) is
        False.

        Args:
            judge, policy: their names for people.
        """
        problem = f"{policy} came through {', '.join(self.proxy)}, which was optimised against it"
        remedy = (
            "Judge by another scorer (reward=fn reward.fn=package.module:name), or add stage.allow_proxy=true: its "
            "score is then called a proxy."
        )
        require(allow_proxy or not self.proxy, "reward", judge, problem, remedy)


def find_scorer_relation(
    policy: Artifact, parts: set[str], root: Path, models: Sequence[Artifact] = ()
) -> ScorerRelation:
    """Find out from the manifests of a policy and its ancestors whether a reward took part in their training. They may
    have been trained on its scores, its rankings or the pairs that it learned from.

    Args:
        parts: of the scorer, see `list_scorer_parts`.
        root: the folder of runs, to find parents that were moved together with it.
        models: the scorer's reward models.
    """
    if policy.manifest is None:
        return ScorerRelation(unknown=(policy.ref,))
    learned = {m.manifest.inputs["data"].digest for m in models if m.manifest and "data" in m.manifest.inputs}
    proxy: list[str] = []
    votes: list[str] = []
    unknown: list[str] = []
    pairs: list[str] = []
    for ref, run in iter_optimisations(policy.manifest, root):
        if isinstance(run, GoneRun):
            unknown.append(run.ref)
        elif list_scorer_parts(run.config["reward"], run.inputs) & parts:
            proxy.append(ref)
    for run in iter_ancestors(policy.manifest, root, POLICY):
        if isinstance(run, GoneRun) or run.stage not in ("dpo", "kto"):
            continue
        if "data" in run.inputs and run.inputs["data"].digest in learned:
            pairs.append(run.ref)
    for run in iter_ancestors(policy.manifest, root):
        if isinstance(run, GoneRun):
            unknown.append(run.ref)
        elif run.ref not in proxy:
            names = run.metrics.get("simulated_by", ())
            if any(find_voting_parts(parts, name) for name in names):
                votes.append(run.ref)
    return ScorerRelation(*(tuple(dict.fromkeys(refs)) for refs in (proxy, votes, unknown, pairs)))


def iter_optimisations(manifest: Manifest, root: Path) -> Iterator[tuple[str, Manifest | GoneRun]]:
    """Yield a run's reference and the manifest that holds its reward, for each run that optimised the policy or an
    ancestor against a reward.

    For PPO that is the run itself. For a run that was trained on answers ranked by best-of-n, it is the run of
    `stage=sample`, followed by the optimisations of the policy that gave these answers.
    """
    for run in iter_ancestors(manifest, root, POLICY):
        if isinstance(run, GoneRun):
            continue
        if run.stage == "ppo":
            yield run.ref, run
        rows = run.inputs.get("data")
        for ref in rows.details.get(RANKED_BY, ()) if rows else ():
            stage, _, name = str(ref).partition(":")
            ranker = try_read_manifest(root / stage / name)
            yield run.ref, ranker or GoneRun(str(ref), "")
            if ranker:
                yield from iter_optimisations(ranker, root)
