"""Connections of which nothing is heard: idle for too long, or in the middle of a request or of a reply.

Who looks pays: `Connection.active` is set by whatever a client does, and is cleared here, some ten times per time-out.
"""

import asyncio
import logging
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from nbdram.server.service import Service

log = logging.getLogger("nbdram.connection")

_SHORTEST_S: Final = 0.02
_LONGEST_S: Final = 5.0


async def hang_up_on_the_quiet(service: "Service") -> None:
    while True:
        limits = service.limits
        timeouts = [seconds for seconds in (limits.idle_timeout_s, limits.stall_timeout_s) if seconds]
        await asyncio.sleep(max(_SHORTEST_S, min([_LONGEST_S, *(seconds / 10 for seconds in timeouts)])))
        sweep(service, asyncio.get_running_loop().time())


def sweep(service: "Service", now: float) -> None:
    limits = service.limits
    for connection in list(service.connections):
        waits_for = connection.waits_for
        if connection.active or not waits_for:
            connection.active = False
            connection.quiet_since = now
            continue
        reason, limit = (
            ("idle", limits.idle_timeout_s) if waits_for == "request" else ("stalled", limits.stall_timeout_s)
        )
        if limit and now - connection.quiet_since >= limit:
            service.counters.hung_up[reason] += 1
            log.info("%s is %s for %g s: hung up on", connection.peer, reason, limit)
            connection.abort()
