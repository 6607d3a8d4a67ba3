"""The transmission phase: any bytes as a program of requests, of a client's whims, and of reclaim's steps.

What must hold is in `model.py`, and at the end: every request that was sent whole is answered once, the bytes are those
of the model, all pages are accounted for, the server has logged no failure, and all memory comes back.
"""

import gc
from contextlib import suppress
from typing import Final

from .program import Program
from .rig import Rig
from .stand import failures, give_back, loop, stand_for

# Otherwise cycles are left alone: one that keeps a view of the device must be seen.
_COLLECT_EVERY: Final = 2000
_executions = 0
gc.disable()


async def _run(data: bytes) -> None:
    program = Program(data)
    stand = stand_for(program)
    rig = Rig(program, stand)
    try:
        for step in program.steps():
            if rig.transport.closed or rig.has_finished:
                break
            await rig.do(step)
        await rig.finish()
    except BaseException:
        rig.close()
        with suppress(BufferError):  # somebody still has views
            stand.close()
        raise
    rig.close()
    del rig
    stand.restore()
    give_back(program, stand)


def one(data: bytes) -> None:
    """An execution; raises if anything is wrong."""
    global _executions
    _executions += 1
    if _executions % _COLLECT_EVERY == 0:
        gc.collect()
    failures.seen.clear()
    loop.run_until_complete(_run(data))
    assert not failures.seen, failures.seen
