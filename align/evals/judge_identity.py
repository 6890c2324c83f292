"""The settings and weights that can change a judge's verdicts.

A report is of one judge, and a gate checks that its judge is the same one. Names and places of files are no part of the
identity: a reward model is the digest of its weights, a function the digests of the files that define it. Imports no
torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from align.evals import judges
from align.evals.llm_judge import LLMJudge, YesNoQuestion
from align.evals.questions import shorten_question
from align.report.figure_text import flattened
from align.run import Input, json_digest

IGNORED = ("ref", "refs", "fn", "timeout")
"""Settings of a reward that name its inputs, or change no verdict."""
ASKS = "asks"
"""The key of a yes/no question."""
SHA256 = re.compile(r"[0-9a-f]{64}:")


@dataclass(frozen=True, slots=True)
class JudgeIdentity:
    """
    Attributes:
        title: for people.
        made_of: all that can change its verdicts, as JSON.
    """

    title: str
    made_of: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of `made_of`, in hex."""
        return json_digest(self.made_of)

    @property
    def asks(self) -> str:
        """Its yes/no question; empty for a judge of pairs."""
        return str(self.made_of.get(ASKS, ""))

    def as_dict(self) -> dict[str, Any]:
        """The form in a report."""
        return {"title": self.title, "identity": self.digest, "made_of": dict(self.made_of)}


def identify_judge(
    judge: Literal["reward", "people"] | LLMJudge, reward: Mapping[str, Any], inputs: Mapping[str, Input]
) -> JudgeIdentity | None:
    """Return the identity of the judge of `stage.judge`. Returns None for people. For `reward` and `inputs` see
    `identify_scorer`."""
    if isinstance(judge, LLMJudge):
        return identify_llm(judge)
    return identify_scorer(reward, inputs) if judge == "reward" else None


def identify_llm(judge: LLMJudge) -> JudgeIdentity:
    made_of = {
        "url": judge.endpoint.url,
        "model": judge.endpoint.model,
        "prompt": json_digest(judge.question.template),
        "temperature": judge.temperature,
        "max_tokens": judge.max_tokens,
        "extra_body": dict(judge.endpoint.extra_body),
    }
    if isinstance(judge.question, YesNoQuestion):
        made_of[ASKS] = judge.question.text
    return JudgeIdentity(judge.title, made_of)


def identify_scorer(reward: Mapping[str, Any], inputs: Mapping[str, Input]) -> JudgeIdentity:
    """Return the identity of the scorer of `reward=`.

    Args:
        reward: the group `reward` with its defaults, see `align.config.scorers.reward_spec`.
        inputs: of the run: the reward's models and functions, in the order of the configuration.
    """
    models = iter(judges.numbered(inputs, "reward"))
    functions = iter(judges.numbered(inputs, "reward.fn"))

    def identify_part(part: Mapping[str, Any]) -> dict[str, Any]:
        settings = {key: value for key, value in part.items() if key not in IGNORED}
        match part["name"]:
            case "learned":
                return {**settings, "model": identify_model(next(models))}
            case "ensemble":
                return {**settings, "models": [identify_model(next(models)) for _ in part["refs"]]}
            case "fn":
                return {**settings, "function": identify_function(next(functions))}
            case "rules":
                return {
                    **settings,
                    "rules": [{**rule, "weight": float(rule.get("weight", 1.0))} for rule in part["rules"]],
                }
            case "sum":
                return {**settings, "parts": [identify_part(inner) for inner in part["parts"]]}
        return settings

    return JudgeIdentity(judges.title(reward, inputs), identify_part(reward))


def identify_model(model: Input) -> list[str]:
    """Return the digest of a reward model's weights, and of its tokenizer if that is no part of the former."""
    return [model.digest, *([model.tokenizer] if model.tokenizer else [])]


def identify_function(function: Input) -> list[str]:
    """Return the digest of a function's file with its name there, and the digests of what the function is made of."""
    places = [place for place in function.details.get("defined", ()) if SHA256.match(place)]
    return [f"{function.digest}:{function.ref.rpartition(':')[2]}", *sorted(places)]


def list_differences(one: JudgeIdentity, other: JudgeIdentity) -> list[str]:
    """Return the settings in which two judges differ."""
    own, others = (dict(flattened(judge.made_of)) for judge in (one, other))
    return [key for key in {**own, **others} if own.get(key) != others.get(key)]


def describe_difference(one: JudgeIdentity, other: JudgeIdentity) -> str:
    """Return up to three settings in which two judges differ, in words; empty if they do not differ."""
    settings = [dict(flattened(judge.made_of)) for judge in (one, other)]
    keys = list_differences(one, other)
    parts = [f"{key} {' and '.join(format_value(values.get(key), key) for values in settings)}" for key in keys[:3]]
    return ", ".join(parts) + (f", and {len(keys) - 3} more" if len(keys) > 3 else "")


def format_value(value: Any, key: str = "") -> str:
    """Return a value of an identity for people: the first digits of digests, the first words of a question."""
    if key == ASKS and value is not None:
        return f"“{shorten_question(str(value))}”"
    if isinstance(value, list):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {format_value(each)}' for key, each in value.items())}}}"
    return "none" if value is None else re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", str(value))
