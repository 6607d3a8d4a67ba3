"""A TOML file whose values know their lines, for messages that lead to the place of a mistake."""

import re
import tomllib
from pathlib import Path
from typing import Any

from nbdram.errors import UsageError

Keys = tuple[str, ...]

_UNQUOTED = ("Expected newline", "Invalid value")
_PLACE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


class Document:
    """`values` as tomllib has them. UsageError, with the line, if it is no TOML."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        try:
            self.values: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            reason, place = str(error), _PLACE.search(str(error))
            line = int(place[1]) if place and place[1] else max(1, len(text.splitlines()))
            reason = _PLACE.sub("", reason)
            if reason.startswith(_UNQUOTED):
                reason += ': text stands in quotes, sizes like "16G" too'
            raise UsageError(f"{path}:{line}: {reason}") from None
        self._lines = _lines(text)

    @classmethod
    def read(cls, path: Path) -> "Document":
        try:
            return cls(path, path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise UsageError(f"{path} is no text in UTF-8") from None
        except OSError as error:
            raise UsageError(f"can't read {path}: {error.strerror}") from None

    def place(self, keys: Keys) -> str:
        """FILE:LINE of a key, or of the table that it is in."""
        while keys and keys not in self._lines:
            keys = keys[:-1]
        return f"{self.path}:{self._lines.get(keys, 1)}"


def _lines(text: str) -> dict[Keys, int]:
    """The line where each key, and each table, first stands, in a text that is known to be TOML.

    A statement ends with the first line that makes it TOML by itself: every value that goes over lines is delimited.
    """
    found: dict[Keys, int] = {}
    table: Keys = ()
    begun, statement = 0, ""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not statement:
            begun = number
        statement += line
        try:
            values = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        if statement.lstrip().startswith("["):
            table = next(_paths(values))
            for depth in range(len(table)):
                found.setdefault(table[: depth + 1], begun)
        else:
            for keys in _paths(values):
                for depth in range(len(keys)):
                    found.setdefault(table + keys[: depth + 1], begun)
        statement = ""
    return found


def _paths(values: Any, above: Keys = ()) -> Any:
    """The keys down to each value, or to an empty table."""
    while isinstance(values, list) and values and isinstance(values[0], dict) and not values[0]:
        values = values[0]  # the header of an array of tables
    if not isinstance(values, dict) or not values:
        if above:
            yield above
        return
    for key, value in values.items():
        yield from _paths(value, (*above, key))
