"""Tasks that run beside the requests: they watch the engine, the key file and the aliases."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Collection, Iterable
from contextlib import suppress

from align.serve import operator_log
from align.serve.errors import fault, revoked
from align.serve.model_names import Allowed
from align.serve.service import LOOK_S, Service
from align.serve.tenants import KeysUnreadable, Tenant

KEYS_S = 0.4
"""Seconds between two looks at the key file."""
ALIASES_S = 0.5
"""Seconds between two looks at the aliases."""


async def run_background_tasks(service: Service) -> None:
    """Run until cancelled, in the event loop of the server."""
    await asyncio.gather(watch_engine(service), watch_keys(service), watch_aliases(service))


async def watch_engine(service: Service) -> None:
    """End the calls and then the server when the engine has stopped, so that a supervisor starts the server again."""
    while service.engine.alive:
        await asyncio.sleep(LOOK_S)
    operator_log.error("the engine has stopped: no request is answered any more")
    for call in list(service.answering):
        call.end(fault())
    await asyncio.sleep(LOOK_S)
    service.stopped()


async def watch_aliases(service: Service) -> None:
    """Update the names that follow aliases."""
    while service.following is not None and not service.draining:
        await asyncio.to_thread(service.following.look, service.register, service.unregister)
        await asyncio.sleep(ALIASES_S)


async def watch_keys(service: Service) -> None:
    """End calls whose key was revoked, and warn about tenants' names that are not served."""
    reads = 0
    reported = set[str]()
    while service.keys is not None:
        with suppress(KeysUnreadable):  # `Keys` logs it
            await asyncio.to_thread(service.keys.reload_if_changed)
            for call in list(service.answering):
                if not service.keys.holds(call.tenant.key):
                    call.end(revoked())
            if reads != service.keys.reads:
                reads = service.keys.reads
                served = [named.name for named in service.portfolio.names(Allowed())]
                lines = describe_unserved_names(service.keys.tenants.values(), served)
                for line in lines:
                    if line not in reported:
                        operator_log.warning("%s", line)
                reported = set(lines)
        await asyncio.sleep(KEYS_S)


def describe_unserved_names(tenants: Iterable[Tenant], served: Collection[str]) -> list[str]:
    """Return a line for each tenant whose key allows names that are not served."""
    lines = []
    for tenant in tenants:
        unserved = []
        for name in sorted((tenant.allowed.names or frozenset()) - set(served)):
            close = difflib.get_close_matches(name, served, n=1)
            unserved.append(f"{name} (did you mean {close[0]}?)" if close else name)
        if unserved:
            lines.append(f"tenant {tenant.name} may ask for what is not served: {', '.join(unserved)}")
    return lines
