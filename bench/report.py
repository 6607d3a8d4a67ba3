"""Tables for people to read."""

from collections.abc import Mapping, Sequence


def heading(facts: Mapping[str, str]) -> str:
    width = max(map(len, facts))
    return "\n".join(f"{name:{width}}  {value}" for name, value in facts.items())


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as they need to be; the first `left` of them are flush left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([title, "", line(head), rule, *map(line, rows)])


def size(count: float) -> str:
    """Bytes, with three digits that matter."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} PiB"


def microseconds(count: float) -> str:
    return f"{count:.1f}" if count < 100 else f"{count:.0f}"


def span(values: Sequence[float]) -> str:
    """The lowest and the highest of sorted values."""
    return f"{values[0]:.2f}-{values[-1]:.2f}"
