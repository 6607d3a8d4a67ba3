"""A server that refuses to start leaves nothing open behind, and a state directory as if it had never tried."""

import os
import socket
from pathlib import Path

import pytest

from nbdram.config import Endpoint
from nbdram.errors import NbdramError
from nbdram.memory.statedir import MANIFEST, StateDirectory
from tests.helpers import served


def damage_index(path: Path, content: bytes, at: int) -> None:
    with next(path.glob("*.index")).open("r+b") as file:
        file.seek(at)
        file.write(content)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("a word", "words that make no sense"),
        ("a word behind the end", "words behind the end of the device"),
        ("a file", "No such file or directory; put it back"),
        ("the manifest", "is damaged"),
        ("nothing", "is in use by another server"),
    ],
)
async def test_a_state_directory_that_is_refused_leaves_no_file_open(
    shm: Path, monkeypatch: pytest.MonkeyPatch, what: str, told: str
) -> None:
    path = shm / "state"
    monkeypatch.setattr("nbdram.memory.locking._PATIENCE_S", 0.0)
    async with served(shm, "a=64M", "b=64M", state_dir=path):
        pass
    holder = None
    match what:
        case "a word":
            damage_index(path, b"\x80", 7)
        case "a word behind the end":
            damage_index(path, b"\1\0\1", 64 * 16 * 8)
        case "a file":
            next(path.glob("*.cold")).unlink()
        case "the manifest":
            os.truncate(path / MANIFEST, 50)
        case _:
            holder = StateDirectory(path)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(NbdramError, match=told):
        async with served(shm, state_dir=path):
            pass
    assert len(os.listdir("/proc/self/fd")) == len(before)
    if holder:
        holder.close()


async def test_a_state_directory_without_exports_gets_the_one_by_default_also_at_the_second_start(shm: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        metrics = Endpoint(host="127.0.0.1", port=taken.getsockname()[1])
        with pytest.raises(NbdramError, match="Address already in use"):
            async with served(shm, state_dir=shm / "state", exports=(), metrics=metrics, metrics_required=True):
                pass
    async with served(shm, state_dir=shm / "state", exports=()) as server:
        assert [export.name for export in server.server.exports] == ["ram"]
