"""What /metrics says, held against what was done."""

import subprocess
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from nbdram.observe import reference
from nbdram.observe.exposition import Exposition, ServerCollector
from nbdram.observe.families import FAMILIES
from nbdram.protocol.handshake import Failure
from nbdram.protocol.wire import Command, Option
from nbdram.server.counters import COMMANDS, SAMPLE_EVERY

from ..helpers import PAGE, Served, client_flags, eventually, option, served
from .tools import tool


class Scrape:
    """The samples of one look at a server."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self._values = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self._values[name, tuple(sorted(labels.items()))]


def scrape(server: Served) -> Scrape:
    return Scrape(Exposition(server.server).text().decode())


async def test_promtool_finds_nothing_to_complain_of(tmp_path: Path) -> None:
    async with served(tmp_path, "one=1G", "two=1G") as server:
        text = Exposition(server.server).text()
    checked = subprocess.run([tool("promtool"), "check", "metrics"], input=text, capture_output=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


async def test_every_metric_of_the_table_is_there_with_its_kind_and_help(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        found = scrape(server).families
    for family in FAMILIES:
        metric = found[family.name.removesuffix("_total")]
        assert (metric.type, metric.documentation) == (family.kind, family.help)
        assert metric.samples or family.labels in (("path",), ("remote",)) or "_tls_" in family.name, family.name


async def test_what_the_library_collects_is_what_is_exposed(tmp_path: Path) -> None:
    """Also where a name needs escaping."""
    async with served(tmp_path, 'a"b\\n=1G', "two=64M,ro") as server, await server.entered('a"b\\n') as client:
        await client.write(0, bytes(PAGE))
        exposed = scrape(server).families
        registry = CollectorRegistry()
        registry.register(ServerCollector(server.server))
        collected = {metric.name: metric for metric in registry.collect()}
    assert len(collected) == len(FAMILIES)
    for name, metric in collected.items():
        if name != "nbdram_event_loop_lag_seconds":
            assert _samples(metric) == _samples(exposed[name])


def _samples(metric: Metric) -> list[tuple[str, dict[str, str], float]]:
    return sorted(((s.name, s.labels, s.value) for s in metric.samples), key=str)


async def test_requests_and_bytes_are_counted_by_export_and_command(tmp_path: Path) -> None:
    async with served(tmp_path, "one=1G", "two=1G") as server, await server.entered("two") as client:
        await client.write(0, b"x" * 3 * PAGE)
        for at in range(3):
            await client.read(at * PAGE, PAGE)
        await client.call(Command.FLUSH)
        seen = scrape(server)
    assert seen("nbdram_requests_total", export="two", command="write") == 1
    assert seen("nbdram_requests_total", export="two", command="read") == 3
    assert seen("nbdram_requests_total", export="two", command="flush") == 1
    assert seen("nbdram_written_bytes_total", export="two") == 3 * PAGE
    assert seen("nbdram_read_bytes_total", export="two") == 3 * PAGE
    assert seen("nbdram_requests_total", export="one", command="read") == 0


async def test_errors_are_counted_by_command(tmp_path: Path) -> None:
    async with served(tmp_path, "ram=1M,ro") as server, await server.entered() as client:
        assert (await client.call(Command.WRITE, 0, payload=b"x")).error
        assert (await client.call(Command.READ, 1 << 20, 1)).error
        assert (await client.call(Command.READ, 1 << 20, 1)).error
        seen = scrape(server)
    errors = {name: seen("nbdram_request_errors_total", export="ram", command=name) for name in COMMANDS.values()}
    assert {name: count for name, count in errors.items() if count} == {"write": 1, "read": 2}


async def test_handshakes_that_fail_are_counted_by_reason(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        async with await server.client() as client:
            await client.greet()
            await client.send(option(Option.ABORT))
            await client.rest()
        async with await server.client() as client:
            await client.greet()
            await client.send(option(Option.EXPORT_NAME, b"nobody"))
            await client.rest()
        async with await server.client() as client:
            await client.receive(18)
            await client.send(client_flags(1 << 31))
            await client.rest()
        async with await server.client() as client:
            await client.receive(18)
        await eventually(lambda: not server.connections)
        seen = scrape(server)
    counts = {reason: seen("nbdram_handshake_failures_total", reason=reason) for reason in Failure}
    assert {reason for reason, count in counts.items() if count} == {
        Failure.ABORTED,
        Failure.UNKNOWN_EXPORT,
        Failure.MALFORMED,
        Failure.HUNG_UP,
    }
    assert max(counts.values()) == 1
    assert seen("nbdram_connections_accepted_total") == 4


async def test_one_batch_in_many_is_timed_and_stands_for_all(tmp_path: Path) -> None:
    async with served(tmp_path) as server, await server.entered() as client:
        await client.write(0, b"x" * PAGE)
        for _ in range(3 * SAMPLE_EVERY - 1):
            await client.read(0, PAGE)
        seen = scrape(server)
    counted = seen("nbdram_request_duration_seconds_count", command="read", path="inline")
    assert counted == seen("nbdram_request_duration_seconds_bucket", command="read", path="inline", le="+Inf")
    assert counted in (2 * SAMPLE_EVERY, 3 * SAMPLE_EVERY)


async def test_requests_that_become_tasks_are_all_timed(tmp_path: Path) -> None:
    async with served(tmp_path) as server, await server.entered() as client:
        await client.call(Command.READ, 0, 1 << 20)
        await client.call(Command.READ, 0, 1 << 20)
        seen = scrape(server)
    assert seen("nbdram_request_duration_seconds_count", command="read", path="task") == 2


async def test_memory_is_told_as_it_is_counted(tmp_path: Path) -> None:
    async with served(tmp_path, memory="256M") as server, await server.entered() as client:
        await client.write(0, b"x" * 5 * PAGE)
        seen, device = scrape(server), server.device()
        assert seen("nbdram_resident_bytes", export="ram") == device.resident_pages * PAGE == 5 * PAGE
        assert seen("nbdram_stored_bytes", export="ram") == 5 * PAGE
        assert seen("nbdram_index_bytes", export="ram") == PAGE
        assert seen("nbdram_ram_per_stored_byte_ratio") == 6 / 5
        assert seen("nbdram_memory_budget_bytes") == server.server.exports.budget.limit_pages * PAGE
        assert seen("nbdram_memory_used_bytes") == seen("nbdram_memory_overhead_bytes") + 6 * PAGE
        assert seen("nbdram_connections", phase="transmission") == 1
        assert seen("nbdram_export_connections", export="ram") == 1


async def test_all_labels_but_names_and_paths_are_from_small_sets(tmp_path: Path) -> None:
    """A client can't make a series: whatever it sends, the labels are the same."""
    async with served(tmp_path) as server:
        before = _series(server)
        async with await server.entered() as client:
            await client.call(99)
            await client.call(Command.READ, 1 << 62, 1)
        async with await server.client() as client:
            await client.send(b"\xff" * 4096)
            await client.rest()
        assert _series(server) == before


def _series(server: Served) -> set[str]:
    text = Exposition(server.server).text().decode()
    return {line.rpartition(" ")[0] for line in text.splitlines() if line.startswith("nbdram_")}


async def test_the_event_loops_lag_is_measured(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        server.server.lag._due -= 1000
        await eventually(lambda: scrape(server)("nbdram_event_loop_lag_seconds_count") >= 1)
        # A timer may come a little before its time: it is kept in whole milliseconds.
        assert scrape(server)("nbdram_event_loop_lag_seconds_sum") >= 999


def test_the_reference_is_what_the_code_says() -> None:
    committed = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert committed == reference.text(), "run python -m nbdram.observe.reference > docs/metrics.md"


async def test_labels_have_only_the_values_that_the_reference_lists(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        found = scrape(server).families
    for label in ("command", "phase", "reason", "result", "source"):
        listed = {value for name, values in reference._VALUES.items() if name == label for value in values.split(", ")}
        used = {sample.labels[label] for one in found.values() for sample in one.samples if label in sample.labels}
        assert used == listed, label
