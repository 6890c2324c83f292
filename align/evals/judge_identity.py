"""What a judge is, so far as it changes verdicts: a card is of one judge, and a gate asks whether it is that one.

Names and places of files are no part of it: a reward model is the digest of its weights, a function the digests of the
files that define it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from align.evals import judges
from align.evals.llm_grader import TEMPLATE, LLMGrader
from align.evals.llm_judge import LLMJudge
from align.evals.questions import shortened
from align.report.words import flattened
from align.run import Input, json_digest

NO_PART = ("ref", "refs", "fn", "timeout")
"""Settings of a reward that are names of its inputs, or change no verdict."""
ASKS = "asks"
"""What a grader's question is called there."""
SHA256 = re.compile(r"[0-9a-f]{64}:")


@dataclass(frozen=True, slots=True)
class JudgeIdentity:
    """
    Attributes:
        title: for people.
        made_of: all that changes its verdicts, as JSON has it.
    """

    title: str
    made_of: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of what it is made of, hex."""
        return json_digest(self.made_of)

    def as_dict(self) -> dict[str, Any]:
        """As a card has it."""
        return {"title": self.title, "identity": self.digest, "made_of": dict(self.made_of)}

    @property
    def asks(self) -> str:
        """The question of a grader; empty of a judge of pairs."""
        return str(self.made_of.get(ASKS, ""))


def identity_of(
    judge: Literal["reward", "people"] | LLMJudge, reward: Mapping[str, Any], inputs: Mapping[str, Input]
) -> JudgeIdentity | None:
    """Who judges, as `stage.judge` names it; None of people. For the others see `scorer_identity`."""
    if isinstance(judge, LLMJudge):
        return JudgeIdentity(judge.title, of_llm(judge, judge.template))
    return scorer_identity(reward, inputs) if judge == "reward" else None


def grader_identity(grader: LLMGrader) -> JudgeIdentity:
    """Who answers a question about single answers, and which question."""
    return JudgeIdentity(grader.title, {**of_llm(grader, TEMPLATE), ASKS: grader.asks})


def of_llm(judge: LLMJudge | LLMGrader, template: str) -> dict[str, Any]:
    """What a language model that judges is made of, as far as it is known here."""
    return {
        "url": judge.endpoint.url, "model": judge.endpoint.model, "prompt": json_digest(template),
        "temperature": judge.temperature, "max_tokens": judge.max_tokens,
        "extra_body": dict(judge.endpoint.extra_body),
    }  # fmt: skip


def scorer_identity(reward: Mapping[str, Any], inputs: Mapping[str, Input]) -> JudgeIdentity:
    """The identity of the judge of `reward=`.

    Args:
        reward: the group `reward` with its defaults, see `align.config.scorers.reward_spec`.
        inputs: of the run that has it: the reward's models and functions, in the order of the configuration.
    """
    models = iter(judges.numbered(inputs, "reward"))
    functions = iter(judges.numbered(inputs, "reward.fn"))

    def walk(part: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in part.items() if key not in NO_PART}
        match part["name"]:
            case "learned":
                return {**kept, "model": of_model(next(models))}
            case "ensemble":
                return {**kept, "models": [of_model(next(models)) for _ in part["refs"]]}
            case "fn":
                return {**kept, "function": of_function(next(functions))}
            case "rules":
                return {**kept, "rules": [{**rule, "weight": float(rule.get("weight", 1.0))} for rule in part["rules"]]}
            case "sum":
                return {**kept, "parts": [walk(inner) for inner in part["parts"]]}
        return kept

    return JudgeIdentity(judges.title(reward, inputs), walk(reward))


def of_model(read: Input) -> list[str]:
    """A reward model by its weights, and by its tokenizer where that is no part of their digest."""
    return [read.digest, *([read.tokenizer] if read.tokenizer else [])]


def of_function(read: Input) -> list[str]:
    """A function by the digest of its file and its name there, and so of what it is made of."""
    places = [place for place in read.details.get("defined", ()) if SHA256.match(place)]
    return [f"{read.digest}:{read.ref.rpartition(':')[2]}", *sorted(places)]


def differing(one: JudgeIdentity, other: JudgeIdentity) -> list[str]:
    """The settings in which two judges differ; none where nothing tells them apart."""
    mine, theirs = (dict(flattened(judge.made_of)) for judge in (one, other))
    return [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]


def difference(one: JudgeIdentity, other: JudgeIdentity) -> str:
    """What tells two judges apart, up to three of their settings in words; empty where nothing does."""
    both, keys = [dict(flattened(judge.made_of)) for judge in (one, other)], differing(one, other)
    said = [f"{key} {' and '.join(shown(made_of.get(key), key) for made_of in both)}" for key in keys[:3]]
    return ", ".join(said) + (f", and {len(keys) - 3} more" if len(keys) > 3 else "")


def shown(value: Any, key: str = "") -> str:
    """A value of an identity for people; of digests the first digits, of a question the first words."""
    if key == ASKS and value is not None:
        return f"“{shortened(str(value))}”"
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {shown(each)}' for key, each in value.items())}}}"
    return "none" if value is None else re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", str(value))
