"""What whoever runs a server has to know while it runs: a line each, in the run's log and on the console. No line holds
a key, a prompt or a path of a tenant."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterable
from pathlib import Path

from align.report.words import one_line
from align.run.stale import stale_in
from align.serve.tenants import Tenant

log = logging.getLogger(__name__)


def not_served(tenants: Iterable[Tenant], names: Collection[str]) -> list[str]:
    """A line for each tenant who may ask for names that are not served.

    Args:
        names: that are.
    """
    lines = []
    for tenant in tenants:
        told = []
        for name in sorted((tenant.allowed.names or frozenset()) - set(names)):
            close = difflib.get_close_matches(name, names, n=1)
            told.append(f"{name} (did you mean {close[0]}?)" if close else name)
        if told:
            lines.append(f"tenant {tenant.name} may ask for what is not served: {', '.join(told)}")
    return lines


def tell_if_stale(ref: str, folder: Path) -> None:
    """A warning in the log of a server that answers by what learned from something that was forgotten since.

    Args:
        folder: of the artifact, in that of its run.
    """
    if (stale := stale_in(folder.parent)) is not None:
        log.warning("%s", one_line(f"{ref} is stale since {stale.since[:10]}, {stale.because}"))
