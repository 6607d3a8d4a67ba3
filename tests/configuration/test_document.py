"""Lines of keys in a TOML file."""

from pathlib import Path

import pytest

from nbdram.configuration.document import Document
from nbdram.errors import UsageError

TEXT = '''# a comment with = and [brackets]
memory = "4G"

listen = [   # over lines
  "unix:/run/x",  # ]

  "tcp://127.0.0.1",
]
a.b."c d" = """
[not.a.table]
x = 1
"""
[exports.scratch]
size = "1G"
[exports."a.b"] # comment
  'size' = "2G"
  nested = { one = 1, two = { three = 3 } }
[[things]]
x = 1
[[things]]
y = 2
[exports.empty]
'''


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ("memory", 2),
        ("listen", 4),
        ("a", 9),
        ("a/b/c d", 9),
        ("exports", 13),
        ("exports/scratch", 13),
        ("exports/scratch/size", 14),
        ("exports/a.b", 15),
        ("exports/a.b/size", 16),
        ("exports/a.b/nested/two/three", 17),
        ("things", 18),
        ("things/x", 19),
        ("things/y", 21),
        ("exports/empty", 22),
        ("exports/empty/size", 22),
        ("nowhere", 1),
    ],
)
def test_each_key_knows_its_line(keys: str, line: int) -> None:
    document = Document(Path("x.toml"), TEXT)
    assert document.place(tuple(keys.split("/"))) == f"x.toml:{line}"


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_lines_end_in_any_way(end: str) -> None:
    assert Document(Path("x"), f"a = 1{end or chr(10)}b = 2{end}").place(("b",)) == "x:2"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a = 1\nb =\n", 'x.toml:2: Invalid value: text stands in quotes, sizes like "16G" too'),
        (
            "a = 4G\n",
            "x.toml:1: Expected newline or end of document after a statement: "
            'text stands in quotes, sizes like "16G" too',
        ),
        ("a = 1\n[b\n", "x.toml:2: Expected ']' at the end of a table declaration"),
        ('a = """\n\n', "x.toml:2: Unterminated string"),
        ("a = 1\na = 2\n", "x.toml:2: Cannot overwrite a value"),
    ],
)
def test_what_is_no_toml_is_told_with_its_line(text: str, told: str) -> None:
    with pytest.raises(UsageError) as raised:
        Document(Path("x.toml"), text)
    assert str(raised.value) == told


def test_a_file_that_can_not_be_read_is_told_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"can't read .*missing.toml: No such file or directory"):
        Document.read(tmp_path / "missing.toml")
    (tmp_path / "latin").write_bytes(b"a = '\xff'")
    with pytest.raises(UsageError, match="latin is no text in UTF-8"):
        Document.read(tmp_path / "latin")
