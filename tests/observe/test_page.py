"""The status page in a real browser: what it shows, and to whom."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

from nbdram.config import Endpoint, ExportSettings, ServeSettings
from nbdram.memory.reclaim import anonymous_bytes
from nbdram.server.server import Server

from ..helpers import GIB, MIB, Client, dial
from .browser import Browser, browser
from .test_web import fetch, port_of

ROOT = Path(__file__).parents[2]


# The opaque pixels of the first row of cells in the first map, but for the rounded corners.
COLOURS_OF_CELLS = """(() => {
    const canvas = document.querySelector(".export canvas");
    const row = canvas.getContext("2d").getImageData(0, 8, canvas.width, 1).data;
    const pixels = Array.from({ length: canvas.width }, (_, x) => row.slice(4 * x, 4 * x + 4));
    return pixels.filter((pixel) => pixel[3] == 255).map(String);
})()"""


@asynccontextmanager
async def with_page(directory: Path, *exports: str, memory: int = 256 * MIB) -> AsyncIterator[Server]:
    server = Server(
        ServeSettings(
            exports=tuple(ExportSettings.parse(text) for text in exports),
            listen=(Endpoint(path=str(directory / "nbd.sock")),),
            memory=memory + anonymous_bytes(),
            control=directory / "control",
            metrics=Endpoint(host="127.0.0.1", port=0),
            metrics_required=True,
        )
    )
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def entered(directory: Path, name: str) -> Client:
    client = await dial(directory / "nbd.sock")
    await client.enter(name)
    return client


async def test_the_page_shows_what_is_stored_and_where(tmp_path: Path) -> None:
    def look(port: int) -> None:
        with browser(tmp_path) as page:
            page.look()
            page.open(port)
            assert page.text("#state") == "ready"
            assert page.text("#stored") == "3 MiB"
            assert "resident" in page.text("#budget-legend")
            assert page.run("document.querySelectorAll('.export').length") == 2
            assert page.text(".export .stored") == "3 MiB of 1 TiB"
            page.until("document.querySelector('.export canvas').getAttribute('aria-label')")
            assert "3 MiB resident" in page.run("document.querySelector('.export canvas').ariaLabel")
            assert len(set(page.run(COLOURS_OF_CELLS))) == 1, "all of it is resident, and was touched lately"
            assert "1.0 TiB were never written" in page.text(".map .readout").replace("1 TiB", "1.0 TiB")
            assert "disk" in page.text("#connections")
            check_access(page)
            check_screens(page)
            assert page.errors() == []

    async with (
        with_page(tmp_path, "disk=1T,description=for tests", "other=1G") as server,
        await entered(tmp_path, "disk") as client,
    ):
        await client.write(0, b"x" * 2 * MIB)
        await client.write(500 * GIB, b"x" * MIB)
        await asyncio.to_thread(look, port_of(server))


def check_access(page: Browser) -> None:
    """For keyboards and screen readers."""
    assert page.run("document.documentElement.lang") == "en"
    assert page.run("['header', 'main', 'footer', 'nav'].every(name => document.querySelector(name))")
    sections = "[...document.querySelectorAll('main > section')]"
    assert page.run(f"{sections}.length && {sections}.every(one => one.ariaLabelledByElements?.length)")
    pictures = "[...document.querySelectorAll('[role=img]')].filter(one => one.checkVisibility())"
    assert page.run(f"{pictures}.length && {pictures}.every(one => one.ariaLabel)")
    levels = page.run("[...document.querySelectorAll('h1, h2, h3')].map(one => +one.tagName[1])")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    focused = "document.activeElement.className || document.activeElement.id"
    press = page.driver.switch_to.active_element.send_keys
    press("\ue004")  # Tab
    assert page.run(focused) == "skip"
    page.driver.switch_to.active_element.send_keys("\ue004")
    assert page.run(focused) == "pause"
    page.run("document.querySelector('.export canvas').focus()")
    page.driver.switch_to.active_element.send_keys("\ue014")  # Right
    assert page.text(".map .readout").startswith("From 0 B: 100 % resident")
    page.run("document.querySelector('.map details').open = true")
    page.until("document.querySelector('.map-table tbody tr')")
    assert page.text(".map-table tbody tr").split("\t")[1:] == ["3 MiB", "resident"]


def check_screens(page: Browser) -> None:
    """Nothing sticks out of a phone, and text can be read in light and dark."""
    for dark in (False, True):
        page.look(width=360, height=740, dark=dark, phone=True)
        assert page.run("document.documentElement.scrollWidth") <= 360
        contrast = page.run(_CONTRAST)
        assert {name: ratio for name, ratio in contrast.items() if ratio < 4.5} == {}
    page.look()


# The contrast of texts with the card they are on, as WCAG defines it.
_CONTRAST = """(() => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255).map(
      (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const card = light(getComputedStyle(document.querySelector('.card')).backgroundColor);
  const found = {};
  for (const selector of ['h1', 'h2', 'h3', '.quiet', '.legend b', '.state', 'footer a', '.tags span', 'th', 'td']) {
    const text = light(getComputedStyle(document.querySelector(selector)).color);
    found[selector] = (Math.max(text, card) + 0.05) / (Math.min(text, card) + 0.05);
  }
  return found;
})()"""


async def test_the_page_follows_the_server_and_says_when_it_is_gone(tmp_path: Path) -> None:
    async with with_page(tmp_path, "disk=1G") as server:
        port = port_of(server)
        with browser(tmp_path) as page:
            await asyncio.to_thread(page.open, port)
            assert await asyncio.to_thread(page.text, "#stored") == "Empty"
            assert "nbd-client -unix" in await asyncio.to_thread(page.text, "#saying")
            assert "costs nothing" in await asyncio.to_thread(page.text, ".export .empty")
            async with await entered(tmp_path, "disk") as client:
                await client.write(0, b"x" * MIB)
                await asyncio.to_thread(page.until, "document.querySelector('#stored').textContent == '1 MiB'")
            await asyncio.to_thread(page.run, "document.querySelector('#pause').click()")
            assert await asyncio.to_thread(page.run, "document.querySelector('#pause').ariaPressed") == "true"
            await asyncio.to_thread(page.run, "document.querySelector('#pause').click()")
            await server.stop()
            await asyncio.to_thread(page.until, "document.querySelector('#problem').checkVisibility()")
            assert await asyncio.to_thread(page.text, "#state") == "no answer"


async def test_of_very_many_exports_the_page_shows_those_that_matter(tmp_path: Path) -> None:
    async with with_page(tmp_path, *(f"disk{number}=1G" for number in range(120))) as server:
        async with await entered(tmp_path, "disk117") as client:
            await client.write(0, b"x")
            status, text = await fetch(port_of(server), "/api/status")
            found = json.loads(text)
            assert status == 200
            assert found["exports"][0]["name"] == "disk117"
            assert (len(found["exports"]), found["export_count"]) == (100, 120)
            _, text = await fetch(port_of(server), "/api/status?find=DISK11")
            names = [one["name"] for one in json.loads(text)["exports"]]
            assert names == ["disk11", *(f"disk11{number}" for number in range(10))]
        assert (await fetch(port_of(server), "/api/map?export=nobody"))[0] == 404


async def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    async with with_page(tmp_path, "disk=1G") as server:
        for path in ("/", "/style.css", "/script.js", "/charts.js"):
            status, text = await fetch(port_of(server), path)
            assert status == 200
            assert "//" not in text.replace("http://www.w3.org/", "").replace("// ", "").replace("https://", "//"), path


async def test_curves_have_a_point_every_two_seconds(tmp_path: Path) -> None:
    async with with_page(tmp_path, "disk=1G") as server, await entered(tmp_path, "disk") as client:
        server._history.stop()
        server._history.take(2.0)
        await client.write(0, b"x" * MIB)
        server._history.take(2.0)
        _, text = await fetch(port_of(server), "/api/history?export=disk")
        _, total = await fetch(port_of(server), "/api/history")
    assert json.loads(text)["series"]["written_bytes"][-1] == MIB / 2
    assert json.loads(text)["series"]["resident"][-1] == MIB
    assert MIB / 2 in json.loads(total)["series"]["written_bytes"]
