"""Makes the pictures of the status page in docs/: python -m tests.observe.screenshots"""

import asyncio
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Final

import uvloop

from nbdram.config import Endpoint, ExportSettings, ServeSettings, SwapSettings
from nbdram.server.server import Server

from ..helpers import CLUSTER, GIB, KIB, MIB, PAGE, Client, dial
from .browser import browser
from .test_web import port_of

DOCS: Final = Path(__file__).parents[2] / "docs"
_WARM_UP_S: Final = 70
_WORDS: Final = b"the page cluster index reclaim resident fault 0123456789abcdef".split()


async def main() -> None:
    directory = Path(tempfile.mkdtemp())
    os.chdir(directory)  # so that its name is in no picture
    exports = ("builds=64G,description=CI scratch space", "vm-web-01=20G", "golden=8G,ro,description=base image")
    settings = ServeSettings(
        exports=tuple(ExportSettings.parse(text) for text in exports),
        listen=(Endpoint(path=str(directory / "nbd.sock")),),
        memory=160 * MIB,
        swap=(SwapSettings(Path("swap"), GIB),),
        control=directory / "control",
        metrics=Endpoint(host="127.0.0.1", port=0),
        metrics_required=True,
    )
    server = Server(settings)
    await server.start()
    builds = [(0, 1100), (3 * GIB, 1300), (40 * GIB, 900)]
    work = [
        asyncio.create_task(load(directory, "builds", builds, 30)),
        asyncio.create_task(load(directory, "vm-web-01", [(0, 700), (9 * GIB, 300)], 12)),
    ]
    await asyncio.sleep(_WARM_UP_S)
    await asyncio.to_thread(take, port_of(server), directory)
    for task in work:
        task.cancel()
    await asyncio.gather(*work, return_exceptions=True)
    await server.stop()


def take(port: int, directory: Path) -> None:
    with browser(directory) as page:
        for name, width, height, dark, phone in (
            ("status-light", 1180, 1420, False, False),
            ("status-dark", 1180, 1420, True, False),
            ("status-phone", 390, 844, False, True),
        ):
            page.look(width=width, height=height, dark=dark, phone=phone)
            page.open(port)
            page.run("document.querySelector('.export').open = true")
            page.until("document.querySelector('.map-table tr')")
            time.sleep(3)  # for rates, which take two looks
            page.driver.save_screenshot(str(DOCS / f"{name}.png"))


async def load(directory: Path, name: str, regions: list[tuple[int, int]], burst: int) -> None:
    """Write the regions (offset, clusters), then read and write mostly their beginning."""
    chance = random.Random(name)
    clusters = [start + number * CLUSTER for start, count in regions for number in range(count)]
    client: Client = await dial(directory / "nbd.sock")
    async with client:
        await client.enter(name)
        for at in clusters:
            await client.write(at, _content(chance, CLUSTER))
        began = time.monotonic()
        while True:
            busy = 1 + 0.8 * ((time.monotonic() - began) % 23 < 9)
            for _ in range(int(burst * busy)):
                at = clusters[min(len(clusters) - 1, int(chance.expovariate(9) * len(clusters)))]
                if chance.random() < 0.75:
                    await client.read(at, PAGE)
                else:
                    await client.write(at, _content(chance, 16 * KIB))
            await asyncio.sleep(chance.uniform(0.01, 0.04))


def _content(chance: random.Random, length: int) -> bytes:
    """Text that compresses about as files do."""
    words = [chance.choice(_WORDS) + chance.randbytes(9) for _ in range(400)]
    return b" ".join(words * (length // 2000))[:length].ljust(length, b".")


if __name__ == "__main__":
    uvloop.run(main())
