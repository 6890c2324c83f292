"""`stage=annotate`: the annotation store, from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from align.config.addresses import LOOPBACK, check_address
from align.config.settings import Settings, setting
from align.core.errors import require

ACTIONS = {
    "serve": "the ranking page, for browsers",
    "invite": "a link for somebody: an account, a role, or a new password",
    "simulate": "a simulated annotator ranks every item",
    "import": "prompts and answers from a file into the project",
    "configure": "settings, state and guidelines of the project",
    "export": "the votes as files that others train on",
    "verify": "the chain of the ledger, and every content that was not erased",
    "backup": "the whole store in one file",
    "restore": "a backup into an empty store",
    "erase": "an item, an annotator's identity and words, or a whole project",
}
DOES = "; ".join(f"`{action}` {does}" for action, does in ACTIONS.items())
NEEDS_PATH = ("import", "backup", "restore")


@dataclass
class AnnotateConfig(Settings):
    """What is done with the annotation store.

    `serve` serves the ranking page with every project of the store, to people with accounts. If the project has no
    admin, it prints a link for the first one. `simulate` stands in for a person, for demos and tests: it ranks by a
    sentiment score, with noise. `stage=reward` reads all rankings of an item together."""

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
    annotators: int = setting(1, "Number of annotators that `simulate` simulates, each with separate noise.", above=0)
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
        "The annotator to erase, or the person for whom `invite` makes a link. For somebody with an account, the link "
        "sets a new password.",
    )

    def check_together(self) -> None:
        self.check_server()
        require(
            self.path is not None or self.action not in NEEDS_PATH, "stage.path", self.path,
            f"stage.action={self.action} needs a file", "Add stage.path=FILE.",
        )  # fmt: skip
        require(
            self.settings is None or isinstance(self.settings, dict), "stage.settings", self.settings, "is no mapping",
            'Write "stage.settings={overlap: 2}".',
        )  # fmt: skip
        given = self.settings or self.state or self.guidelines
        require(
            self.action != "configure" or bool(given), "stage.settings", self.settings,
            "stage.action=configure is told nothing",
            'Add "stage.settings={overlap: 2}", stage.state=paused or stage.guidelines=FILE.md.',
        )  # fmt: skip
        require(
            self.action != "erase" or [self.item is None, self.annotator is None, not self.whole].count(False) == 1,
            "stage.item", self.item, "stage.action=erase erases an item, an annotator or a whole project",
            "Add one of stage.item=ID, stage.annotator=NAME and stage.whole=true.",
        )  # fmt: skip

    def check_server(self) -> None:
        """Raises InputError where others could reach a server that lets in whoever has a link, or by no name."""
        here = self.host in LOOPBACK
        unlocked = "stage.demo=true lets in whoever has a link, without an account"
        require(
            here or not self.demo, "stage.host", self.host, unlocked,
            "Leave stage.host at 127.0.0.1, or stage.demo=true out.",
        )  # fmt: skip
        require(
            self.url is None or not self.demo, "stage.url", self.url, unlocked,
            "Leave stage.url out, or stage.demo=true.",
        )  # fmt: skip
        check_address(self.host, self.url)
