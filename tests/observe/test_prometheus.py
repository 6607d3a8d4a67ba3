"""Dashboards, rules and alerts against the real Prometheus, which scrapes a server under load."""

import asyncio
import importlib.util
import json
import re
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from nbdram.config import Endpoint, ExportSettings, ServeSettings, SwapSettings
from nbdram.memory.reclaim import anonymous_bytes
from nbdram.memory.tiers.remote_settings import RemoteSettings
from nbdram.observe.exposition import Exposition
from nbdram.server.server import Server

from ..helpers import CLUSTER, GIB, MIB, PAGE, Client, dial, served
from ..memory.tiers.redis_cluster import Node
from ..memory.tiers.redis_cluster import server as redis_server
from .test_web import port_of
from .tools import tool

GRAFANA = Path(__file__).parents[2] / "grafana"
RULES = GRAFANA / "rules" / "nbdram.rules.yml"
PATIENCE_S = 30

_CONFIG = """
global: {{scrape_interval: 250ms, scrape_timeout: 250ms, evaluation_interval: 250ms}}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: nbdram
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


class Prometheus:
    """One that listens on loopback; `ask` blocks."""

    def __init__(self, port: int) -> None:
        self._api = f"http://127.0.0.1:{port}/api/v1"

    def ask(self, expression: str) -> list[Any]:
        """The result of an expression now. A failed test if Prometheus does not understand it."""
        try:
            with urllib.request.urlopen(f"{self._api}/query?{urlencode({'query': expression})}") as response:
                result: list[Any] = json.load(response)["data"]["result"]
                return result
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 503:  # it is starting
                    return []
                pytest.fail(f"{expression}: {error.read().decode()}")
        except OSError:  # nor does it listen yet
            return []


@contextmanager
def prometheus(directory: Path, target_port: int) -> Iterator[Prometheus]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = directory / "prometheus.yml"
    config.write_text(_CONFIG.format(rules=RULES, port=target_port))
    command = [tool("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={directory / 'tsdb'}"]
    log = (directory / "prometheus.log").open("wb")
    process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        log.close()


@asynccontextmanager
async def under_load(directory: Path, remote: Node) -> AsyncIterator[Server]:
    """A server whose data does not fit into its memory, and two clients that use it."""
    server = Server(
        ServeSettings(
            exports=(ExportSettings("one", GIB), ExportSettings("two", GIB)),
            listen=(Endpoint(path=str(directory / "nbd.sock")),),
            memory=120 * MIB + anonymous_bytes(),
            swap=(SwapSettings(directory / "swap", GIB),),
            remote=RemoteSettings((("127.0.0.1", remote.port),)),
            control=directory / "control",
            metrics=Endpoint(host="127.0.0.1", port=0),
            metrics_required=True,
        )
    )
    await server.start()
    clients = [await dial(directory / "nbd.sock") for _ in range(2)]
    work = []
    for client, name in zip(clients, ("one", "two"), strict=True):
        await client.enter(name)
        work.append(asyncio.create_task(use(client)))
    try:
        yield server
    finally:
        for task in work:
            task.cancel()
        ended = await asyncio.gather(*work, return_exceptions=True)
        for client in clients:
            client.kill()
        await server.stop()
        assert all(isinstance(error, asyncio.CancelledError) for error in ended), ended


async def use(client: Client) -> None:
    content = [bytes(range(256)) * 128 + b"%08d" % number * 4096 for number in range(64)]
    while True:
        for number in range(1500):
            await client.write(number * CLUSTER, content[number % 64])
        for number in range(1500):
            await client.read(number * CLUSTER, PAGE)
            await asyncio.sleep(0)


def expressions() -> dict[str, str]:
    """Everything that is to have data, by where it stands."""
    found = {}
    dashboard = json.loads((GRAFANA / "dashboards" / "nbdram.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            if "record" in rule:
                found[f"the rule {rule['record']}"] = rule["expr"]
                found[f"what is recorded as {rule['record']}"] = rule["record"]
            else:
                # An alert has data only while it fires: what it compares must have some always.
                left, operator, _ = rule["expr"].rpartition(" > " if " > " in rule["expr"] else " < ")
                assert operator, rule["alert"]
                found[f"the alert {rule['alert']}"] = left
    return found


def filled_in(expression: str) -> str:
    """As Grafana sends it."""
    filled = expression.replace("$__rate_interval", "1m").replace("$instance", ".*").replace("$export", ".*")
    assert "$" not in filled, expression
    return filled


async def test_every_panel_rule_and_alert_has_data_of_a_server_under_load(tmp_path: Path) -> None:
    with redis_server(tmp_path / "redis") as remote:
        async with under_load(tmp_path, remote) as server:
            await has_all_data(tmp_path, port_of(server))


async def has_all_data(directory: Path, port: int) -> None:
    with prometheus(directory, port) as prom:
        waiting = expressions()
        waiting["the load"] = 'sum (rate(nbdram_requests_total{command="read"}[1m])) > 0'
        waiting["paging"] = 'nbdram_reclaim_clusters_total{result="compressed"} > 0'
        try:
            async with asyncio.timeout(PATIENCE_S):
                while waiting:
                    for place, expression in list(waiting.items()):
                        if await asyncio.to_thread(prom.ask, filled_in(expression)):
                            del waiting[place]
                    await asyncio.sleep(0.1)
        except TimeoutError:
            pytest.fail(f"no data: {waiting}")


def test_whole_alerts_are_understood_and_fire_when_they_should() -> None:
    checked = subprocess.run(
        [tool("promtool"), "test", "rules", "nbdram.test.yml"], cwd=RULES.parent, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = {case["alertname"] for case in _unit_tests()["alert_rule_test"] if case["exp_alerts"]}
    alerts = {rule["alert"] for group in _rules()["groups"] for rule in group["rules"] if "alert" in rule}
    assert tested == alerts


def _rules() -> Any:
    return yaml.safe_load(RULES.read_text())


def _unit_tests() -> Any:
    return yaml.safe_load((RULES.parent / "nbdram.test.yml").read_text())["tests"][0]


def test_prometheus_accepts_the_configuration() -> None:
    checked = subprocess.run(
        [tool("promtool"), "check", "config", GRAFANA / "prometheus.yml"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_dashboard_is_what_its_generator_makes() -> None:
    spec = importlib.util.spec_from_file_location("generate", GRAFANA / "generate.py")
    assert spec
    assert spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.TARGET.read_text() == generate.text(), "run python grafana/generate.py"


def test_panels_have_ids_and_do_not_overlap() -> None:
    panels = json.loads((GRAFANA / "dashboards" / "nbdram.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        squares = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not squares & taken, panel["title"]
        taken |= squares


async def test_only_metrics_that_exist_are_asked_for(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        text = Exposition(server.server).text().decode()
    exist = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    exist |= {rule["record"] for group in _rules()["groups"] for rule in group["rules"] if "record" in rule}
    # those of which a server without swap has no samples
    exist |= {"nbdram_swap_used_bytes", "nbdram_swap_size_bytes", "nbdram_swap_failing", "nbdram_remote_failing", "up"}
    asked = {
        name
        for expression in expressions().values()
        for name in re.findall(r"\b(?:[a-z_]+:)?(?:nbdram|process)_[a-z_]+(?::\w+)?\b", expression)
    }
    assert asked
    assert asked <= exist
