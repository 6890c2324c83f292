"""`stage=annotate`: the annotation store, from the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from align.config.root import one_of, positive
from align.config.settings import Settings
from align.errors import require

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
    "migrate": "an older store's tables brought up to date",
    "erase": "an item, or an annotator's identity and words",
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
NEEDS_PATH = ("import", "backup", "restore")


@dataclass
class AnnotateConfig(Settings):
    """What is done with the annotation store: `action`, one of those above.

    `serve` shows the ranking page to whoever has an account, at `port` of `host`, every project of the store; browsers
    know it as `url`. While the project has no admin it prints a link for the first one. `demo` needs no account: it
    prints a link for the user who is logged in on this machine, and serves the loopback interface alone.

    `invite` prints a link, for the project: `role` is what it gives. `annotator` is whom it is for: of somebody who has
    an account it sets a new password.

    `simulate` is a documented stand-in for a person, for demos and tests: it ranks by a sentiment score, with noise
    such that it agrees with the noiseless order on the share `agreement` of untied pairs. `annotators` of them judge
    every item, each with noise of its own: their rankings of an item are read together by `stage=reward`.

    `path` is the file to import, to back up into or to restore from; `source` names an imported file's rows.
    `settings`, `state` and `guidelines` (a Markdown file) are the project's. `head` is a run that read the store, such
    as `reward:latest`: `verify` finds a tail that was cut since. `item` or `annotator` is whom `erase`
    concerns.
    """

    name: str = "annotate"
    action: str = "serve"
    host: str = "127.0.0.1"
    port: int = 7861
    url: str | None = None
    demo: bool = False
    role: str = "annotator"
    annotators: int = 1
    agreement: float = 0.75
    path: str | None = None
    source: str = ""
    settings: Any = None
    state: str | None = None
    guidelines: str | None = None
    head: str | None = None
    item: str | None = None
    annotator: str | None = None

    def __post_init__(self) -> None:
        one_of("stage.action", self.action, tuple(ACTIONS))
        positive("stage.annotators", self.annotators)
        known = 1024 <= self.port < 65536
        require(known, "stage.port", self.port, "is no port of a user's", "Give a number from 1024 to 65535.")
        one_of("stage.role", self.role, ("annotator", "reviewer", "admin"))
        here = self.host in LOOPBACK
        require(
            here or not self.demo,
            "stage.host",
            self.host,
            "stage.demo=true lets in whoever has a link, without an account",
            "Leave stage.host at 127.0.0.1, or stage.demo=true out.",
        )
        require(
            self.url is None or not self.demo,
            "stage.url",
            self.url,
            "stage.demo=true lets in whoever has a link, without an account",
            "Leave stage.url out, or stage.demo=true.",
        )
        require(
            here or self.url is not None,
            "stage.url",
            self.url,
            "others than this machine are to reach the server, and nobody said under which name",
            "Say what browsers will show, such as stage.url=https://annotate.example.org.",
        )
        require(
            self.url is None or is_origin(self.url),
            "stage.url",
            self.url,
            "is no address of a server of its own",
            "Write https://HOST or https://HOST:PORT, without a path.",
        )
        require(
            0.5 < self.agreement < 1,
            "stage.agreement",
            self.agreement,
            "is no agreement better than chance",
            "Give a share above 0.5 and below 1.",
        )
        named = self.path is not None
        require(
            named or self.action not in NEEDS_PATH,
            "stage.path",
            self.path,
            f"stage.action={self.action} needs a file",
            "Add stage.path=FILE.",
        )
        require(
            self.settings is None or isinstance(self.settings, dict),
            "stage.settings",
            self.settings,
            "is no mapping",
            'Write "stage.settings={overlap: 2}".',
        )
        told = self.settings or self.state or self.guidelines
        require(
            self.action != "configure" or bool(told),
            "stage.settings",
            self.settings,
            "stage.action=configure is told nothing",
            'Add "stage.settings={overlap: 2}", stage.state=paused or stage.guidelines=FILE.md.',
        )
        require(
            self.action != "erase" or (self.item is None) != (self.annotator is None),
            "stage.item",
            self.item,
            "stage.action=erase erases an item or an annotator",
            "Add stage.item=ID or stage.annotator=NAME.",
        )


def is_origin(url: str) -> bool:
    """Whether a URL names a scheme, a host and perhaps a port, as a browser's `Origin` does."""
    return re.fullmatch(r"https?://([\w.-]+|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?", url) is not None
