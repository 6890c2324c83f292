"""Settings of `stage=registry`, which lists, compares and traces runs, and changes aliases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar

from align.config.addresses import require_valid_url
from align.config.settings import Settings, get_defaults, setting
from align.core.aliases import NAME, NAME_REMEDY, parse_aliases
from align.core.errors import InputError, require
from align.core.files import parse_user_path

ACTIONS = {
    "list": "prints the runs under run.root, one a line",
    "show": "prints all that is recorded about one run",
    "compare": "prints the settings in which several runs differ, and their figures",
    "diff": "prints the differences between two runs of one stage",
    "trace": "prints what an artifact or a served answer came from, down to votes and data",
    "replay": "makes a run again in a folder that is thrown away, and compares it step by step",
    "promote": "points an alias at an artifact, if the alias' gates pass",
    "retire": "ends an alias: it points at no artifact any more",
    "history": "prints who changed which alias when, from what to what, and why",
    "forget": "lists the data sets and runs that hold the rows of an annotator, a source or an item, or one row, and "
    "what was made from them; with stage.apply=true it erases these rows",
    "gc": "lists files that are no longer needed, and removes them with stage.apply=true",
    "rebuild": "builds the index of the runs anew",
    "serve": "serves the runs on a read-only web page",
}
DOES = "; ".join(f"`{action}` {does}" for action, does in ACTIONS.items())
FORGETS = ("annotator", "source", "item", "content_id")
GARBAGE = ("leftovers", "checkpoints", "bases", "artifacts")
FORMATS = ("table", "json", "csv")
READS: Mapping[str, tuple[str, ...]] = {
    "list": ("where", "sort", "columns", "limit", "format"),
    "show": ("run", "columns", "format"),
    "compare": ("runs", "sweep", "where", "sort", "columns", "limit", "html", "format"),
    "diff": ("runs", "format"),
    "trace": ("response", "verify", "format"),
    "replay": ("run", "steps", "format"),
    "promote": ("alias", "arms", "why", "who", "override", "gates"),
    "retire": ("alias", "why", "who"),
    "history": ("alias", "as_of", "format"),
    "forget": ("annotator", "source", "item", "content_id", "apply", "who", "format"),
    "gc": ("kinds", "days", "apply", "who", "format"),
    "rebuild": (),
    "serve": ("host", "port", "url"),
}
"""Value of `stage.action` → names of the stage's settings that the action reads."""


