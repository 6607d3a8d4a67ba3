"""What the service manager is told, over the socket that it gives."""

import socket
from pathlib import Path

from tests.helpers import PATIENCE_S, running


async def test_the_service_manager_hears_of_readiness_of_life_and_of_the_end(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "300000"}
        async with running(tmp_path, "--memory", "64M", environment=environment) as server:
            heard = [manager.recv(100).decode() for _ in range(3)]
            assert heard == ["READY=1", "WATCHDOG=1", "WATCHDOG=1"]
            server.process.terminate()
            while (last := manager.recv(100)) == b"WATCHDOG=1":
                pass
            assert last == b"STOPPING=1"
            assert (await server.ended()).code == 0


async def test_a_watchdog_that_is_for_another_process_is_left_alone(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0nbdram-test-" + tmp_path.name)
        manager.settimeout(PATIENCE_S)
        environment = {"NOTIFY_SOCKET": "@nbdram-test-" + tmp_path.name, "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}
        async with running(tmp_path, "--memory", "64M", environment=environment) as server:
            assert manager.recv(100) == b"READY=1"
            server.process.terminate()
            assert (await server.ended()).code == 0
        assert manager.recv(100) == b"STOPPING=1"
