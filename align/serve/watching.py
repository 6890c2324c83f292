"""What a server looks after while it answers: its engine, the key file, the aliases that its names follow."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from align.serve import events
from align.serve.identity import Allowed
from align.serve.keys import KeysUnreadable
from align.serve.refusals import fault, revoked
from align.serve.service import LOOK_S, Service

KEYS_S = 0.4
"""How often it is looked whether the key file has changed."""
ALIASES_S = 0.5
"""How often it is looked whether an alias has changed."""


async def watch(service: Service) -> None:
    """In the event loop that answers, for as long as it does."""
    await asyncio.gather(engine(service), keys(service), aliases(service))


async def engine(service: Service) -> None:
    """Ends what is under way if the engine has ended: nobody would ever answer it. Then the server ends too, for
    whoever started it to start it again."""
    while service.engine.alive:
        await asyncio.sleep(LOOK_S)
    events.log.error("the engine has stopped: no request is answered any more")
    for call in list(service.answering):
        call.end(fault())
    await asyncio.sleep(LOOK_S)
    service.stopped()


async def aliases(service: Service) -> None:
    """Lets names stand for what their aliases mean by now."""
    while service.following is not None and not service.draining:
        await asyncio.to_thread(service.following.look, service.register, service.unregister)
        await asyncio.sleep(ALIASES_S)


async def keys(service: Service) -> None:
    """Ends what is under way with a key that was revoked, and says which names of tenants are not served."""
    reads, said = 0, set[str]()
    while service.keys is not None:
        with suppress(KeysUnreadable):  # which says so itself
            await asyncio.to_thread(service.keys.look)
            for call in list(service.answering):
                if not service.keys.holds(call.tenant.key):
                    call.end(revoked())
            if reads != service.keys.reads:
                reads, names = service.keys.reads, [named.name for named in service.portfolio.names(Allowed())]
                lines = events.not_served(service.keys.tenants.values(), names)
                for line in lines:
                    if line not in said:
                        events.log.warning("%s", line)
                said = set(lines)
        await asyncio.sleep(KEYS_S)
