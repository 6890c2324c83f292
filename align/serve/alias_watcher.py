"""Names that mean what an alias means: they change when the alias is moved."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from align.core.aliases import Arm as Written
from align.core.errors import AlignError, InputError, require
from align.report.figure_text import one_line
from align.run import Artifact
from align.run.alias_log import FILE
from align.serve import operator_log
from align.serve.adapter_folders import check_adapter, check_signed, origin_of, version_of, warn_if_stale
from align.serve.model_names import Arm, Portfolio
from align.serve.startup import FIELD, build_arm, check_base, expand_aliases

AGAIN_S = 5.0
"""After so long it is tried again to follow what could not be followed."""


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
        self.root = root
        self.written = written
        self.portfolio = portfolio
        self.dtypes = {dtype for dtype in dtypes if dtype not in (None, "auto")}
        self._stamp: tuple[int, int] | None = None  # an alias may have changed while the base was loaded
        self._said = dict[str, str]()
        self._again_at = 0.0

    def stamp(self) -> tuple[int, int] | None:
        """Another one after each change of an alias; None where there is no log."""
        with suppress(OSError):
            stat = os.stat(self.root / FILE)
            return stat.st_mtime_ns, stat.st_size
        return None

    def look(self) -> None:
        """Let the names refer to what their aliases mean by now, if the log has changed. What cannot be followed is
        logged once, is tried again from time to time, and its name stays with what it referred to."""
        stamp = self.stamp()
        if stamp == self._stamp and not (self._said and time.monotonic() >= self._again_at):
            return
        for name, arms in self.written.items():
            try:
                self.follow(name, arms)
                self._said.pop(name, None)
            except Exception as error:  # whatever its files do to their readers: the server goes on
                why = str(error) if isinstance(error, AlignError) else repr(error)
                if self._said.get(name) != why:
                    self._said[name] = why
                    line = f"{name} stays with {self.portfolio.describe(name)}: {why}"
                    operator_log.warning("%s", one_line(line))
        self._stamp = stamp
        self._again_at = time.monotonic() + AGAIN_S

    def follow(self, name: str, written: Sequence[Written]) -> None:
        """Let one name follow its alias.

        Raises:
            AlignError: what its alias means is gone, or does not go with the served base.
        """
        present = {arm.ref: arm for arm in self.portfolio.arms(name)}
        if not present:
            return  # somebody took it away
        field = f"{FIELD}.{name}"
        artifacts = dict[str, Artifact]()
        arms = expand_aliases(written, self.root, field, artifacts)
        for ref, artifact in artifacts.items():
            self.check(field, ref, artifact)
        versions = {ref: version_of(artifact) for ref, artifact in artifacts.items()}
        now = [
            build_arm(arm, name, self.written, versions, artifacts)
            if arm.ref in artifacts
            else self.other(field, arm, present)
            for arm in arms
        ]
        if now != [*present.values()]:
            followers = ", ".join(self.portfolio.followers_of(name))
            problem = f"shall stand for {len(now)} artifacts, and {followers} stands for it"
            remedy = "Write the alias in place of the name."
            require(len(now) == 1 or not followers, field, name, problem, remedy)
            self.check_kind(field, now, [*present.values()])
            before = self.portfolio.describe(name)
            self.portfolio.stand_for(name, now)
            for ref, artifact in artifacts.items():
                warn_if_stale(ref, artifact.path)
            operator_log.info("%s follows: %s, was %s", name, self.portfolio.describe(name), before)

    def other(self, field: str, arm: Written, standing: Mapping[str, Arm]) -> Arm:
        """An arm that is no alias's: it stands as it stood, with its weight."""
        present = standing.get(arm.ref)
        if present is None:
            raise InputError(field, arm.ref, "is not there any more", "Start the server again.")
        # What another name stands for is looked up when it is asked for: here it would hold that name's old weights.
        return (
            replace(present, version=None, weight=arm.weight)
            if present.follows
            else replace(present, weight=arm.weight)
        )

    def check_kind(self, field: str, now: Sequence[Arm], before: Sequence[Arm]) -> None:
        """Raises InputError where a policy would become a reward model, which gives no answers, or the other way."""
        kinds = [{arm.version is not None and arm.version.scores for arm in arms} for arms in (now, before)]
        problem = "would stand for a reward model in place of a policy, or for a policy in place of a reward model"
        require(kinds[0] == kinds[1], field, now[0].label, problem, "Give each a name of its own.")

    def check(self, field: str, ref: str, artifact: Artifact) -> None:
        """Raises InputError where an artifact is not signed, or does not go with the served base."""
        base = self.portfolio.base
        method = self.portfolio.method
        check_signed(artifact.path, self.portfolio.signer, field, ref)
        check_adapter(artifact.path, field, ref)
        origin = origin_of(artifact)
        check_base(origin, base, field, ref, "Serve it by a server of its own.")
        problem = f"was trained with method={origin.method}, and this server has method={method}"
        require(origin.method in (None, method), field, ref, problem, "Serve it by a server of its own.")
        fits = method != "qlora" or not self.dtypes or artifact.dtype in (None, "auto", *self.dtypes)
        problem = f"was trained on NF4 codes of a base in {artifact.dtype}, and this server has others"
        require(fits, field, ref, problem, "Serve it by a server of its own.")
