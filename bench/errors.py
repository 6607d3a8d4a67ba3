"""What can go wrong in a way that the user should read as one sentence."""


class BenchError(Exception):
    """A tool is missing, a server did not start, a job failed."""


class NoMatch(BenchError):
    """A pattern matches nothing that there is to measure."""
