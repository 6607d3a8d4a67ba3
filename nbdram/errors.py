"""The few exceptions of our own; everything else inside is OSError with an errno.

NbdramError            one sentence for the user; the command ends with exit code 1
+-- UsageError         the command line or the configuration is wrong; exit code 2
+-- NoSuchExport       what was asked for by name is not there
+-- Conflict           the state of things is against it; later, or with other words, it may go
+-- ProtocolError      a peer broke the protocol beyond repair; its connection is closed
"""


class NbdramError(Exception):
    """Something went wrong; its text is one clear sentence that says what to do."""


class UsageError(NbdramError):
    """What was asked for makes no sense; nothing was started."""


class NoSuchExport(NbdramError):
    """No export has this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no export called {name!r}: `nbdram exports` shows those that are there")


class Conflict(NbdramError):
    """Something else that is there, or under way, stands against what was asked."""


class ProtocolError(NbdramError):
    """The peer at the other end does not speak NBD as it should."""