@dataclass
class RegistryConfig(Settings):
    """Shows all runs under `run.root`. It makes no run. The run folders are the truth: an index beside them is brought
    up to date at each question, and can be removed at any time."""

    AT: ClassVar[str] = "stage"

    name: str = "registry"
    action: str = setting("list", f"What is done: {DOES}.", choices=tuple(ACTIONS))
    run: str | None = setting(
        None, "The run that `show` shows and `replay` makes again: STAGE:NAME, STAGE:latest or a run's folder."
    )
    steps: int | None = setting(None, "How many steps `replay` makes again. Not given: all of them.", above=0)
    runs: list[str] = setting(
        [], "The runs that `compare` and `diff` are about, two for `diff`, such as [ppo:first, ppo:second]."
    )
    sweep: str | None = setting(
        None,
        "The sweep that `compare` is about: `latest`, or the name of its page in compare/ of run.root without `.html`.",
    )
    where: Any = setting(
        None,
        "Conditions that listed and compared runs meet, such as {stage: ppo, metrics.win_rate.low: '>=0.7'}. A value, "
        "a list of values of which one is met, a text with `*`, or a comparison: `>=`, `<=`, `>`, `<`, `!=`, `=`.",
    )
    sort: Any = setting(
        "-started", "The key by which runs are listed, or a list of keys. With `-` in front: from high to low."
    )
    columns: list[str] = setting(
        [],
        "Keys that are listed, such as [run, metrics.loss_after]. Empty: the usual ones. For `compare`: its figures.",
    )
    limit: int | None = setting(
        None,
        "How many runs are listed, or compared. Not given: 100 in a table, all in other formats.",
        above=0,
        at_most=10**9,
    )
    html: str | None = setting(None, "A file that `compare` writes a page to, with curves and plots.")
    response: str | None = setting(
        None, "The id of an answer that `trace` looks up in the logs of servers, in place of `artifact`."
    )
    verify: str = setting(
        "times",
        "How `trace` checks files. `times`: by size and modification time. `full`: by hashing all of them.",
        choices=("times", "full"),
    )
    alias: str | None = setting(None, "The alias that `promote` and `retire` change, or the only one of `history`.")
    arms: Any = setting(
        None,
        "Several artifacts that the alias divides requests over, by weight, such as {ppo\\:next: 0.1, ppo\\:now: 0.9}. "
        "Not given: the one that `artifact` names.",
    )
    why: str | None = setting(None, "Why the alias is changed. It stays in the log.")
    who: str | None = setting(
        None,
        "Who changes the alias, or removes what `gc` and `forget` list. Not given: the operating-system user of this "
        "process.",
    )
    override: str | None = setting(None, "Why the alias is changed although a gate is closed. It stays in the log.")
    gates: str | None = setting(
        None,
        "Folder of the gates, see docs/registry.md. Not given: conf/gates. Gates in the folder gates/ of "
        "run.root apply too.",
    )
    as_of: str | None = setting(
        None,
        "Time for which `history` prints the aliases: in ISO 8601, and in UTC if it names no zone. A date means "
        "the end of that day.",
    )
    kinds: list[str] = setting(
        [], "What `gc` lists and removes. Empty: it lists all, and removes all but artifacts.", choices=GARBAGE
    )
    days: float = setting(
        30.0, "Days since a run ended without success after which `gc` lists its checkpoints.", unit="days", at_least=0
    )
    host: str = setting("127.0.0.1", "Interface that `serve` listens at.")
    port: int = setting(7862, "Port that `serve` listens at.", at_least=1024, at_most=65535)
    url: str | None = setting(
        None,
        "The address of `serve` in browsers, such as https://runs.example.org. With it, every browser "
        "needs the link that `serve` prints.",
    )
    apply: bool = setting(False, "Whether `gc` removes what it lists, and `forget` erases it.")
    annotator: str | None = setting(
        None, "The annotator that `forget` is about, by name or pseudonym, in the project that `project` names."
    )
    source: str | None = setting(
        None,
        "The source whose rows `forget` is about: the name of a data set's source, the name of a file, or an "
        "annotation project.",
    )
    item: str | None = setting(None, "The item that `forget` is about, in the project that `project` names.")
    content_id: str | None = setting(None, "The row that `forget` is about, by its content id of 64 hex digits.")
    format: str = setting("table", "How runs are printed: for eyes or for programs.", choices=FORMATS)

    def check_together(self) -> None:
        sort_keys = self.sort if isinstance(self.sort, list | tuple) else [self.sort]
        are_keys = all(isinstance(key, str) and key.removeprefix("-") for key in sort_keys)
        require(are_keys, "stage.sort", self.sort, "names no key", "Write stage.sort=-started, or a list of keys.")
        is_mapping = self.where is None or isinstance(self.where, Mapping)
        remedy = "Write \"stage.where={stage: ppo, metrics.win_rate.low: '>=0.7'}\", a comparison in quotes of its own."
        require(is_mapping, "stage.where", self.where, "is no mapping of keys to conditions", remedy)
        for key, default in get_defaults(type(self)).items():
            if key not in ("name", "action", *READS[self.action]):
                self.check_unused(key, default)
        remedy = "Write stage.run=STAGE:NAME, such as stage.run=ppo:latest."
        has_run = self.action not in ("show", "replay") or bool(self.run)
        require(has_run, "stage.run", self.run or "(not given)", f"names no run to {self.action}", remedy)
        self.check_runs()
        self.check_alias()
        require_valid_url(self.host, self.url)
        if self.action == "forget":
            self.check_forget()

    def check_forget(self) -> None:
        """Raise InputError unless exactly one of `annotator`, `source`, `item` and `content_id` is set, and not
        blank."""
        targets = {key: value for key in FORGETS if (value := getattr(self, key)) is not None}
        remedy = "Write one of stage.annotator=NAME, stage.source=NAME, stage.item=ID and stage.content_id=HEX."
        require(bool(targets), "stage.action", "forget", "names nothing to forget", remedy)
        first = next(iter(targets))
        last = next(reversed(targets))
        problem = f"says what to forget, and so does stage.{first}"
        require(len(targets) == 1, f"stage.{last}", targets[last], problem, "Forget one after the other.")
        require(bool(str(targets[last]).strip()), f"stage.{last}", targets[last], "names nothing", remedy)

    def check_unused(self, key: str, default: Any) -> None:
        """Raise InputError if a setting that `stage.action` does not read differs from its default."""
        value = getattr(self, key)
        *actions, last_action = [action for action, keys in READS.items() if key in keys]
        readers = f"{', '.join(actions)} or {last_action}" if actions else last_action
        is_default = value == default or (isinstance(default, list) and list(value) == default)
        remedy = f"Add stage.action={readers}, or drop it."
        if key == "run" and self.action == "list":
            remedy = f"Add stage.action=show, or write \"stage.where={{run: '{self.run}'}}\"."
        require(is_default, f"stage.{key}", value, f"is not read by stage.action={self.action}", remedy)

    def check_runs(self) -> None:
        runs = list(self.runs)
        remedy = 'Write "stage.runs=[ppo:first, ppo:second]".'
        if self.action == "diff":
            require(len(runs) == 2, "stage.runs", runs or "(not given)", "does not name two runs", remedy)
            problem = "prints what differs as lines or as JSON"
            require(self.format != "csv", "stage.format", self.format, problem, "Write stage.format=json.")
        if self.action == "compare":
            values = {"runs": runs or None, "sweep": self.sweep or None, "where": self.where}
            ways = [key for key, value in values.items() if value is not None]
            remedy = f'{remedy} Or choose them: stage.sweep=latest, "stage.where={{stage: ppo, status: done}}".'
            require(bool(ways), "stage.runs", runs or "(not given)", "names no runs to compare", remedy)
            problem = f"chooses runs beside stage.{ways[0]}"
            require(len(ways) == 1, f"stage.{ways[-1]}", values[ways[-1]], problem, "Drop one of the two.")
            if self.where is None:
                remedy = "Drop it, or choose them by stage.where."
                for key, default in (("limit", None), ("sort", "-started")):
                    value = getattr(self, key)
                    require(value == default, f"stage.{key}", value, "has no effect when runs are named", remedy)

    def check_alias(self) -> None:
        is_id = self.response is None or bool(self.response)
        require(is_id, "stage.response", self.response, "is no id of an answer", "Write stage.response=ID, or drop it.")
        if self.action in ("promote", "retire"):
            alias = self.alias or "(not given)"
            is_name = self.alias is not None and NAME.fullmatch(self.alias) is not None
            require(is_name, "stage.alias", alias, "cannot be a name", f"{NAME_REMEDY} Write no @ before it.")
            remedy = 'Add stage.why="REASON": it stays in the log.'
            has_reason = bool((self.why or "").strip())
            require(has_reason, "stage.why", self.why or "(not given)", "gives no reason", remedy)
            has_reason = self.override is None or bool(self.override.strip())
            remedy = "Write why the gate does not count."
            require(has_reason, "stage.override", self.override, "gives no reason", remedy)
            parse_aliases({self.alias: "artifact" if self.arms is None else self.arms}, "stage.arms")
            is_folder = self.gates is None or parse_user_path(self.gates, "stage.gates").is_dir()
            require(is_folder, "stage.gates", self.gates, "is no folder", "Name the folder of the gates.")
        if self.as_of is not None:
            try:
                datetime.fromisoformat(str(self.as_of))
            except ValueError as error:
                remedy = "Write 2026-11-01 or 2026-11-01T12:00:00+00:00."
                raise InputError("stage.as_of", self.as_of, "is no time in ISO 8601", remedy) from error
        has_format = self.action not in ("history", "trace", "replay", "gc", "forget") or self.format != "csv"
        require(
            has_format,
            "stage.format",
            self.format,
            f"is not a format of stage.action={self.action}",
            "Write stage.format=json.",
        )

    def check(self, config: Any) -> None:
        """Raise InputError if both `artifact` and `stage.arms` are set, which name the artifacts for an alias."""
        is_default = config.artifact == get_defaults(type(config))["artifact"]
        problem = "names an artifact beside stage.arms, which names several"
        require(self.arms is None or is_default, "artifact", config.artifact, problem, "Drop one of the two.")
