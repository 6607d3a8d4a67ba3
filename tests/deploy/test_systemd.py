"""The units of deploy/systemd, as systemd reads and judges them."""

import re
import sys
from pathlib import Path

import pytest

from nbdram.client.attachment import default_directory

from .systemd import PROGRAM, UNITS, analyze, settings, system_calls, values

NAMES = sorted(path.name for path in UNITS.iterdir() if path.suffix != ".conf")


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    assert len(NAMES) >= 5
    program = tmp_path / "nbdram"
    program.symlink_to(sys.executable)  # anything that can be run: where nbdram will be, nothing is yet
    for name in NAMES:
        (tmp_path / name).write_text((UNITS / name).read_text().replace(PROGRAM, str(program)))
    checked = analyze("verify", "--man=no", *(str(tmp_path / name) for name in NAMES), units=tmp_path)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


@pytest.mark.parametrize(("unit", "most"), [("nbdram.service", 2.0), ("nbdram-keeper.service", 4.5)])
def test_units_are_as_locked_up_as_can_be(unit: str, most: float) -> None:
    judged = analyze("security", "--offline=true", f"--threshold={round(most * 10)}", str(UNITS / unit))
    assert judged.returncode == 0, judged.stdout
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", judged.stdout)
    assert found
    assert float(found[1]) <= most


def test_the_server_gets_the_sockets_that_its_unit_hands_over() -> None:
    (start,) = values("nbdram.service", "ExecStart")
    assert "--listen fd" in start
    for address in values("nbdram.socket", "ListenStream"):
        assert address.startswith(("/run/", "127.0.0.1:")), f"{address} can be reached by others"


def test_a_server_that_ends_leaves_its_data_for_the_next() -> None:
    (start,) = values("nbdram.service", "ExecStart")
    mounted = dict(settings("var-lib-nbdram-state.mount"))
    assert f"--state-dir {mounted['Where']} " in start
    assert mounted["Type"] == "tmpfs"
    assert mounted["Where"] in values("nbdram.service", "RequiresMountsFor")
    assert mounted["Where"].removeprefix("/var/lib/") in values("nbdram.service", "StateDirectory")[0].split()
    assert values("nbdram.service", "Restart") == ["always"]


def test_the_keeper_may_do_what_it_asks_the_kernel_for() -> None:
    assert values("nbdram-keeper.service", "RuntimeDirectory") == [default_directory().name]
    (capabilities,) = values("nbdram-keeper.service", "CapabilityBoundingSet")
    assert {"CAP_SYS_ADMIN", "CAP_IPC_LOCK", "CAP_SYS_RESOURCE"} <= set(capabilities.split())
    assert {"mlockall", "prctl", "bind", "socket", "umount2"} <= system_calls("nbdram-keeper.service")


def test_the_keeper_unmounts_for_all_of_the_host() -> None:
    of_its_own = (
        *(
            "ProtectSystem",
            "ProtectHome",
            "ProtectControlGroups",
            "ProtectKernel",
            "ProtectProc",
            "ProcSubset",
            "Private",
        ),
        *("ReadOnlyPaths", "ReadWritePaths", "InaccessiblePaths", "TemporaryFileSystem", "Bind"),
    )
    for key, _ in settings("nbdram-keeper.service"):
        assert not key.startswith(of_its_own), f"{key} makes a mount namespace"
