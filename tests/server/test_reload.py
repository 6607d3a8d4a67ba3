"""Settings that change while the server runs: what takes effect, what waits for a restart, what is never lost."""

import logging
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nbdram.access import OPEN, Rules
from nbdram.config import Endpoint, ExportSettings, Limits, ServeSettings, TlsSettings
from nbdram.errors import NbdramError, UsageError
from nbdram.protocol.wire import Command
from nbdram.server.reload import Changes
from tests.certificates import Certificates
from tests.helpers import GIB, MIB, PAGE, Served, dial, run, running, served

RAM = ExportSettings("ram", GIB)
OTHERS = Rules(users=(os.getuid() + 1,))


async def reload(here: Served, change: Callable[[ServeSettings], ServeSettings], *, remove: bool = False) -> Changes:
    """As if the settings had been changed so on disk."""
    here.server.reloader._read = lambda running: change(running or here.server.settings)
    return await here.server.reloader.reload(remove=remove)


def exports(*wanted: ExportSettings) -> Callable[[ServeSettings], ServeSettings]:
    return lambda settings: replace(settings, exports=wanted)


async def test_nothing_changes_if_nothing_has_changed(tmp_path: Path) -> None:
    async with served(tmp_path, exports=(RAM,)) as here:
        assert await reload(here, lambda settings: settings) == Changes()


async def test_exports_come_grow_shrink_and_go(tmp_path: Path) -> None:
    async with served(tmp_path, exports=(RAM,)) as here:
        new = ExportSettings("new", MIB)
        changes = await reload(here, exports(replace(RAM, size=2 * GIB), new))
        assert changes == Changes(["ram has 2 GiB", "new was made"])
        async with await here.entered("new") as client:
            assert client.size == MIB
        await here.all_gone()
        assert await reload(here, exports(replace(RAM, size=MIB))) == Changes(["ram has 1 MiB", "new was removed"])
        assert [export.name for export in here.server.exports] == ["ram"]


async def test_data_is_removed_only_if_that_is_asked_for_and_nobody_uses_it(tmp_path: Path) -> None:
    left = ExportSettings("left", GIB)
    async with served(tmp_path, exports=(RAM, left)) as here:
        async with await here.entered("left") as client:
            changes = await reload(here, exports(RAM))
            assert changes.kept == ["'left' has 1 connections: close them, or use force"]
            await client.write(GIB - PAGE, b"precious")
            for _ in range(2):
                changes = await reload(here, exports(replace(RAM, size=2 * GIB)))
                assert changes.kept == ["left has left the settings but has data: nbdram rm left removes it"]
            assert (await reload(here, exports(RAM), remove=True)).kept
        await here.all_gone()
        assert (await reload(here, exports(RAM), remove=True)).applied == ["left was removed"]


async def test_a_size_below_data_is_refused_and_tried_again(tmp_path: Path) -> None:
    async with served(tmp_path, exports=(RAM,)) as here:
        async with await here.entered() as client:
            await client.write(GIB - PAGE, b"precious")
            for _ in range(2):
                (told,) = (await reload(here, exports(replace(RAM, size=MIB)))).kept
                assert told.startswith("ram: 'ram' has data up to 1 GiB")
            assert await client.read(GIB - PAGE, 8) == b"precious"
            await client.call(Command.TRIM, 0, GIB)
        assert (await reload(here, exports(replace(RAM, size=MIB)))).applied == ["ram has 1 MiB"]


async def test_a_size_that_was_changed_by_hand_stays_until_the_settings_change(tmp_path: Path) -> None:
    async with served(tmp_path, exports=(RAM,)) as here:
        here.server.exports.resize("ram", 4 * GIB)
        assert await reload(here, lambda settings: settings) == Changes()
        assert await reload(here, exports(replace(RAM, read_only=True))) == Changes(["ram: what clients may do"])
        assert here.device().size == 4 * GIB


async def test_who_may_not_be_there_any_more_is_hung_up_on(tmp_path: Path) -> None:
    other = ExportSettings("other", GIB)
    async with served(tmp_path, exports=(RAM, other)) as here:
        async with await here.entered() as client, await here.entered("other") as allowed:
            changed = replace(RAM, rules=OTHERS, description="closed"), replace(other, rules=Rules(iops=1000))
            await reload(here, exports(*changed))
            assert await client.rest() == b""
            assert await allowed.read(0, 1) == b"\0"
        await here.all_gone()
        assert here.server.service.counters.hung_up["forbidden"] == 1
        await reload(here, exports(RAM, other))
        await here.still_answers()


async def test_caps_hold_for_connections_that_are_open(tmp_path: Path) -> None:
    async with served(tmp_path, exports=(RAM,)) as here, await here.entered() as client:
        await client.read(0, 1)
        await reload(here, exports(replace(RAM, rules=Rules(iops=5))))
        began = here.server.service.connections.copy()
        for _ in range(3):
            await client.read(0, 1)
        assert began == here.connections
        assert here.connection()._is_paced


