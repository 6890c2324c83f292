"""Every setting in words, from its one declaration: `python -m align stage=NAME --help` and docs/settings.md.

`python -m align.config.reference > docs/settings.md` writes the page anew.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace

from omegaconf import DictConfig, OmegaConf

from align.config import scorers
from align.config.compose import compose_raw
from align.config.group_files import files_of
from align.config.plan import PLANNED, PlanConfig
from align.config.root import GROUPS, PARTS, Config, RunConfig
from align.config.settings import Setting, Settings, declared_in, defaults_of, parts_in
from align.config.stages import STAGES, schema_of
from align.config.synonyms import WORDS

OF_EVERY_RUN = ("seed", "device", "devices", "ddp_timeout", "dtype", "resume", "schema_version")
WIDTH = 120


@dataclass(frozen=True, slots=True)
class Key:
    """One key.

    Attributes:
        name: as it is written on a command line.
        default: the same, of its value.
        declared: what it means and may hold.
    """

    name: str
    default: str
    declared: Setting

    @property
    def holds(self) -> str:
        """Its unit, and its bounds or choices; empty where there is nothing to say."""
        return "; ".join(filter(None, (self.declared.unit, self.declared.range, " | ".join(self.declared.choices))))


@dataclass(frozen=True, slots=True)
class Section:
    """Keys that belong together.

    Attributes:
        title: `stage=ppo`, `data=chitchat|jsonl|annotations`, …
        about: what they are for.
    """

    title: str
    about: str
    keys: tuple[Key, ...]


def written(value: object) -> str:
    """A value as a command line has it."""
    if value is None:
        return "null"
    if isinstance(value, str):
        followed = re.fullmatch(r"\$\{([\w.]+)\}", value)  # any other interpolation looks into the environment
        return f"({followed[1]})" if followed else "null" if value.startswith("${") else value or "''"
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value)


def keys_of(schema: type[Settings]) -> Iterator[Key]:
    """The keys of a schema and of its parts. What chooses a group, such as `data.name`, is none."""
    defaults = defaults_of(schema)
    for name, declared in declared_in(schema).items():
        if name != "name" or schema is RunConfig:
            yield Key(f"{schema.AT}.{name}" if schema.AT else name, written(defaults[name]), declared)
    if schema is not Config:  # whose parts are sections of their own
        for part in parts_in(schema):
            yield from keys_of(part)


def about(schema: type[Settings]) -> str:
    return " ".join(inspect.cleandoc(schema.__doc__ or "").split())


def section(title: str, schema: type[Settings]) -> Section:
    return Section(title, about(schema), tuple(keys_of(schema)))


def choices_of(group: str) -> str:
    """`group=a|b|c`, of the group files that this package has."""
    names = [name.partition("/")[2] for name in files_of(None) if name.startswith(f"{group}/")]
    return f"{group}={'|'.join(sorted(names))}"


def stage_section(stage: str) -> Section:
    return section(f"stage={stage}", schema_of(stage))


def part_section(name: str) -> Section:
    """The section of one part of the configuration that stages share."""
    if name in PARTS:
        return section(choices_of(name) if name in GROUPS else name, PARTS[name])
    return Section(name, "", tuple(key for key in keys_of(Config) if key.name == name))


def every_run() -> Section:
    keys = (key for key in keys_of(Config) if key.name in OF_EVERY_RUN)
    return Section("every run", "What belongs to all of them.", (*keys, *keys_of(RunConfig), *keys_of(PARTS["track"])))


def sections_of(stage: str, reward: str | None = None) -> list[Section]:
    """What a stage reads: its own keys, then the parts of the configuration that decide what it makes.

    Args:
        reward: the choice of the group `reward` whose keys are of interest; `learned`, or for stage=eval `sentiment`,
            where it is None.
    """
    found = [stage_section(stage)]
    for name in (*STAGES[stage].reads, *STAGES[stage].uses):
        if name == "reward":
            chosen = reward if reward in scorers.CHOICES else "sentiment" if stage == "eval" else "learned"
            schema = scorers.CHOICES[chosen]
            found.append(Section(choices_of("reward"), f"{chosen}: {about(schema)}", tuple(keys_of(schema))))
        else:
            found.append(part_section(name))
    tree = compose_raw([f"stage={stage}"])
    return [with_defaults(one, tree) for one in (*found, every_run())]


def with_defaults(one: Section, tree: DictConfig) -> Section:
    """A section with the values that a stage begins with: its group files may choose others than the schema's."""
    keys = []
    for key in one.keys:
        value = OmegaConf.select(tree, key.name, default=...)
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
        keys.append(key if value is ... else replace(key, default=written(value)))
    group, chosen = one.title.partition("=")[0], OmegaConf.select(tree, f"{one.title.partition('=')[0]}.name")
    more = f" Here: {group}={chosen}." if "|" in one.title and chosen else ""
    return replace(one, about=one.about + more, keys=tuple(keys))


