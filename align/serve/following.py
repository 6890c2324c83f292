"""Names of a server that mean what an alias means: asked again while it runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from align.aliases import Arm as Written
from align.errors import AlignError, InputError, require
from align.run import Artifact
from align.run.alias_log import FILE
from align.serve import events
from align.serve.adapter_folders import check_adapter, origin_of, version_of
from align.serve.identity import Allowed, Arm, Hook, Portfolio
from align.serve.opening import FIELD, arm_of, told


class Following:
    """The names that follow aliases.

    Args:
        root: the folder of runs, in which the log of the aliases lies.
        written: name → its arms as the command line has them.
        portfolio: whose names these are.
        dtypes: in which the adapters were trained that the server began with; on NF4 codes of another dtype nothing
            else is right.
    """

    def __init__(
        self, root: Path, written: Mapping[str, Sequence[Written]], portfolio: Portfolio, dtypes: Sequence[str | None]
    ) -> None:
        self.root, self.written, self.portfolio = root, written, portfolio
        self.dtypes = {dtype for dtype in dtypes if dtype not in (None, "auto")}
        self._stamp, self._said = self.stamp(), dict[str, str]()

    def stamp(self) -> tuple[int, int] | None:
        """Another one after each change of an alias; None where there is no log."""
        with suppress(OSError):
            found = os.stat(self.root / FILE)
            return found.st_mtime_ns, found.st_size
        return None

    def look(self, ready: Hook, gone: Hook) -> None:
        """Let the names stand for what their aliases mean by now, if the log has changed. What cannot be followed is
        said once, and its name stays with what it stood for.

        Args:
            ready, gone: see `Portfolio.stand_for`.
        """
        stamp = self.stamp()
        if stamp == self._stamp:
            return
        for name, arms in self.written.items():
            try:
                self.follow(name, arms, ready, gone)
                self._said.pop(name, None)
            except Exception as error:  # whatever its files do to their readers: the server goes on
                why = str(error) if isinstance(error, AlignError) else repr(error)
                if self._said.get(name) != why:
                    self._said[name] = why
                    events.log.warning("%s stays with %s: %s", name, self.meaning(name), why)
        self._stamp = stamp

    def follow(self, name: str, written: Sequence[Written], ready: Hook, gone: Hook) -> None:
        """One name.

        Raises:
            AlignError: what its alias means is gone, or does not go with the served base.
        """
        field, artifacts = f"{FIELD}.{name}", dict[str, Artifact]()
        arms = told(written, self.root, field, artifacts)
        for ref, artifact in artifacts.items():
            self.check(field, ref, artifact)
        standing = {arm.ref: arm for arm in self.portfolio.arms(name)}
        versions = {ref: version_of(artifact, self.portfolio.base.digest) for ref, artifact in artifacts.items()}
        now = [
            arm_of(arm, name, self.written, versions, artifacts) if arm.ref in artifacts
            else self.other(field, arm, standing)
            for arm in arms
        ]  # fmt: skip
        if now != [*standing.values()]:
            self.check_followers(field, name, len(now))
            before = self.meaning(name)
            self.portfolio.stand_for(name, now, ready, gone)
            events.log.info("%s follows: %s, was %s", name, self.meaning(name), before)

    def check_followers(self, field: str, name: str, arms: int) -> None:
        """Raises InputError where other names stand for what this one stands for, and that shall be several things."""
        named = self.portfolio.names(Allowed())
        followers = [one.name for one in named if any(arm.follows == name for arm in one.arms)]
        problem = f"shall stand for {arms} artifacts, and {', '.join(followers)} stands for it"
        require(arms == 1 or not followers, field, name, problem, "Write the alias in place of the name.")

    def other(self, field: str, arm: Written, standing: Mapping[str, Arm]) -> Arm:
        """An arm that is no alias's: it stands as it stood, with its weight."""
        found = standing.get(arm.ref)
        if found is None:
            raise InputError(field, arm.ref, "is not there any more", "Start the server again.")
        return found

    def check(self, field: str, ref: str, artifact: Artifact) -> None:
        """Raises InputError where an artifact does not go with the served base."""
        base, method = self.portfolio.base, self.portfolio.method
        check_adapter(artifact.path, field, ref)
        origin = origin_of(artifact)
        problem = f"was trained on another base ({(origin.base or '')[:12]}) than {base.id} ({base.digest[:12]})"
        require(origin.base in (None, base.digest), field, ref, problem, "Serve it by a server of its own.")
        problem = f"was trained with method={origin.method}, and this server has method={method}"
        require(origin.method in (None, method), field, ref, problem, "Serve it by a server of its own.")
        fits = method != "qlora" or not self.dtypes or artifact.dtype in (None, "auto", *self.dtypes)
        problem = f"was trained on NF4 codes of a base in {artifact.dtype}, and this server has others"
        require(fits, field, ref, problem, "Serve it by a server of its own.")

    def meaning(self, name: str) -> str:
        return ", ".join(self.in_words(name)) or "nothing"

    def in_words(self, name: str) -> Iterator[str]:
        arms = self.portfolio.arms(name)
        for arm in arms:
            share = f"{arm.weight:.3g} of " if len(arms) > 1 else ""
            yield f"{share}{arm.label} ({self.portfolio.digest_of(arm.version)[:12]})"
