"""Group `reward`: what PPO optimises and what `stage=eval` judges by, one schema a choice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from align.config.settings import Settings, declared_in, setting
from align.core.errors import InputError, require

RULES = ("length", "regex", "json", "tags", "sentiment")


@dataclass
class RewardConfig(Settings):
    """What PPO optimises, and what `stage=eval` judges by."""

    AT: ClassVar[str] = "reward"

    name: str = "learned"


@dataclass
class LearnedReward(RewardConfig):
    """A reward model. If its base is the policy's, it is one more adapter on that base. Otherwise it has its own base
    and tokenizer, and reads the answers as text."""

    name: str = "learned"
    ref: str = setting("reward:latest", "The reward model, in the same form as `init`.", names="reward")


@dataclass
class FunctionReward(RewardConfig):
    """Your function. It gets a list of conversations, each a list of `{role, content}` that ends with the answer, and
    returns one number for each. A second argument is the rows: for each conversation the other columns of its prompt's
    row, a dict."""

    name: str = "fn"
    fn: str | None = setting(None, "The function, as package.module:name.")
    timeout: float | None = setting(None, "Time limit for one call. Empty: no limit.", unit="seconds", above=0)

    def check_together(self) -> None:
        require(
            re.fullmatch(r"[\w.]+:\w+", self.fn or "") is not None, "reward.fn", self.fn or "(empty)",
            "names no function", "Write reward.fn=package.module:name.",
        )  # fmt: skip


@dataclass
class CheckReward(RewardConfig):
    """1 for an answer that has all that its check asks for, and 0 for any other: the check in the column `check` of the
    prompt's row, as a task of `stage=eval` has it."""

    name: str = "check"
    check: Any = setting(
        None, "The check of rows that have none, such as {kind: regex, pattern: yes}. See docs/checkers.md."
    )
    score: str = setting(
        "all", "`all`: 1 if all parts of the check hold, else 0. `parts`: the share of parts that hold.",
        choices=("all", "parts"),
    )  # fmt: skip
    allow_code: bool = setting(False, "Run the code that answers hold, for checks by unit tests.")
    unsafe_code: bool = setting(
        False,
        "Run that code also on a machine that has no sandbox for it: neither bubblewrap nor namespaces nor Landlock.",
    )


@dataclass
class SentimentReward(RewardConfig):
    """VADER's sentiment, the same as the rule `sentiment`. It is the default judge of `stage=eval`."""

    name: str = "sentiment"


@dataclass
class RulesReward(RewardConfig):
    """The weighted sum of rules: `length` low, high (words) · `regex` pattern · `json` · `tags` tags · `sentiment`."""

    name: str = "rules"
    rules: Any = setting(None, "List of rules, such as {rule: NAME, weight: 1.0, …}, each with its rule's settings.")

    def check_together(self) -> None:
        for where, rule in listed("reward.rules", self.rules):
            one_of(f"{where}.rule", str(rule.get("rule")), RULES)
            number(f"{where}.weight", rule.get("weight", 1.0))
            check_rule(where, rule)


@dataclass
class EnsembleReward(RewardConfig):
    """Several reward models, each standardised on the reference's samples (Coste et al., "Reward model ensembles help
    mitigate overoptimization", 2023)."""

    name: str = "ensemble"
    refs: list[str] = setting([], "The reward models, each in the same form as `init`.", names="reward")
    combine: str = setting(
        "mean",
        "`mean`: the members' mean. `min`: their minimum. `mean_minus_std`: their mean minus `deviations` times their "
        "standard deviation.",
        choices=("mean", "min", "mean_minus_std"),
    )  # fmt: skip
    deviations: float = setting(
        1.0, "Number of standard deviations for combine=mean_minus_std.", unit="standard deviations", above=0
    )

    def check_together(self) -> None:
        require(
            len(self.refs) > 1, "reward.refs", self.refs, "an ensemble has two members or more",
            "Write \"reward.refs=['reward:a','reward:b']\".",
        )  # fmt: skip


