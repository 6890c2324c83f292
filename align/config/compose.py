"""Composition of a command line and YAML group files into one checked `Config`, with Hydra.

Hydra's compose API is used rather than `hydra.main`, which ends with status 1 on a mistyped key and leaves an
`outputs/` folder behind. Hydra gets only the group choices. The values are set one by one afterwards, so that an error
names its key.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

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
    find_conf_dir,
    find_group_files,
    find_unset_keys,
    iter_loaded_files,
    list_groups,
    refuse_settings_of_hydra,
)
from align.config.plan import PLANNED, PlanKeys, build_plan_schema
from align.config.root import Config
from align.config.schemas import list_schema_keys, register_schemas
from align.config.settings import freeze, replace_values
from align.config.stages import STAGES
from align.config.values import (
    is_sweep,
    parse_plain_value,
    quote_for_hydra,
    require_64_bit_integers,
    require_consistent_batch,
    require_encodable_text,
    set_value,
)
from align.core.errors import AlignError, InputError, require
from align.core.redaction import mask_argument, mask_tree

PLAN = "plan"
COMPOSED_BY = ("hydra", "omegaconf", "yaml", "antlr4")
"""Names of the packages that parse command lines and configuration files, to recognise their exceptions."""


class SplitWords(NamedTuple):
    """The words of a command line, divided into choices of group files and values of single keys.

    Attributes:
        choices: group → name of the chosen file.
        values: key → text of its value.
    """

    choices: dict[str, str]
    values: dict[str, str]


class Composer:
    """A composer of configuration trees from command lines and YAML group files, with a cache.

    Hydra's result is cached for each combination of choices, so that each job of a sweep takes milliseconds.

    Args:
        search: a folder of the user's own group files, searched after ours.

    Attributes:
        files: `group/choice` → its file, for every choice.
    """

    def __init__(self, search: Path | None = None) -> None:
        usable = search is not None and search.is_dir() and search.resolve() != find_conf_dir()
        self.search = search if usable else None
        self.files = find_group_files(self.search)
        self._groups = {*list_groups()}
        self._cache: dict[tuple[str, ...], Composed] = {}

    def compose(self, words: Sequence[str], own: Sequence[str] = ()) -> Composed:
        """Compose the configuration tree of one command line from group files, without validating it.

        Of two words with one key the later one counts.

        Args:
            words: `group=choice`, `key=value` and `+experiment=NAME`.
            own: more of them. The composition of the others is cached.

        Raises:
            InputError: an unknown group, key or choice, a wrong type, or a broken group file.
        """
        return next(self.compose_variants(words, [own]))

    def compose_variants(self, words: Sequence[str], word_lists: Iterable[Sequence[str]]) -> Iterator[Composed]:
        """Yield one composed configuration for each job of a sweep: `words` combined with each list of `word_lists`.

        A tree is valid until the next one is yielded, which reuses it: copying a tree takes as long as everything else.

        Raises:
            InputError: as `compose`.
        """
        choices, values = self.split_words(words)
        copies: dict[tuple[Any, ...], DictConfig] = {}
        for more_words in word_lists:
            own_choices, own_values = self.split_words(more_words)
            all_choices = {**choices, **own_choices}
            plans = all_choices.get("stage") == PLAN
            if plans:
                all_choices["stage"] = {**values, **own_values}.get("stage.of", PlanKeys.of)
                self.require_choice("stage", all_choices["stage"], "stage.of")
            shared_values = {key: value for key, value in values.items() if key not in own_values}
            shared = self._compose_cached(all_choices, shared_values, plans)
            place = (id(shared), *own_values)
            if place not in copies or any("{" in value for value in own_values.values()):  # a mapping is merged
                copies[place] = copy.deepcopy(shared.tree) if own_values else shared.tree
            for key, value in own_values.items():
                require_encodable_text(value, key)
                set_value(copies[place], key, value, self._groups, shared.stage)
            require_consistent_batch(copies[place], {*values, *own_values})
            yield replace(shared, tree=copies[place])

    def is_group(self, key: str) -> bool:
        """Return whether a command-line key chooses a group's file, such as `model` or `+experiment`."""
        return key in self._groups or key == f"+{EXPERIMENT}"

    def list_choices(self, group: str) -> list[str]:
        return sorted(name.partition("/")[2] for name in self.files if name.startswith(f"{group}/"))

    def split_words(self, words: Sequence[str]) -> SplitWords:
        """Split the `key=value` words of a command line into choices of group files and values of single keys.

        Raises:
            InputError: a word is no assignment, or a choice does not exist.
        """
        choices: dict[str, str] = {}
        values: dict[str, str] = {}
        for word in words:
            key, equals, value = word.partition("=")
            name = key.removeprefix("+") if self.is_group(key) else key
            if not equals or not key or name[0] in "+~":
                raise explain.build_assignment_error(word, self._groups)
            (choices if self.is_group(key) else values)[name] = value
        for group, value in choices.items():
            self.require_choice(group, value)
        return SplitWords(choices, values)

    def require_choice(self, group: str, value: str, key: str = "") -> None:
        """Raise InputError, with the existing choices, unless a group has a YAML file for the choice `value`.

        Args:
            key: the key that chooses it, if that is not the group's name.
        """
        for name in parse_choice_names(group, value):
            if f"{group}/{name}" not in self.files:
                names = self.list_choices(group)
                if key == "stage.of":  # of our own stages only those that can be planned; a user's may be one too
                    names = [n for n in names if n in PLANNED or n not in STAGES]
                sweep = is_sweep(value) and all(part in names for part in value.split(","))
                raise explain.build_unknown_choice_error(group, name, names, self.search, sweep, key)

    def _compose_cached(self, choices: Mapping[str, str], values: Mapping[str, str], plans: bool) -> Composed:
        """Return the configuration tree for choices of group files and values of keys, from a cache if composed before.

        Args:
            plans: add the keys of `stage=plan`.
        """
        key = (str(plans), *(f"{k}={v}" for k, v in (*choices.items(), *values.items())))
        if key not in self._cache:
            composed = self._compose_choices(choices)
            if plans:
                add_plan_keys(composed)
            for name, value in values.items():
                set_value(composed.tree, name, value, self._groups, composed.stage)
            container = OmegaConf.to_container(composed.tree)
            require_encodable_text(container)
            require_64_bit_integers(container, "")
            self._cache[key] = composed
        return self._cache[key]

    def _compose_choices(self, choices: Mapping[str, str]) -> Composed:
        try:
            return compose_groups(choices, self.search)
        except InputError:
            raise
        except Exception as error:  # for a user's file Hydra, OmegaConf and PyYAML raise exceptions of any type
            names = [f"{group}/{name}" for group, value in choices.items() for name in parse_choice_names(group, value)]
            own_files = [self.files[name] for name in names if find_conf_dir() not in self.files[name].parents]
            raise explain.build_invalid_file_error(error, self.files, own_files, list_schema_keys(error)) from error


