"""Settings classes for the choices of `reward`: rewards that PPO optimises and `stage=eval` judges by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from align.config.settings import Settings, get_declarations, setting
from align.core.errors import InputError, require

RULES = ("length", "regex", "json", "tags", "sentiment")


@dataclass
class RewardConfig(Settings):
    """The reward that PPO optimises and `stage=eval` judges by."""

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
        names_function = re.fullmatch(r"[\w.]+:\w+", self.fn or "") is not None
        remedy = "Write reward.fn=package.module:name."
        require(names_function, "reward.fn", self.fn or "(empty)", "names no function", remedy)


@dataclass
class CheckReward(RewardConfig):
    """1 for an answer that has all that its check asks for, and 0 for any other: the check in the column `check` of the
    prompt's row, as a task of `stage=eval` has it."""

    name: str = "check"
    check: Any = setting(
        None, "The check of rows that have none, such as {kind: regex, pattern: yes}. See docs/checkers.md."
    )
    score: str = setting(
        "all",
        "`all`: 1 if all parts of the check hold, else 0. `parts`: the share of parts that hold.",
        choices=("all", "parts"),
    )
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
        for where, rule in enumerate_mappings("reward.rules", self.rules):
            require_listed_choice(f"{where}.rule", str(rule.get("rule")), RULES)
            require_finite_weight(where, rule)
            validate_rule(where, rule)


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
    )
    deviations: float = setting(
        1.0, "Number of standard deviations for combine=mean_minus_std.", unit="standard deviations", above=0
    )

    def check_together(self) -> None:
        require(
            len(self.refs) > 1,
            "reward.refs",
            self.refs,
            "an ensemble has two members or more",
            "Write \"reward.refs=['reward:a','reward:b']\".",
        )


@dataclass
class SumReward(RewardConfig):
    """The weighted sum of other rewards. Learned parts are standardised on the reference's samples before they are
    weighed; rules and functions keep their own units."""

    name: str = "sum"
    parts: Any = setting(None, "List such as [{name: learned, ref: reward:latest, weight: 1.0}].")

    def check_together(self) -> None:
        for where, part in enumerate_mappings("reward.parts", self.parts):
            require_finite_weight(where, part)
            parse_reward_part(where, part)


CHOICES: dict[str, type[RewardConfig]] = {
    "learned": LearnedReward,
    "fn": FunctionReward,
    "check": CheckReward,
    "sentiment": SentimentReward,
    "rules": RulesReward,
    "ensemble": EnsembleReward,
    "sum": SumReward,
}


def parse_reward_parts(config: SumReward) -> list[tuple[float, RewardConfig]]:
    """Parse the parts of `reward=sum` into a list of (weight, settings of the reward)."""
    return [
        (float(part.get("weight", 1.0)), parse_reward_part(where, part))
        for where, part in enumerate_mappings("reward.parts", config.parts)
    ]


def build_reward_spec(config: RewardConfig) -> dict[str, Any]:
    """Convert the settings of a reward to a plain dict with all defaults, for the package `reward`.

    The parts of a sum are converted too.
    """
    if isinstance(config, SumReward):
        return {
            "name": config.name,
            "parts": [{"weight": w, **build_reward_spec(part)} for w, part in parse_reward_parts(config)],
        }
    return asdict(config)


def parse_reward_part(field: str, part: Mapping[str, Any]) -> RewardConfig:
    """Parse one part of `reward=sum`, a mapping with `name` and settings, into the settings object of that reward.

    Args:
        field: the field of the part, such as `reward.parts[0]`.

    Raises:
        InputError: there is no such reward, or a setting is unknown or invalid.
    """
    name = str(part.get("name"))
    require_listed_choice(f"{field}.name", name, tuple(CHOICES))
    schema = CHOICES[name]
    values = {key: value for key, value in part.items() if key not in ("weight", "name")}
    for key, value in values.items():
        remedy = f"Its settings: {', '.join(get_declarations(schema)) or 'none'}."
        require(key in get_declarations(schema), f"{field}.{key}", value, f"is no setting of {name}", remedy)
    try:
        return schema(**values)
    except InputError as error:  # its field is that of a whole reward, such as `reward.fn`
        raise InputError(error.field.replace("reward", field, 1), error.value, error.problem, error.remedy) from error


def require_listed_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise InputError, with the choices, unless a value is one of them."""
    require(value in choices, field, value, "is not a choice here", f"Choose one of: {', '.join(choices)}.")


def enumerate_mappings(field: str, value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (field, mapping) for each element of a list, with fields such as `reward.parts[0]`, or raise InputError.

    Raises:
        InputError: it is no list of mappings, or it is empty.
    """
    are_mappings = isinstance(value, list) and len(value) > 0 and all(isinstance(item, Mapping) for item in value)
    remedy = f'Write "{field}=[{{…}},{{…}}]", as the documentation of reward= shows.'
    require(are_mappings, field, value or "(empty)", "is no list of settings", remedy)
    return [(f"{field}[{i}]", item) for i, item in enumerate(value)]


def require_finite_weight(field: str, part: Mapping[str, Any]) -> None:
    """Raise InputError unless the key `weight` of a part of a weighted sum is a finite number. The default is 1."""
    weight = part.get("weight", 1.0)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool) and abs(weight) < float("inf")
    require(is_number, f"{field}.weight", weight, "is no finite number", "Give a number.")


def validate_rule(field: str, rule: Mapping[str, Any]) -> None:
    """Raise InputError if a setting of a rule-based reward, such as `regex`, is missing, unknown or invalid."""
    name = rule["rule"]
    needed = {"length": ("low", "high"), "regex": ("pattern",), "tags": ("tags",)}.get(name, ())
    for key in rule:
        is_setting = key in ("rule", "weight", *needed)
        remedy = f"Its settings: {', '.join((*needed, 'weight'))}."
        require(is_setting, f"{field}.{key}", rule[key], f"is no setting of the rule {name}", remedy)
    for key in needed:
        require(key in rule, f"{field}.{key}", "(missing)", f"the rule {name} needs it", f"Add {key}.")
    if name == "length":
        low = rule["low"]
        high = rule["high"]
        is_range = isinstance(low, int) and isinstance(high, int) and 0 <= low <= high
        require(is_range, f"{field}.low", low, f"and high={high} are no range of words", "Give 0 <= low <= high.")
    if name == "regex":
        import regex  # slow to import, and every command imports this module

        try:
            regex.compile(str(rule["pattern"]))
        except regex.error as error:
            problem = f"is no regular expression ({error})"
            raise InputError(f"{field}.pattern", rule["pattern"], problem, "Correct it.") from error
    if name == "tags":
        tags = rule["tags"]
        are_names = isinstance(tags, list) and len(tags) > 0 and all(re.fullmatch(r"[\w-]+", str(tag)) for tag in tags)
        require(are_names, f"{field}.tags", tags, "is no list of tag names", "Write for example [think, answer].")