def help_text(stage: str, reward: str | None = None, of: str | None = None) -> str:
    """`python -m align stage=STAGE --help`.

    Args:
        of: the stage that `stage=plan` is asked about.
    """
    lines = [f"stage={stage}: {STAGES[stage].summary}", ""]
    about_it = sections_of(of or PlanConfig.of, reward) if stage == "plan" and of in (None, *PLANNED) else []
    for one in [stage_section(stage), *about_it] if about_it else sections_of(stage, reward):
        lines += [one.title, *wrapped(one.about, "  ")]
        for key in one.keys:
            lines.append(f"  {key.name}={key.default}" + (f"  ({key.holds})" if key.holds else ""))
            lines += wrapped(key.declared.meaning, "      ")
        lines.append("")
    lines.append("`--cfg job` prints the configuration that a line would run; docs/settings.md has every stage's keys.")
    return "\n".join(lines) + "\n"


def wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def markdown() -> str:
    """docs/settings.md."""
    shared = [part_section(name) for name in GROUPS] + [part_section("store")]
    alone = [key for key in keys_of(Config) if key.name not in OF_EVERY_RUN]
    rest = Section("what stages start from", "Each stage's section says which of these it reads.", tuple(alone))
    lines = [
        "# Settings", "",
        "This page lists every key with its default and its allowed values. `python -m align.config.reference` makes",
        "it from the declarations that validate a command line. `python -m align stage=NAME --help` shows the keys of",
        "one stage. `null` is an empty value, and `(method.lr)` is the value of another key. Some stages have other",
        "defaults: their `--help` and `--cfg job` show them.", "",
        "## Stages", "",
    ]  # fmt: skip
    for name, stage in STAGES.items():
        if name == "full":
            lines += ["### stage=full", "", "The keys of stage=sft, with method=full.", ""]
            continue
        others = (*stage.reads, *stage.uses)
        lines += tables(stage_section(name), "###", f"It also reads: {', '.join(others)}." if others else "")
    lines += ["## Groups", ""]
    rewards = [section(f"reward={name}", schema) for name, schema in scorers.CHOICES.items()]
    for one in (*shared[:3], *rewards, *shared[3:]):
        lines += tables(one, "###")
    lines += ["## Beside the groups", ""]
    always = every_run()  # less the keys of the group `track`, which has a section of its own above
    always = replace(always, keys=tuple(key for key in always.keys if not key.name.startswith("track.")))
    lines += tables(rest, "###") + tables(always, "###")
    lines += names_elsewhere()
    return "\n".join(lines).rstrip("\n") + "\n"


def names_elsewhere() -> list[str]:
    """What other libraries and servers call these keys, as Markdown."""
    lines = [
        "## Names elsewhere", "",
        "This table has the names of these keys in TRL, transformers, PEFT, LLaMA-Factory, axolotl, verl and OpenRLHF,",
        "and in the servers vLLM, TGI and llama-server.",
        "If a command line uses such a name, it is refused, and the message gives align's name.", "",
        "| here | elsewhere |", "| --- | --- |",
    ]  # fmt: skip
    lines += [f"| `{key}` | {', '.join(f'`{word}`' for word in words.split())} |" for key, words in WORDS.items()]
    return [*lines, ""]


def tables(one: Section, heading: str, more: str = "") -> list[str]:
    """A section as Markdown."""
    lines = [f"{heading} {one.title.replace('|', ', ')}", "", *filter(None, (one.about, more)), ""]
    if not one.keys:
        return lines
    lines += ["| key | default | holds | meaning |", "| --- | --- | --- | --- |"]
    for key in one.keys:
        holds, meaning = (text.replace("|", "\\|") for text in (key.holds, key.declared.meaning))
        lines.append(f"| `{key.name}` | `{key.default}` | {holds} | {meaning} |")
    return [*lines, ""]


if __name__ == "__main__":
    sys.stdout.write(markdown())
