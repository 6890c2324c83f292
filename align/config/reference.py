"""The texts of `python -m align stage=NAME --help` and docs/settings.md, from the declarations of all settings.

`python -m align.config.reference > docs/settings.md` writes the page.
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
from align.config.compose import compose_tree
from align.config.group_files import find_group_files
from align.config.plan import PLANNED, PlanConfig
from align.config.root import GROUPS, PARTS, Config, RunConfig
from align.config.settings import Setting, Settings, get_declarations, get_defaults, get_parts
from align.config.stages import STAGES, load_schema
from align.config.synonyms import WORDS

OF_EVERY_RUN = ("seed", "device", "devices", "ddp_timeout", "dtype", "resume", "schema_version")
WIDTH = 120


@dataclass(frozen=True, slots=True)
class Key:
    """A configuration key with its default and its declaration, for help texts.

    Attributes:
        name: its name on a command line.
        default: its default in the form of a command line.
        declared: its declaration.
    """

    name: str
    default: str
    declared: Setting

    @property
    def holds(self) -> str:
        """A phrase with the key's unit, and its bounds or choices; may be empty."""
        return "; ".join(filter(None, (self.declared.unit, self.declared.range, " | ".join(self.declared.choices))))


@dataclass(frozen=True, slots=True)
class Section:
    """A section of a help text: configuration keys that belong together, with a title and a description.

    Attributes:
        title: `stage=ppo`, `data=chitchat|jsonl|annotations`, …
        about: description of the section.
    """

    title: str
    about: str
    keys: tuple[Key, ...]


def format_default(value: object) -> str:
    """Format a setting's default for help texts as on a command line; the value of another key becomes `(KEY)`."""
    if value is None:
        return "null"
    if isinstance(value, str):
        other_key = re.fullmatch(r"\$\{([\w.]+)\}", value)  # any other interpolation reads the environment
        if other_key:
            return f"({other_key[1]})"
        return "null" if value.startswith("${") else value or "''"
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value)


def iter_schema_keys(schema: type[Settings]) -> Iterator[Key]:
    """Yield a Key for each setting of a settings class and its nested parts.

    The name of a group's choice, such as `data.name`, is left out.
    """
    defaults = get_defaults(schema)
    for name, declared in get_declarations(schema).items():
        if name != "name" or schema is RunConfig:
            yield Key(schema.key_of(name), format_default(defaults[name]), declared)
    if schema is not Config:  # its parts are sections of their own
        for part in get_parts(schema):
            yield from iter_schema_keys(part)


def describe_schema(schema: type[Settings]) -> str:
    return " ".join(inspect.cleandoc(schema.__doc__ or "").split())


def build_section(title: str, schema: type[Settings]) -> Section:
    return Section(title, describe_schema(schema), tuple(iter_schema_keys(schema)))


def format_choices(group: str) -> str:
    """Return a text such as `model=hub|pocket` with a group's name and all its shipped choices."""
    names = [name.partition("/")[2] for name in find_group_files(None) if name.startswith(f"{group}/")]
    return f"{group}={'|'.join(sorted(names))}"


def build_stage_section(stage: str) -> Section:
    return build_section(f"stage={stage}", load_schema(stage))


def build_part_section(name: str) -> Section:
    """Build the help section for a group or a root key that stages share, such as `data` or `init`."""
    if name in PARTS:
        return build_section(format_choices(name) if name in GROUPS else name, PARTS[name])
    return Section(name, "", tuple(key for key in iter_schema_keys(Config) if key.name == name))


def build_run_section() -> Section:
    keys = (key for key in iter_schema_keys(Config) if key.name in OF_EVERY_RUN)
    return Section(
        "every run", "Settings of every run.", (*keys, *iter_schema_keys(RunConfig), *iter_schema_keys(PARTS["track"]))
    )


def build_sections(stage: str, reward: str | None = None) -> list[Section]:
    """Build the help sections of a stage: its own keys, the groups that it reads, and the keys of every run.

    Args:
        reward: the choice of the group `reward` whose keys are shown; if None, `learned`, or `sentiment` for
            stage=eval.
    """
    sections = [build_stage_section(stage)]
    for name in (*STAGES[stage].reads, *STAGES[stage].uses):
        if name == "reward":
            choice = reward if reward in scorers.CHOICES else "sentiment" if stage == "eval" else "learned"
            schema = scorers.CHOICES[choice]
            sections.append(
                Section(
                    format_choices("reward"), f"{choice}: {describe_schema(schema)}", tuple(iter_schema_keys(schema))
                )
            )
        else:
            sections.append(build_part_section(name))
    tree = compose_tree([f"stage={stage}"])
    return [replace_defaults(section, tree) for section in (*sections, build_run_section())]


