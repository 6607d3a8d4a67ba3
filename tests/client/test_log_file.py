"""Log files that nobody rotates stay short, and keep what was said last."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nbdram.client import log_file
from tests.helpers import MIB

# Logs 20000 lines of 100 bytes and more to stderr, as the keeper does, and says something else there at the end.
TALKATIVE = """
import logging, sys
from nbdram.client.log_file import Bounded
logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[Bounded()])
for number in range(20000):
    logging.info("%05d %s", number, "x" * 94)
print("the end", file=sys.stderr)
"""


def talk(path: Path, mode: str) -> list[bytes]:
    with path.open(mode) as log:
        subprocess.run([sys.executable, "-c", TALKATIVE], stderr=log, check=True)
    return path.read_bytes().splitlines()


def test_a_log_is_cut_to_what_was_said_last(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"from before\n")
    *lines, end = talk(path, "ab")
    assert MIB // 2 - 1000 < path.stat().st_size <= MIB + 101
    assert end == b"the end"
    last = [int(line.split()[0]) for line in lines]
    assert last == list(range(20000 - len(lines), 20000))


def test_a_file_that_is_not_appended_to_is_somebodys_own(tmp_path: Path) -> None:
    assert len(talk(tmp_path / "log", "wb")) == 20001


def test_what_is_no_file_is_logged_to_as_ever(capfd: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        handler = log_file.Bounded(stream)
        handler.emit(logging.makeLogRecord({"msg": "said"}))
    assert os.read(read, 100) == b"said\n"
    os.close(read)
    assert capfd.readouterr().err == ""
