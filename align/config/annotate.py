"""Settings of `stage=annotate`, which serves the annotation app and manages its store."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from align.config.addresses import LOOPBACK, require_valid_url
from align.config.scorers import RewardConfig, enumerate_mappings, parse_reward_part
from align.config.settings import Settings, get_declarations, setting
from align.core.errors import InputError, require

ACTIONS = {
    "serve": "the ranking page, for browsers",
    "invite": "a link for somebody: an account, a role, or a new password",
    "simulate": "an annotator who ranks every item",
    "import": "prompts and answers from a file into the project",
    "configure": "settings, state and guidelines of the project",
    "export": "the votes as files that others train on",
    "verify": "the chain of the ledger, and every content that was not erased",
    "backup": "the whole store in one file",
    "restore": "a backup into an empty store",
    "assess": "the annotators: their traits by a model, and alarms about those who may not judge the answers",
    "quarantine": "an annotator, whose votes stay and do not count",
    "release": "an annotator from quarantine, whose votes count again",
    "erase": "an item, an annotator's identity and words, or a whole project",
}
DOES = "; ".join(f"`{action}` {does}" for action, does in ACTIONS.items())
NEEDS_PATH = ("import", "backup", "restore")


@dataclass
class SimulatedAnnotator(Settings):
    """One of the annotators that `stage.action=simulate` simulates. The position bias is added after the noise was
    chosen for the agreement, and lowers it."""

    AT: ClassVar[str] = "stage.annotators"

    agreement: float = setting(
        0.75, "Share of untied pairs that it ranks as in the noiseless order.", above=0.5, below=1
    )
    position_bias: float = setting(0.0, "Added to the utility of the answer that is shown first.")
    reward: Any = setting(None, "The reward that it ranks by, a mapping with its name and settings.")

    def check_together(self) -> None:
        if self.reward is not None:
            self.parse_reward(self.AT)

    def parse_reward(self, field: str) -> RewardConfig:
        remedy = 'Write "reward: {name: fn, fn: package.module:name}", with the settings of that reward.'
        require(isinstance(self.reward, Mapping), f"{field}.reward", self.reward, "is no mapping", remedy)
        return parse_reward_part(f"{field}.reward", self.reward)


@dataclass
class AnnotateConfig(Settings):
    """Serves and manages the annotation store.

    `serve` serves the ranking page with every project of the store, to people with accounts. If the project has no
    admin, it prints a link for the first one. `simulate` replaces people, for demos and tests: it ranks by
    `reward=`, by default a sentiment score, with noise. `stage=reward` reads all rankings of an item together."""

    AT: ClassVar[str] = "stage"

    name: str = "annotate"
    action: str = setting("serve", f"What is done: {DOES}.", choices=tuple(ACTIONS))
    host: str = setting("127.0.0.1", "Interface that `serve` listens at.")
    port: int = setting(7861, "Port that `serve` listens at.", at_least=1024, at_most=65535)
    url: str | None = setting(None, "The server's address in browsers, such as https://annotate.example.org.")
    demo: bool = setting(
        False,
        "`serve` without accounts: print a link for the user who is logged in on this machine. The server listens on "
        "the loopback interface only.",
    )
    role: str = setting(
        "annotator", "Role in the project that the link of `invite` gives.", choices=("annotator", "reviewer", "admin")
    )
    annotators: Any = setting(
        1,
        "The annotators that `simulate` simulates, each with separate noise: their number, or a list with a mapping "
        "for each, such as [{agreement: 0.85}, {agreement: 0.6, position_bias: 1, reward: {name: fn, fn: "
        "package.module:name}}]. What a mapping leaves out is as `stage.agreement` and `reward` say. `position_bias` "
        "is added to the utility of the answer that is shown first, a random one: at 1 it is preferred to an equal one "
        "in 73 % of cases, and fewer pairs than `agreement` says are ranked as in the noiseless order.",
    )
    agreement: float = setting(
        0.75, "Share of untied pairs that `simulate` ranks as in the noiseless order.", above=0.5, below=1
    )
    path: str | None = setting(None, "The file to import, to back up into, or to restore from.")
    source: str = setting("", "A name for the rows of an imported file.")
    settings: Any = setting(None, "Settings of the project, a mapping, for `configure`.")
    state: str | None = setting(None, "State of the project, for `configure`.")
    guidelines: str | None = setting(None, "A Markdown file with the project's guidelines, for `configure`.")
    head: str | None = setting(
        None,
        "A run that read the store, such as reward:latest. `verify` then also finds rows that were cut off at the end "
        "since that run.",
    )
    item: str | None = setting(None, "The item to erase.")
    whole: bool = setting(
        False,
        "`erase` erases the whole project: items, annotators, guidelines, and the key of its rows' ids in data sets.",
    )
    annotator: str | None = setting(
        None,
        "The annotator to erase, to put into quarantine or to release, or the person for whom `invite` makes a link. "
        "For somebody with an account, the link sets a new password.",
    )

    def check_together(self) -> None:
        self.check_server()
        has_path = self.path is not None or self.action not in NEEDS_PATH
        problem = f"stage.action={self.action} needs a file"
        require(has_path, "stage.path", self.path, problem, "Add stage.path=FILE.")
        is_mapping = self.settings is None or isinstance(self.settings, dict)
        remedy = 'Write "stage.settings={overlap: 2}".'
        require(is_mapping, "stage.settings", self.settings, "is no mapping", remedy)
        if self.action == "configure":
            has_changes = bool(self.settings or self.state or self.guidelines)
            remedy = 'Add "stage.settings={overlap: 2}", stage.state=paused or stage.guidelines=FILE.md.'
            require(has_changes, "stage.settings", self.settings, "stage.action=configure names no change", remedy)
        self.parse_annotators()
        problem = f"stage.action={self.action} is about an annotator, and none is named"
        is_named = self.annotator is not None or self.action not in ("quarantine", "release")
        require(is_named, "stage.annotator", self.annotator, problem, "Add stage.annotator=NAME.")
        if self.action == "erase":
            has_one_target = [self.item is None, self.annotator is None, not self.whole].count(False) == 1
            problem = "stage.action=erase erases an item, an annotator or a whole project"
            remedy = "Add one of stage.item=ID, stage.annotator=NAME and stage.whole=true."
            require(has_one_target, "stage.item", self.item, problem, remedy)

    def parse_annotators(self) -> list[SimulatedAnnotator]:
        """Return the settings of each simulated annotator.

        Raises:
            InputError: `stage.annotators` is neither a number above 0 nor a list of mappings with valid settings.
        """
        field = "stage.annotators"
        if isinstance(self.annotators, int) and not isinstance(self.annotators, bool):
            require(self.annotators > 0, field, self.annotators, "is not above 0", "Write stage.annotators=4.")
            return [SimulatedAnnotator(self.agreement)] * self.annotators
        annotators = []
        for where, entry in enumerate_mappings(field, self.annotators):
            for key in entry:
                remedy = f"Its settings: {', '.join(get_declarations(SimulatedAnnotator))}."
                is_known = key in get_declarations(SimulatedAnnotator)
                require(is_known, f"{where}.{key}", entry[key], "is no setting of a simulated annotator", remedy)
            for key in entry.keys() & {"agreement", "position_bias"}:
                value = entry[key]
                is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
                require(is_number, f"{where}.{key}", value, "is no finite number", "Give a number.")
            try:
                annotators.append(SimulatedAnnotator(**{"agreement": self.agreement, **entry}))
            except InputError as error:
                raise InputError(
                    error.field.replace(field, where, 1), error.value, error.problem, error.remedy
                ) from error
        return annotators

    def check_server(self) -> None:
        """Raise InputError if other machines could reach a demo server without accounts, or `stage.url` is invalid.

        A server that other machines reach must have a `stage.url`.
        """
        if self.demo:
            problem = "stage.demo=true lets in anyone with a link, without an account"
            remedy = "Leave stage.host at 127.0.0.1, or stage.demo=true out."
            require(self.host in LOOPBACK, "stage.host", self.host, problem, remedy)
            require(self.url is None, "stage.url", self.url, problem, "Leave stage.url out, or stage.demo=true.")
        require_valid_url(self.host, self.url)