@dataclass
class SumReward(RewardConfig):
    """The weighted sum of other rewards. Learned parts are standardised on the reference's samples before they are
    weighed; rules and functions keep their own units."""

    name: str = "sum"
    parts: Any = setting(None, "List such as [{name: learned, ref: reward:latest, weight: 1.0}].")

    def check_together(self) -> None:
        for where, part in listed("reward.parts", self.parts):
            number(f"{where}.weight", part.get("weight", 1.0))
            part_of(where, part)


CHOICES: dict[str, type[RewardConfig]] = {
    "learned": LearnedReward,
    "fn": FunctionReward,
    "check": CheckReward,
    "sentiment": SentimentReward,
    "rules": RulesReward,
    "ensemble": EnsembleReward,
    "sum": SumReward,
}


def parts_of(config: SumReward) -> list[tuple[float, RewardConfig]]:
    """(weight, what is weighed) of every part."""
    return [
        (float(part.get("weight", 1.0)), part_of(where, part)) for where, part in listed("reward.parts", config.parts)
    ]


def reward_spec(config: RewardConfig) -> dict[str, Any]:
    """A reward as a plain mapping, which `reward/` reads: every default written out, those of a sum's parts too."""
    if isinstance(config, SumReward):
        return {"name": config.name, "parts": [{"weight": w, **reward_spec(part)} for w, part in parts_of(config)]}
    return asdict(config)


def part_of(where: str, part: Mapping[str, Any]) -> RewardConfig:
    """One part of a sum as the choice that it names."""
    name = str(part.get("name"))
    one_of(f"{where}.name", name, tuple(CHOICES))
    schema, given = CHOICES[name], {k: v for k, v in part.items() if k not in ("weight", "name")}
    known = {"name", *declared_in(schema)}
    for key, value in given.items():
        require(key in known, f"{where}.{key}", value, f"is no setting of {name}", f"Its settings: {settings(schema)}.")
    try:
        return schema(**given)
    except InputError as error:  # it speaks of `reward.fn`; here that is a key of the part
        raise InputError(error.field.replace("reward", where, 1), error.value, error.problem, error.remedy) from error


def settings(schema: type[RewardConfig]) -> str:
    return ", ".join(declared_in(schema)) or "none"


def one_of(where: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, where, value, "is not a choice here", f"Choose one of: {', '.join(choices)}.")


def listed(where: str, value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """A list of mappings with the name of each.

    Raises:
        InputError: it is none, or it is empty.
    """
    right = isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value)
    require(
        bool(right), where, value if value else "(empty)", "is no list of settings",
        f'Write "{where}=[{{…}},{{…}}]", as the documentation of reward= shows.',
    )  # fmt: skip
    return [(f"{where}[{i}]", v) for i, v in enumerate(value)]


def number(where: str, value: Any) -> None:
    require(
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf"),
        where, value, "is no finite number", "Give a number.",
    )  # fmt: skip


def check_rule(where: str, rule: Mapping[str, Any]) -> None:
    """The settings of one rule.

    Raises:
        InputError: one is missing, unknown or impossible.
    """
    name = rule["rule"]
    known = {"length": ("low", "high"), "regex": ("pattern",), "tags": ("tags",)}.get(name, ())
    for key in rule:
        require(
            key in ("rule", "weight", *known), f"{where}.{key}", rule[key], f"is no setting of the rule {name}",
            f"Its settings: {', '.join((*known, 'weight'))}.",
        )  # fmt: skip
    for key in known:
        require(key in rule, f"{where}.{key}", "(missing)", f"the rule {name} needs it", f"Add {key}.")
    if name == "length":
        low, high = rule["low"], rule["high"]
        whole = isinstance(low, int) and isinstance(high, int) and 0 <= low <= high
        require(whole, f"{where}.low", low, f"and high={high} are no range of words", "Give 0 <= low <= high.")
    if name == "regex":
        import regex  # only where a rule needs it: every command reads this module

        try:
            regex.compile(str(rule["pattern"]))
        except regex.error as error:
            raise InputError(
                f"{where}.pattern", rule["pattern"], f"is no regular expression ({error})", "Correct it."
            ) from error
    if name == "tags":
        tags = rule["tags"]
        right = isinstance(tags, list) and tags and all(re.fullmatch(r"[\w-]+", str(t)) for t in tags)
        require(bool(right), f"{where}.tags", tags, "is no list of tag names", "Write for example [think, answer].")