def add_plan_keys(composed: Composed) -> None:
    """Merge the keys of `stage=plan` in place into the composed configuration of the stage whose memory is predicted.

    Raises:
        InputError: that stage's memory is not predicted.
    """
    name = OmegaConf.select(composed.tree, "stage.name")
    remedy = f"Choose one of: {', '.join(PLANNED)}."
    require(name in PLANNED, "stage.of", composed.stage, "is no stage that is planned", remedy)
    schema = OmegaConf.structured(build_plan_schema(OmegaConf.get_type(composed.tree.stage)))
    composed.tree.stage = OmegaConf.merge(schema, OmegaConf.to_container(composed.tree.stage))


def compose_tree(words: Sequence[str], user_config_dir: Path | None = None) -> DictConfig:
    """Return the configuration of one command line as an OmegaConf tree that is not validated yet."""
    return Composer(user_config_dir).compose(words).tree


@dataclass(frozen=True, slots=True)
class Composed:
    """The result of composing a command line: an unchecked configuration tree, the stage and the sweeps.

    Attributes:
        tree: the configuration, not yet checked.
        stage: the choice of the group `stage`; None without one.
        sweeps: `key=values` that group files sweep under `-m` (`hydra.sweeper.params`).
    """

    tree: DictConfig
    stage: str | None
    sweeps: tuple[str, ...] = ()


def parse_choice_names(group: str, value: str) -> list[str]:
    """Return the names of the group files that a command-line value chooses: one, quoted or not.

    For experiments it may be a list, `[a,b]`.
    """
    if value[:1] not in ("'", '"', "[" if group == EXPERIMENT else "'"):
        return [value]
    names = parse_plain_value(value)
    return [str(name) for name in names] if isinstance(names, list) else [str(names)]


def compose_groups(choices: Mapping[str, str], user_config_dir: Path | None) -> Composed:
    """Compose the chosen group files with Hydra, without values from the command line.

    Returns a copy of the cached tree.
    """
    arguments = []
    for group, value in choices.items():
        names = [quote_for_hydra(name) for name in parse_choice_names(group, value)]
        sign = "+" if group == EXPERIMENT else ""
        arguments.append(f"{sign}{group}=" + (f"[{','.join(names)}]" if value.startswith("[") else names[0]))
    if user_config_dir is None:
        composed = compose_shipped(*arguments)
        return replace(composed, tree=copy.deepcopy(composed.tree))
    return compose_with_hydra(
        user_config_dir, *arguments, f"hydra.searchpath=[{quote_for_hydra(f'file://{user_config_dir.resolve()}')}]"
    )


