"""From a command line to one checked `Config`: Hydra composes, the dataclasses validate, nothing is run.

Hydra's compose API is used rather than `hydra.main`, which ends with status 1 on a mistyped key and leaves an
`outputs/` folder behind. Hydra is given the group choices alone; the values are set one by one afterwards, so that
whatever is wrong with one is said of that one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from align.config import explain
from align.config.group_files import (
    EXPERIMENT,
    SWEEPS,
    conf_dir,
    files_of,
    groups,
    loaded,
    refuse_settings_of_hydra,
    unset_keys,
)
from align.config.plan import PLANNED, PlanKeys, question_about
from align.config.root import Config
from align.config.schemas import keys_beside, register
from align.config.settings import changed, freeze
from align.config.stages import STAGES
from align.config.values import check_batch, check_characters, check_integers, is_sweep, quote, read_value, set_value
from align.core.errors import AlignError, InputError, require
from align.core.redaction import masked_argument, masked_tree

PLAN = "plan"
COMPOSED_BY = ("hydra", "omegaconf", "yaml", "antlr4")
"""Packages that read command lines and configuration files."""


class Composer:
    """Composes command lines with one set of group files. What Hydra makes of a combination of choices is kept, so
    that the jobs of a sweep cost milliseconds each.

    Args:
        search: a folder of the user's own group files, tried after ours.

    Attributes:
        files: `group/choice` → its file, of every choice there is.
    """

    def __init__(self, search: Path | None = None) -> None:
        usable = search is not None and search.is_dir() and search.resolve() != conf_dir()
        self.search = search if usable else None
        self.files = files_of(self.search)
        self._groups = {*groups()}
        self._made: dict[tuple[str, ...], Composed] = {}

    def composed(self, words: Sequence[str], own: Sequence[str] = ()) -> Composed:
        """The composed but unchecked configuration of one command line. Of two words with one key the later counts.

        Args:
            words: `group=choice`, `key=value` and `+experiment=NAME`.
            own: more of them. What the others make is kept for the next call.

        Raises:
            InputError: an unknown group, key or choice, a wrong type, or a broken group file.
        """
        return next(self.variants(words, [own]))

    def variants(self, words: Sequence[str], several: Iterable[Sequence[str]]) -> Iterator[Composed]:
        """The same of `words` with each of several more. Each tree is good until the next is asked for: copying one
        takes as long as all the rest.

        Raises:
            InputError: as `composed`.
        """
        choices, values = self.sorted_out(words)
        copies: dict[tuple[Any, ...], DictConfig] = {}
        for own in several:
            own_choices, own_values = self.sorted_out(own)
            chosen, given = {**choices, **own_choices}, {**values, **own_values}
            if plans := chosen.get("stage") == PLAN:
                chosen["stage"] = given.get("stage.of", PlanKeys.of)
                self.check_choice("stage", chosen["stage"], "stage.of")
            made = self._kept(chosen, {k: v for k, v in values.items() if k not in own_values}, plans)
            place = (id(made), *own_values)
            if place not in copies or any("{" in value for value in own_values.values()):  # a mapping is merged
                copies[place] = copy.deepcopy(made.tree) if own_values else made.tree
            for key, value in own_values.items():
                check_characters(value, key)
                set_value(copies[place], key, value, self._groups, made.stage)
            check_batch(copies[place], {*values, *own_values})
            yield replace(made, tree=copies[place])

    def is_group(self, key: str) -> bool:
        """Whether a key chooses a group's file."""
        return key in self._groups or key == f"+{EXPERIMENT}"

    def choices_of(self, group: str) -> list[str]:
        return sorted(name.partition("/")[2] for name in self.files if name.startswith(f"{group}/"))

    def sorted_out(self, words: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Group → choice, and key → value.

        Raises:
            InputError: a word is no assignment, or there is no such choice.
        """
        choices: dict[str, str] = {}
        values: dict[str, str] = {}
        for word in words:
            key, equals, value = word.partition("=")
            name = key.removeprefix("+") if self.is_group(key) else key
            if not equals or not key or name[0] in "+~":
                raise explain.not_an_assignment(word, self._groups)
            (choices if self.is_group(key) else values)[name] = value
        for group, value in choices.items():
            self.check_choice(group, value)
        return choices, values

    def check_choice(self, group: str, value: str, key: str = "") -> None:
        """Args: key: by which it was chosen, if not by the group's name."""
        for name in named(group, value):
            if f"{group}/{name}" not in self.files:
                names = self.choices_of(group)
                if key == "stage.of":  # of our own stages those that are planned; a user's may be one too
                    names = [n for n in names if n in PLANNED or n not in STAGES]
                sweep = is_sweep(value) and all(part in names for part in value.split(","))
                raise explain.not_a_choice(group, name, names, self.search, sweep, key)

    def _kept(self, choices: Mapping[str, str], values: Mapping[str, str], plans: bool = False) -> Composed:
        """Args: plans: what would run is asked, not run (`stage=plan`)."""
        key = (str(plans), *(f"{k}={v}" for k, v in (*choices.items(), *values.items())))
        if key not in self._made:
            made = self._with_groups(choices)
            if plans:
                ask_about(made)
            for name, value in values.items():
                set_value(made.tree, name, value, self._groups, made.stage)
            container = OmegaConf.to_container(made.tree)
            check_characters(container)
            check_integers(container, "")
            self._made[key] = made
        return self._made[key]

    def _with_groups(self, choices: Mapping[str, str]) -> Composed:
        """What Hydra makes of these choices, every value as its group file has it."""
        chosen = [self.files[f"{group}/{name}"] for group, value in choices.items() for name in named(group, value)]
        try:
            return compose_groups(choices, self.search)
        except InputError:
            raise
        except Exception as error:  # what Hydra, OmegaConf and PyYAML raise at a user's file has any type
            theirs = [path for path in chosen if conf_dir() not in path.parents]
            raise explain.broken_file(error, self.files, theirs, keys_beside(error)) from error


def ask_about(made: Composed) -> None:
    """Let the keys of `stage=plan` stand beside those of the stage that is planned.

    Raises:
        InputError: that stage's memory is not predicted.
    """
    name = OmegaConf.select(made.tree, "stage.name")
    problem, remedy = "is no stage that is planned", f"Choose one of: {', '.join(PLANNED)}."
    require(name in PLANNED, "stage.of", made.stage, problem, remedy)
    asked = OmegaConf.structured(question_about(OmegaConf.get_type(made.tree.stage)))
    made.tree.stage = OmegaConf.merge(asked, OmegaConf.to_container(made.tree.stage))


def compose_raw(words: Sequence[str], search: Path | None = None) -> DictConfig:
    """The composed but unchecked tree of one command line, see `Composer`."""
    return Composer(search).composed(words).tree


@dataclass(frozen=True, slots=True)
class Composed:
    """A command line, composed.

    Attributes:
        tree: the configuration, not yet checked.
        stage: the choice of the group `stage`; None where there is none.
        sweeps: `key=values` of what group files sweep under `-m` (`hydra.sweeper.params`).
    """

    tree: DictConfig
    stage: str | None
    sweeps: tuple[str, ...] = ()


def named(group: str, value: str) -> list[str]:
    """The choices that a word names: one, quoted or not; of experiments a list too, `[a,b]`."""
    if value[:1] not in ("'", '"', "[" if group == EXPERIMENT else "'"):
        return [value]
    read = read_value(value)
    return [str(name) for name in read] if isinstance(read, list) else [str(read)]


def compose_groups(choices: Mapping[str, str], search: Path | None) -> Composed:
    """The tree of these choices, every value as its group file has it."""
    arguments = []
    for group, value in choices.items():
        names = [quote(name) for name in named(group, value)]
        sign, several = "+" if group == EXPERIMENT else "", value.startswith("[")
        arguments.append(f"{sign}{group}=" + (f"[{','.join(names)}]" if several else names[0]))
    if search is None:
        found = shipped(*arguments)
        return replace(found, tree=copy.deepcopy(found.tree))
    return by_hydra(search, *arguments, f"hydra.searchpath=[{quote(f'file://{search.resolve()}')}]")


def by_hydra(search: Path | None, *arguments: str) -> Composed:
    """Hydra's own composition, which takes a tenth of a second."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        tree = compose(config_name="config", overrides=list(arguments), return_hydra_config=True)
        taken = tree.hydra.runtime.choices
        if search is not None or taken.get("model") == "hub":  # of our own files that one alone leaves a key open
            defaults = (
                GlobalHydra.instance().config_loader().compute_defaults_list("config", list(arguments), RunMode.RUN)
            )
            files = list(loaded(defaults.defaults, search))
            refuse_settings_of_hydra(files)
            for key in unset_keys(files):  # OmegaConf drops a `???` where the schema has a default
                OmegaConf.update(tree, key, "???")
    swept = OmegaConf.select(tree, f"hydra.{SWEEPS}") or {}
    with open_dict(tree):
        del tree["hydra"]
    stage = taken.get("stage")
    if stage is None and OmegaConf.select(tree, "stage") is not None:
        problem = "your experiment sets keys of a stage, and none is chosen"
        raise InputError("stage", "(missing)", problem, "Add stage=NAME, or `- override /stage: NAME` to its defaults.")
    return Composed(tree, stage, tuple(f"{key}={value}" for key, value in swept.items()))


shipped = cache(partial(by_hydra, None))  # of our own files, which stay as they are while a process lasts


@contextmanager
def composing(words: Sequence[str]) -> Iterator[None]:
    """Raise what Hydra, OmegaConf or PyYAML raise inside the block as the user's error: they are given the command line
    and the user's files, and nothing else. A fault of our own passes as it is.

    Args:
        words: the command line, to name.
    """
    try:
        yield
    except AlignError:
        raise
    except Exception as error:
        if not raised_by_hydra(error):
            raise
        line = " ".join(map(masked_argument, words)) or "(nothing)"
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        remedy = "Correct the word or the file that it speaks of; `python -m align --cfg job` shows every key."
        raise InputError("command line", line[:300], f"cannot be composed ({reason})", remedy) from error


def raised_by_hydra(error: BaseException) -> bool:
    """Return whether an exception came out of the libraries that read command lines and configuration files, or out of
    a file that goes round in a circle."""
    if isinstance(error, RecursionError):
        return True
    names = set[str]()
    trace = error.__traceback__
    while trace is not None:
        names.add(str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0])
        trace = trace.tb_next
    return not names.isdisjoint(COMPOSED_BY)


def check(raw: DictConfig) -> Config:
    """The typed configuration, every check made; from here on nothing in it changes.

    Raises:
        InputError: a value is missing, of the wrong type, or impossible.
    """
    try:
        config = cast(Config, OmegaConf.to_object(raw))
    except MissingMandatoryValue as error:
        raise explain.missing(str(error.full_key)) from error
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__cause__
        problem = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(
            str(getattr(error, "full_key", None) or "configuration"), "(given)", problem, "Write the value itself."
        ) from error
    chosen = getattr(config.reward, "name", None)
    named = next((f.default for f in fields(config.reward) if f.name == "name"), chosen)  # pyright: ignore[reportArgumentType]
    require(
        chosen == named, "reward.name", chosen, f"is not the name of what is chosen ({named})",
        f"Take it out of your group file: its `defaults: [{named}, _self_]` say what it is.",
    )  # fmt: skip
    if config.stage is not None and not is_dataclass(config.stage):
        raise InputError(
            "stage", "(your own file)", "does not say which stage it sets", "Begin it with `defaults: [sft, _self_]`."
        )
    filled = getattr(config.stage, "filled", None)
    return changed(config, stage=filled(config)) if filled else freeze(config)


def as_yaml(raw: DictConfig) -> str:
    """A composed tree as YAML, for people to read."""
    return OmegaConf.to_yaml(OmegaConf.create(masked_tree(OmegaConf.to_container(raw))))
