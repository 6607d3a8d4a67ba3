"""The transmission phase: any bytes as a program of requests, of a client's whims, and of reclaim's steps.

What must hold is in `model.py`, and at the end: every request that was sent whole is answered once, the bytes are those
of the model, all pages are accounted for, the server has logged no failure, and all memory comes back.
"""

from contextlib import suppress

from .program import Program
from .rig import Rig
from .stand import failures, give_back, loop, stand_for


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
    failures.seen.clear()
    loop.run_until_complete(_run(data))
    assert not failures.seen, failures.seen
