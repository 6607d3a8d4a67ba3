"""nbdram top: one screen from a live server, and the terminal it is shown in."""

import asyncio
import io
import os
import pty
import sys
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nbdram.cli import main
from nbdram.observe.control import ask
from nbdram.observe.top import screen
from tests.helpers import MIB, PATIENCE_S, command_line, run, served


def drawn(before: dict[str, Any], now: dict[str, Any], height: int = 0) -> str:
    console = Console(file=io.StringIO(), width=140, record=True)
    console.print(screen(before, now, height))
    return console.export_text()


async def test_a_screen_tells_rates_tiers_latencies_and_connections(tmp_path: Path) -> None:
    control = tmp_path / "control"
    async with served(tmp_path, "busy=1G", "[red]quiet=2T") as here, await here.entered("busy") as client:
        before = await asyncio.to_thread(ask, control, "status")
        await client.write(0, b"x" * 3 * MIB)
        for _ in range(200):
            await client.read(0, 4096)
        now = await asyncio.to_thread(ask, control, "status")
    now["time"] = before["time"] + 2
    lines = drawn(before, now).splitlines()
    table = next(number for number, line in enumerate(lines) if line.startswith("export"))
    assert lines[table + 1].split()[:6] == ["busy", "1", "100", "400", "KiB", "1.5"]
    assert "3 MiB" in lines[table + 1]
    assert lines[table + 2].startswith("[red]quiet"), "names are text, whatever they look like"
    assert "2 TiB" in lines[table + 2]
    text = "\n".join(lines)
    assert "holds 3 MiB" in text
    assert "a local client  busy    simple" in text
    latencies = next(line for line in lines if line.startswith("p50 p99"))
    assert "read <" in latencies.replace("  ", " ")


async def test_trouble_is_said_on_top_and_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    async with served(tmp_path, *(f"e{number}=1G" for number in range(40))):
        facts = await asyncio.to_thread(ask, tmp_path / "control", "status")
    facts["ready"] = False
    facts["memory"]["waiting"] = 3
    facts["swap"] = [{"path": "/swap", "failing": True}]
    facts["remote"] = {"failing": True}
    facts["latency_s"]["write"][-1] += 5
    facts["connection_count"] = 100
    facts["exports"][0]["errors"] = 7
    before = {**facts, "latency_s": {**facts["latency_s"], "write": [0] * len(facts["latency_s"]["write"])}}
    text = drawn(before, facts, 24)
    for told in (
        "stopping",
        "3 writes wait for memory",
        "/swap can't be written",
        "a node of the remote takes nothing",
    ):
        assert told in text.splitlines()[0]
    assert ">60s" in text
    assert "and 32 more" in text
    assert "and 100 more" in text
    assert len(text.splitlines()) <= 24


async def test_top_prints_once_where_there_is_no_terminal(tmp_path: Path) -> None:
    async with served(tmp_path):
        done = await run("top", "--control", str(tmp_path / "control"))
    assert done.code == 0, done
    assert done.output.startswith("nbdram ")
    assert "\x1b" not in done.output
    assert "…" not in done.output, "a heading is cut"


async def test_top_fills_a_terminal_until_q_is_pressed_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    seen = b""
    async with served(tmp_path):
        process = await asyncio.create_subprocess_exec(
            *command_line("top", "--interval", "0.1", "--control", str(tmp_path / "control")),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "30"},
        )
        async with asyncio.timeout(PATIENCE_S):
            while seen.count(b"connection") < 3:
                seen += await asyncio.to_thread(os.read, ours, 65536)
            os.write(ours, b"xq")
            os.set_blocking(ours, False)
            while process.returncode is None or b"\x1b[?1049l" not in seen:
                await asyncio.sleep(0.01)
                with suppress(BlockingIOError):
                    seen += os.read(ours, 65536)
    assert process.returncode == 0
    assert seen.startswith(b"\x1b[?1049h"), "an alternate screen"
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


def test_without_the_library_it_is_told_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich.live", None)
    assert main(["top"]) == 1
    assert (
        capsys.readouterr().err
        == "nbdram: nbdram top draws with the library rich, which is not there: pip install rich\n"
    )


def test_an_interval_that_makes_no_sense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--interval", "0"]) == 2
    assert capsys.readouterr().err == "nbdram: --interval must be 0.1 to 60 seconds\n"