def replace_defaults(section: Section, tree: DictConfig) -> Section:
    """Return a copy of a help section with the defaults that its keys have in a stage's composed configuration.

    A stage's group files may set other defaults than the settings classes.
    """
    keys = []
    for key in section.keys:
        value = OmegaConf.select(tree, key.name, default=...)
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
        keys.append(key if value is ... else replace(key, default=format_default(value)))
    group = section.title.partition("=")[0]
    choice = OmegaConf.select(tree, f"{group}.name")
    addition = f" Here: {group}={choice}." if "|" in section.title and choice else ""
    return replace(section, about=section.about + addition, keys=tuple(keys))


def format_stage_help(stage: str, reward: str | None = None, planned_stage: str | None = None) -> str:
    """Return the help text of a stage, for `python -m align stage=STAGE --help`.

    Args:
        planned_stage: the stage that `stage=plan` predicts.
    """
    lines = [f"stage={stage}: {STAGES[stage].summary}", ""]
    if stage == "plan" and planned_stage in (None, *PLANNED):
        sections = [build_stage_section(stage), *build_sections(planned_stage or PlanConfig.of, reward)]
    else:
        sections = build_sections(stage, reward)
    for section in sections:
        lines += [section.title, *wrap_text(section.about, "  ")]
        for key in section.keys:
            lines.append(f"  {key.name}={key.default}" + (f"  ({key.holds})" if key.holds else ""))
            lines += wrap_text(key.declared.meaning, "      ")
        lines.append("")
    lines.append("`--cfg job` prints the configuration that a line would run; docs/settings.md has every stage's keys.")
    return "\n".join(lines) + "\n"


def wrap_text(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def format_markdown() -> str:
    """Return the text of docs/settings.md: all keys with their defaults, allowed values and meanings, as Markdown."""
    shared = [build_part_section(name) for name in GROUPS] + [build_part_section("store")]
    root_keys = [key for key in iter_schema_keys(Config) if key.name not in OF_EVERY_RUN]
    about_root = "Each stage's section says which of these it reads."
    root_section = Section("what stages start from", about_root, tuple(root_keys))
    lines = [
        "# Settings",
        "",
        "This page lists every key with its default and its allowed values. `python -m align.config.reference` makes",
        "it from the declarations that validate a command line. `python -m align stage=NAME --help` shows the keys of",
        "one stage. `null` is an empty value, and `(method.lr)` is the value of another key. Some stages have other",
        "defaults: their `--help` and `--cfg job` show them.",
        "",
        "## Stages",
        "",
    ]
    for name, stage in STAGES.items():
        if name == "full":
            lines += ["### stage=full", "", "The keys of stage=sft, with method=full.", ""]
            continue
        parts = (*stage.reads, *stage.uses)
        lines += format_section(
            build_stage_section(name), "###", f"It also reads: {', '.join(parts)}." if parts else ""
        )
    lines += ["## Groups", ""]
    rewards = [build_section(f"reward={name}", schema) for name, schema in scorers.CHOICES.items()]
    for section in (*shared[:3], *rewards, *shared[3:]):
        lines += format_section(section, "###")
    lines += ["## Beside the groups", ""]
    always = build_run_section()  # without the keys of the group `track`, which has a section of its own above
    always = replace(always, keys=tuple(key for key in always.keys if not key.name.startswith("track.")))
    lines += format_section(root_section, "###") + format_section(always, "###")
    lines += format_synonyms()
    return "\n".join(lines).rstrip("\n") + "\n"


def format_synonyms() -> list[str]:
    """Return the lines of a Markdown table of align's keys with their names in TRL and other libraries."""
    lines = [
        "## Names elsewhere",
        "",
        "This table has the names of these keys in TRL, transformers, PEFT, LLaMA-Factory, axolotl, verl and OpenRLHF,",
        "and in the servers vLLM, TGI and llama-server.",
        "If a command line uses such a name, it is refused, and the message gives align's name.",
        "",
        "| key of align | names elsewhere |",
        "| --- | --- |",
    ]
    lines += [f"| `{key}` | {', '.join(f'`{word}`' for word in words.split())} |" for key, words in WORDS.items()]
    return [*lines, ""]


def format_section(section: Section, heading: str, note: str = "") -> list[str]:
    """Return the Markdown lines of a section: heading, description, note and a table of its keys."""
    lines = [f"{heading} {section.title.replace('|', ', ')}", "", *filter(None, (section.about, note)), ""]
    if not section.keys:
        return lines
    lines += ["| key | default | holds | meaning |", "| --- | --- | --- | --- |"]
    for key in section.keys:
        holds, meaning = (text.replace("|", "\\|") for text in (key.holds, key.declared.meaning))
        lines.append(f"| `{key.name}` | `{key.default}` | {holds} | {meaning} |")
    return [*lines, ""]


if __name__ == "__main__":
    sys.stdout.write(format_markdown())