def compose_with_hydra(user_config_dir: Path | None, *arguments: str) -> Composed:
    """Compose the configuration for Hydra overrides with Hydra's compose API, in a tenth of a second.

    The settings classes are registered first. Keys of `hydra.` are removed from the tree.
    """
    register_schemas()
    with initialize_config_dir(version_base="1.3", config_dir=str(find_conf_dir())):
        tree = compose(config_name="config", overrides=list(arguments), return_hydra_config=True)
        choices = tree.hydra.runtime.choices
        if (
            user_config_dir is not None or choices.get("model") == "hub"
        ):  # the only one of our files with a mandatory key
            defaults = (
                GlobalHydra.instance().config_loader().compute_defaults_list("config", list(arguments), RunMode.RUN)
            )
            files = list(iter_loaded_files(defaults.defaults, user_config_dir))
            refuse_settings_of_hydra(files)
            for key in find_unset_keys(files):  # OmegaConf drops a `???` if the schema has a default
                OmegaConf.update(tree, key, "???")
    swept = OmegaConf.select(tree, f"hydra.{SWEEPS}") or {}
    with open_dict(tree):
        del tree["hydra"]
    stage = choices.get("stage")
    if stage is None and OmegaConf.select(tree, "stage") is not None:
        problem = "your experiment sets keys of a stage, and none is chosen"
        raise InputError("stage", "(missing)", problem, "Add stage=NAME, or `- override /stage: NAME` to its defaults.")
    return Composed(tree, stage, tuple(f"{key}={value}" for key, value in swept.items()))


compose_shipped = cache(partial(compose_with_hydra, None))  # our own files do not change during a process


@contextmanager
def explain_compose_errors(words: Sequence[str]) -> Iterator[None]:
    """Convert exceptions of Hydra, OmegaConf and PyYAML in the block to an InputError. Other exceptions pass.

    These libraries parse only the command line and the user's files.

    Args:
        words: the command line, for the message.
    """
    try:
        yield
    except AlignError:
        raise
    except Exception as error:
        if not is_from_hydra(error):
            raise
        line = " ".join(map(mask_argument, words)) or "(nothing)"
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        remedy = "Correct the word or the file that it speaks of; `python -m align --cfg job` shows every key."
        raise InputError("command line", line[:300], f"cannot be composed ({reason})", remedy) from error


def is_from_hydra(error: BaseException) -> bool:
    """Return whether an exception was raised in Hydra, OmegaConf, PyYAML or ANTLR, or is a RecursionError.

    A configuration file that includes itself causes a RecursionError.
    """
    if isinstance(error, RecursionError):
        return True
    names = set[str]()
    trace = error.__traceback__
    while trace is not None:
        names.add(str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0])
        trace = trace.tb_next
    return not names.isdisjoint(COMPOSED_BY)


def build_config(raw: DictConfig) -> Config:
    """Convert a composed OmegaConf tree to a validated, immutable `Config`, or raise InputError.

    Raises:
        InputError: a value is missing, has the wrong type, or is invalid.
    """
    try:
        config = cast(Config, OmegaConf.to_object(raw))
    except MissingMandatoryValue as error:
        raise explain.build_missing_key_error(str(error.full_key)) from error
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__cause__
        problem = str(error).strip().splitlines()[0].rstrip(".")
        key = str(getattr(error, "full_key", None) or "configuration")
        raise InputError(key, "(given)", problem, "Write the value itself.") from error
    name = getattr(config.reward, "name", None)
    expected = next((f.default for f in fields(config.reward) if f.name == "name"), name)  # pyright: ignore[reportArgumentType]
    problem = f"is not the name of what is chosen ({expected})"
    remedy = f"Take it out of your group file: its `defaults: [{expected}, _self_]` say what it is."
    require(name == expected, "reward.name", name, problem, remedy)
    if config.stage is not None and not is_dataclass(config.stage):
        remedy = "Begin it with `defaults: [sft, _self_]`."
        raise InputError("stage", "(your own file)", "does not say which stage it sets", remedy)
    fill = getattr(config.stage, "with_derived_values", None)
    return replace_values(config, stage=fill(config)) if fill else freeze(config)


def format_tree(raw: DictConfig) -> str:
    """Return a composed configuration tree as YAML text with secrets masked."""
    return OmegaConf.to_yaml(OmegaConf.create(mask_tree(OmegaConf.to_container(raw))))
