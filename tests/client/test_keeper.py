"""A keeper begins and ends amid those who ask it, and leaves no more than its log."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdram.client import ask_keeper
from nbdram.client.ask_keeper import DOOR_NAME, LOG_NAME, ask, ask_if_running, lock_file
from nbdram.client.keeper import Keeper
from nbdram.errors import NbdramError
from tests.helpers import PATIENCE_S, command_line

# A keeper that ends as soon as nobody asks it anything.
HASTY = """
import sys
from pathlib import Path
from nbdram.client import keeper
keeper._LINGER_S = 0.0
keeper.Keeper(Path(sys.argv[1])).run(until_idle=True)
"""


def test_a_lock_that_was_removed_while_somebody_waited_for_it_is_none(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = lock_file(path, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lock_file, path, fcntl.LOCK_SH)
        time.sleep(0.05)
        assert not waiting.done()
        path.unlink()
        os.close(held)
        descriptor = waiting.result(PATIENCE_S)
    assert os.fstat(descriptor).st_ino == path.stat().st_ino
    os.close(descriptor)


def test_asking_whether_a_keeper_runs_leaves_nothing_behind(tmp_path: Path) -> None:
    assert ask_if_running(tmp_path / "nowhere", "status") is None
    assert ask_if_running(tmp_path, "status") is None
    assert list(tmp_path.iterdir()) == []


@contextmanager
def lock_held(path: Path) -> Iterator[None]:
    descriptor = lock_file(path, fcntl.LOCK_SH)
    yield
    os.close(descriptor)


def gone(directory: Path) -> None:
    """Wait until the keeper has ended; the log is what it leaves."""
    deadline = time.monotonic() + PATIENCE_S
    while (left := os.listdir(directory)) != [LOG_NAME]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)
    assert "Traceback" not in (directory / LOG_NAME).read_text()


def test_a_directory_of_too_long_a_path_is_told(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 100)
    with pytest.raises(NbdramError, match="is too long a path for a keeper's socket"):
        Keeper(path)
    assert not path.exists()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Who asks, and finds no keeper, starts a hasty one."""
    started: list[subprocess.Popen[bytes]] = []

    def start(directory: Path) -> None:
        with (directory / LOG_NAME).open("ab") as log:
            started.append(subprocess.Popen([sys.executable, "-c", HASTY, directory], stderr=log))

    monkeypatch.setattr(ask_keeper, "_start", start)
    yield
    for keeper in started:
        keeper.wait(PATIENCE_S)


@pytest.mark.usefixtures("hasty")
def test_a_second_keeper_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    with lock_held(tmp_path / DOOR_NAME):  # so the first one does not end
        first = ask(tmp_path, "status")["pid"]
        command = command_line("keeper", "--directory", str(tmp_path))
        second = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert (second.returncode, "there is a keeper already" in second.stderr) == (1, True)
        assert ask(tmp_path, "status")["pid"] == first
        (tmp_path / DOOR_NAME).unlink()  # by somebody who should not
        found = ask_if_running(tmp_path, "status")
        assert found is not None
        assert found["pid"] == first
    gone(tmp_path)


@pytest.mark.usefixtures("hasty")
def test_whoever_asks_while_keepers_end_is_answered(tmp_path: Path) -> None:
    keepers = set()

    def ask_often(number: int) -> None:
        for turn in range(6):
            keepers.add(ask(tmp_path, "status")["pid"])
            threading.Event().wait((number * 7 + turn * 11) % 20 / 40)  # some come as a keeper ends

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask_often, range(4)))
    gone(tmp_path)
    assert len(keepers) > 1, "no keeper has ended meanwhile"