async def test_memory_limits_and_verbosity_change(tmp_path: Path) -> None:
    async with served(tmp_path, exports=(RAM,)) as here:
        budget, level = here.server.exports.budget, logging.getLogger().level
        try:
            more = here.server.settings.memory + 64 * MIB
            changed = {"limits": Limits(connections=7), "write_wait_s": 1.0, "verbose": True, "default_rules": OTHERS}
            changes = await reload(
                here,
                lambda settings: replace(settings, memory=more, asked_memory=more, **changed),  # type: ignore[arg-type]
            )
            assert [change.partition(":")[0] for change in changes.applied] == ["memory", "limits", "verbose", "access"]
            assert budget.limit_pages * PAGE == more
            assert (here.server.service.max_connections, here.server.service.write_wait_s) == (7, 1.0)
            assert logging.getLogger().level == logging.INFO
            made = await here.server.admin._create({"name": "later", "size": MIB, "iops": 3})
            assert (made["users"], made["iops"]) == ([os.getuid() + 1], 3)
        finally:
            logging.getLogger().setLevel(level)


async def test_what_needs_a_restart_is_told_each_time_and_is_as_before(tmp_path: Path) -> None:
    async with served(tmp_path, exports=(RAM,)) as here:
        old = here.server.settings

        def change(settings: ServeSettings) -> ServeSettings:
            moved = replace(old, listen=(Endpoint(path="/x"),), state_dir=Path("/x"), remote_first=True)
            return replace(moved, follow_pressure=True, log_format="json", memory=1 << 40)

        for _ in range(2):
            changes = await reload(here, change)
            assert changes.restart == ["listen", "swap", "state_dir", "memory (to or from auto)", "log_format"]
            assert changes.applied == changes.kept == []
        assert here.server.settings == old
        await here.still_answers()


async def test_tls_comes_and_goes_and_certificates_are_renewed(tmp_path: Path) -> None:
    made = Certificates(tmp_path / "certificates")
    tls = TlsSettings(made.server, made.server_key)
    async with served(tmp_path, exports=(RAM,)) as here:

        async def changes(wanted: TlsSettings | None) -> list[str]:
            return (await reload(here, lambda settings: replace(settings, tls=wanted))).applied

        assert await changes(tls) == ["TLS is offered"]
        assert await changes(tls) == []
        made.authority.issue(made.server, made.server_key, "localhost")
        assert await changes(tls) == ["the certificate"]
        assert await changes(replace(tls, required=False)) == ["TLS"]
        assert await changes(None) == ["TLS is not offered any more"]
        await changes(tls)
        made.server.unlink()
        with pytest.raises(NbdramError, match="can't read"):
            await changes(tls)
        assert here.server.reloader.failures == 1
        assert here.server.settings.tls == tls


async def test_without_anything_to_read_again_that_is_told(tmp_path: Path) -> None:
    async with served(tmp_path) as here:
        with pytest.raises(UsageError, match="was not started with settings that can be read again"):
            await here.server.reloader.reload()


# -- as an operator does it --------------------------------------------------------------------------

SETTINGS = """
memory = "64M"
metrics = "off"
listen = ["unix:{0}/nbd.sock"]
control = "{0}/control"
[exports.ram]
size = "{1}"
{2}
"""


async def test_reload_and_sighup_read_the_file_again(tmp_path: Path) -> None:
    path = tmp_path / "nbdram.toml"
    path.write_text(SETTINGS.format(tmp_path, "1G", ""))
    command = ("--listen", f"unix:{tmp_path / 'nbd.sock'}", "--control", f"{tmp_path / 'control'}", "-c", str(path))
    told = ("reload", "--control", str(tmp_path / "control"))
    async with running(tmp_path, *command) as server, await server.entered() as client:
        path.write_text(SETTINGS.format(tmp_path, "2G", '[exports.new]\nsize = "1M"'))
        done = await run(*told)
        assert (done.code, done.output) == (0, "ram has 2 GiB\nnew was made\n"), done
        assert (await run(*told)).output == "nothing has changed\n"

        path.write_text(SETTINGS.format(tmp_path, "2X", "what = 1"))
        done = await run(*told)
        assert done.code == 2
        assert done.errors.count("nbdram.toml:") == 2

        path.write_text('log_format = "json"\n' + SETTINGS.format(tmp_path, "3G", ""))
        server.process.send_signal(signal.SIGHUP)

        async def size() -> int:
            async with await dial(server.path) as other:
                await other.enter()
                return other.size

        while await size() != 3 * GIB:
            pass
        done = await run(*told)
        assert (done.code, done.output) == (1, "needs a restart: log_format\n"), done
        path.write_text("x")
        server.process.send_signal(signal.SIGHUP)
        await client.write(2 * GIB, b"still here")
        assert await client.read(2 * GIB, 10) == b"still here"
        server.process.terminate()
        ended = await server.ended()
        assert "nothing was reloaded: " in ended.errors
        assert "these settings need a restart: log_format" in ended.errors


def test_open_rules_are_the_default() -> None:
    assert ServeSettings((), (), 0).default_rules == OPEN
