"""What is counted while serving: plain numbers that the event loop writes, and anybody may read at any time."""

from typing import Final

from nbdram.memory.histogram import Histogram
from nbdram.protocol.wire import Command

COMMANDS: Final = {int(command): command.name.lower() for command in Command}

# Why the server ends connections that have opened an export.
HANG_UPS: Final = ("idle", "stalled", "forbidden", "removed")

# The hot loop's answers are timed for one batch in so many, which stands for all of them.
SAMPLE_EVERY: Final = 64


class ExportCounters:
    """What all connections of one export have done."""

    def __init__(self) -> None:
        self.operations = dict.fromkeys(COMMANDS.values(), 0)
        self.errors = dict.fromkeys(COMMANDS.values(), 0)
        self.read_bytes = 0
        self.written_bytes = 0
        self.write_waits = 0
        self.out_of_memory = 0  # requests that got ENOSPC because the budget was used up
        self.connections_opened = 0


class ServiceCounters:
    """What all connections of one server have done, beside what their exports count."""

    def __init__(self, handshake_failures: dict[str, int]) -> None:
        self.connections_accepted = 0
        self.handshake_failures = handshake_failures  # by reason
        self.hung_up = dict.fromkeys(HANG_UPS, 0)
        self.protocol_errors = 0  # connections that were closed because the client could not be understood
        self.inline_seconds = {"read": Histogram(), "write": Histogram()}
        self.task_seconds = {name: Histogram() for name in COMMANDS.values()}
        self.write_wait_seconds = Histogram()
