"""Updates of the served model names that refer to registry aliases, when an alias is moved."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from align.core.aliases import Arm as ArmReference
from align.core.errors import AlignError, InputError, require
from align.report.figure_text import escape_unprintable
from align.run import Artifact
from align.run.alias_log import FILE
from align.serve import operator_log
from align.serve.adapter_folders import (
    read_origin,
    read_version,
    require_lora_adapter,
    require_signature,
    warn_if_stale,
)
from align.serve.model_names import Arm, Portfolio
from align.serve.startup import FIELD, build_arm, expand_aliases, require_same_base

RETRY_S = 5.0
"""Seconds after which the update of a name is tried again if it failed."""


class AliasWatcher:
    """A watcher of the alias log, which replaces the adapters of served names when their aliases are moved.

    Args:
        root: the folder of runs, which holds the log of the aliases.
        arm_references: name → its arms as written on the command line.
        portfolio: the portfolio that the names belong to.
        dtypes: training dtypes of the adapters that the server started with. NF4 codes depend on the dtype, so that
            an adapter of another dtype does not fit.
    """

    def __init__(
        self,
        root: Path,
        arm_references: Mapping[str, Sequence[ArmReference]],
        portfolio: Portfolio,
        dtypes: Sequence[str | None],
    ) -> None:
        self.root = root
        self.arm_references = arm_references
        self.portfolio = portfolio
        self.dtypes = {dtype for dtype in dtypes if dtype not in (None, "auto")}
        self._stamp: tuple[int, int] | None = None  # an alias may have changed while the base was loaded
        self._reported_errors = dict[str, str]()
        self._retry_at = 0.0

    def read_log_stamp(self) -> tuple[int, int] | None:
        """Return the alias log's modification time in ns and size in bytes, or None if there is no log.

        They change with each change of an alias.
        """
        with suppress(OSError):
            stat = os.stat(self.root / FILE)
            return stat.st_mtime_ns, stat.st_size
        return None

    def update(self) -> None:
        """Point the served names to the present targets of their aliases, if the alias log has changed.

        A name that cannot be updated keeps its arms. The error is logged once, and the update is tried again every
        `RETRY_S` seconds.
        """
        stamp = self.read_log_stamp()
        if stamp == self._stamp and not (self._reported_errors and time.monotonic() >= self._retry_at):
            return
        for name, arms in self.arm_references.items():
            try:
                self.update_name(name, arms)
                self._reported_errors.pop(name, None)
            except Exception as error:  # damaged files may raise anything; the server goes on
                problem = str(error) if isinstance(error, AlignError) else repr(error)
                if self._reported_errors.get(name) != problem:
                    self._reported_errors[name] = problem
                    line = f"{name} stays with {self.portfolio.describe(name)}: {problem}"
                    operator_log.warning("%s", escape_unprintable(line))
        self._stamp = stamp
        self._retry_at = time.monotonic() + RETRY_S

    def update_name(self, name: str, arm_references: Sequence[ArmReference]) -> None:
        """Point one served name to the present targets of its aliases, after checking that they fit the served base.

        Does nothing if the name was unloaded.

        Raises:
            AlignError: a target of the alias is missing, or does not fit the served base.
        """
        old_arms = {arm.ref: arm for arm in self.portfolio.arms(name)}
        if not old_arms:
            return  # the name was unloaded
        field = f"{FIELD}.{name}"
        artifacts = dict[str, Artifact]()
        arms = expand_aliases(arm_references, self.root, field, artifacts)
        for ref, artifact in artifacts.items():
            self.require_servable(field, ref, artifact)
        versions = {ref: read_version(artifact) for ref, artifact in artifacts.items()}
        new_arms = [
            build_arm(arm, name, self.arm_references, versions, artifacts)
            if arm.ref in artifacts
            else self.get_fixed_arm(field, arm, old_arms)
            for arm in arms
        ]
        if new_arms != [*old_arms.values()]:
            followers = ", ".join(self.portfolio.find_followers(name))
            problem = f"would refer to {len(new_arms)} artifacts, but {followers} refers to it"
            remedy = "Write the alias in place of the name."
            require(len(new_arms) == 1 or not followers, field, name, problem, remedy)
            self.require_same_kind(field, new_arms, [*old_arms.values()])
            description_before = self.portfolio.describe(name)
            self.portfolio.replace_arms(name, new_arms)
            for ref, artifact in artifacts.items():
                warn_if_stale(ref, artifact.path)
            operator_log.info("%s follows: %s, was %s", name, self.portfolio.describe(name), description_before)

    def get_fixed_arm(self, field: str, arm: ArmReference, old_arms: Mapping[str, Arm]) -> Arm:
        """Return the present adapter of a reference that is no alias, with its weight from the command line.

        Raises InputError if the name has no such adapter any more.
        """
        old_arm = old_arms.get(arm.ref)
        if old_arm is None:
            raise InputError(field, arm.ref, "is not there any more", "Start the server again.")
        # The weights of a followed name are looked up at each request: a version stored here would be the old one.
        return (
            replace(old_arm, version=None, weight=arm.weight)
            if old_arm.follows
            else replace(old_arm, weight=arm.weight)
        )

    def require_same_kind(self, field: str, new_arms: Sequence[Arm], old_arms: Sequence[Arm]) -> None:
        """Raise InputError if an update would replace a policy by a reward model or a reward model by a policy.

        A reward model gives no answers.
        """
        kinds = [
            {arm.version is not None and arm.version.is_reward_model for arm in arms} for arms in (new_arms, old_arms)
        ]
        problem = "would refer to a reward model in place of a policy, or to a policy in place of a reward model"
        require(kinds[0] == kinds[1], field, new_arms[0].label, problem, "Give each a name of its own.")

    def require_servable(self, field: str, ref: str, artifact: Artifact) -> None:
        """Raise InputError unless an artifact is a signed LoRA adapter trained on the served base and method.

        The signature is checked only if the server requires one, and the base and method only if they are recorded.
        """
        base = self.portfolio.base
        method = self.portfolio.method
        require_signature(artifact.path, self.portfolio.signer, field, ref)
        require_lora_adapter(artifact.path, field, ref)
        origin = read_origin(artifact)
        require_same_base(origin, base, field, ref, "Start a separate server for it.")
        problem = f"was trained with method={origin.method}, and this server has method={method}"
        require(origin.method in (None, method), field, ref, problem, "Start a separate server for it.")
        fits = method != "qlora" or not self.dtypes or artifact.dtype in (None, "auto", *self.dtypes)
        problem = f"was trained on NF4 codes of a base in {artifact.dtype}, and this server has others"
        require(fits, field, ref, problem, "Start a separate server for it.")
