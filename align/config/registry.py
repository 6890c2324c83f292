"""`stage=registry`: questions asked of the run folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from align.config.settings import Settings, setting
from align.errors import require

ACTIONS = {
    "list": "prints the runs under run.root, one a line",
    "show": "prints everything that is known of one",
    "diff": "prints what differs between two of one stage",
    "rebuild": "makes the index of the runs from nothing",
}
DOES = "; ".join(f"`{action}` {does}" for action, does in ACTIONS.items())
FORMATS = ("table", "json", "csv")


@dataclass
class RegistryConfig(Settings):
    """What is known of all runs under `run.root`. It makes no run. The run folders are the truth: an index beside them
    is brought up to date at each question, and can be removed at any time."""

    AT: ClassVar[str] = "stage"

    name: str = "registry"
    action: str = setting("list", f"What is done: {DOES}.", choices=tuple(ACTIONS))
    run: str | None = setting(None, "The run that `show` shows: STAGE:NAME, STAGE:latest or a run's folder.")
    runs: list[str] = setting([], "The two runs that `diff` compares, such as [ppo:first, ppo:second].")
    where: Any = setting(
        None,
        "Conditions that listed runs meet, such as {stage: ppo, metrics.win_rate.low: '>=0.7'}. A value, a list of "
        "values of which one is met, a text with `*`, or a comparison: `>=`, `<=`, `>`, `<`, `!=`, `=`.",
    )
    sort: Any = setting(
        "-started", "The key by which runs are listed, or a list of keys. With `-` in front: from high to low."
    )
    columns: list[str] = setting([], "Keys that are listed, such as [run, metrics.loss_after]. Empty: the usual ones.")
    limit: int | None = setting(
        None,
        "How many runs are listed. Not given: 100 in a table, all in other formats.",
        above=0,
        at_most=10**9,
    )
    format: str = setting("table", "How runs are printed: for eyes or for programs.", choices=FORMATS)

    def check_together(self) -> None:
        sort = self.sort if isinstance(self.sort, list | tuple) else [self.sort]
        texts = all(isinstance(key, str) and key.removeprefix("-") for key in sort)
        require(texts, "stage.sort", self.sort, "names no key", "Write stage.sort=-started, or a list of keys.")
        given = self.where is None or isinstance(self.where, Mapping)
        remedy = "Write \"stage.where={stage: ppo, metrics.win_rate.low: '>=0.7'}\", a comparison in quotes of its own."
        require(given, "stage.where", self.where, "is no mapping of keys to conditions", remedy)
        asks = self.action == "show"
        remedy = "Write stage.run=STAGE:NAME, such as stage.run=ppo:latest."
        require(not asks or bool(self.run), "stage.run", self.run or "(not given)", "names no run to show", remedy)
        remedy = f"Add stage.action=show, or write \"stage.where={{run: '{self.run}'}}\"."
        require(asks or self.run is None, "stage.run", self.run, f"says nothing to stage.action={self.action}", remedy)
        for key in ("where", "limit"):
            alone = self.action == "list" or getattr(self, key) is None
            remedy = "Add stage.action=list, or drop it."
            problem = f"says nothing to stage.action={self.action}"
            require(alone, f"stage.{key}", getattr(self, key), problem, remedy)
        runs, two = list(self.runs), self.action == "diff"
        remedy = 'Write "stage.runs=[ppo:first, ppo:second]".'
        require(not two or len(runs) == 2, "stage.runs", runs or "(not given)", "are not two runs", remedy)
        remedy = "Add stage.action=diff, or drop it."
        require(two or not runs, "stage.runs", runs, f"says nothing to stage.action={self.action}", remedy)
        problem, remedy = "prints what differs as lines or as JSON", "Write stage.format=json."
        require(not two or self.format != "csv", "stage.format", self.format, problem, remedy)
