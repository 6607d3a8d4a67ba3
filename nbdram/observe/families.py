"""Every metric: its name, kind, unit and meaning, and where its number is read when somebody asks.

The table is all there is to know of them: the exposition, docs/metrics.md and the tests are made from it. Reading is
one pass over plain numbers that the event loop writes; it may be done by any thread, and changes nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from nbdram import __version__
from nbdram.memory.histogram import Histogram
from nbdram.memory.layout import CLUSTER, PAGE
from nbdram.server.counters import COMMANDS, SAMPLE_EVERY

if TYPE_CHECKING:
    from nbdram.memory.tiers.remote import Remote
    from nbdram.server.exports import Export
    from nbdram.server.server import Server

Kind = Literal["counter", "gauge", "histogram"]
Row = tuple[Any, ...]  # the values of the labels, and then the number, or the Histogram
Read = Callable[["Source"], Iterable[Row]]


class Source:
    """A server, and its exports at one moment, with their names as they are to be shown."""

    def __init__(self, server: "Server", name_of: Callable[[str], str] = str) -> None:
        self.server = server
        self.name_of = name_of
        self.exports: list[tuple[str, Export]] = [(name_of(export.name), export) for export in list(server.exports)]


@dataclass(frozen=True)
class Family:
    """One metric. A counter's `name` has its `_total`."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...]
    read: Read


def _server(get: Callable[["Server"], float | Histogram]) -> Read:
    return lambda source: [(get(source.server),)]


def _exports(get: Callable[["Export"], float]) -> Read:
    return lambda source: [(name, get(export)) for name, export in source.exports]


def _commands(get: Callable[["Export"], dict[str, int]]) -> Read:
    def read(source: Source) -> Iterator[Row]:
        for name, export in source.exports:
            for command, count in get(export).items():
                yield name, command, count

    return read


def _devices(*attributes: str) -> Callable[["Server"], int]:
    """The sum of attributes over all devices."""
    return lambda server: sum(getattr(device, name) for device in server.exports.devices() for name in attributes)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


_cold_pages, _cold_clusters = _devices("cold_pages"), _devices("cold_clusters")
_in_ram = _devices("resident_pages", "cold_pages", "index_pages")
_stored = _devices("stored_bytes")
_COMMANDS: Final = tuple(COMMANDS.values())


def _faults(source: Source) -> Iterator[Row]:
    for name, export in source.exports:
        yield name, "ram", export.device.ram_faults
        yield name, "disk", export.device.disk_faults
        yield name, "remote", export.device.remote_faults


def _fault_seconds(source: Source) -> Iterator[Row]:
    yield "ram", Histogram.total([export.device.ram_fault_seconds for _, export in source.exports])
    yield "disk", source.server.service.fetcher.seconds
    yield "remote", source.server.service.fetcher.remote_seconds


def _request_seconds(source: Source) -> Iterator[Row]:
    counters = source.server.service.counters
    for command, histogram in counters.inline_seconds.items():
        yield command, "inline", histogram
    for command, histogram in counters.task_seconds.items():
        yield command, "task", histogram


def _connections(source: Source) -> Sequence[Row]:
    in_transmission = sum(export.connections for _, export in source.exports)
    in_all = len(source.server.service.connections)
    return [("handshake", max(0, in_all - in_transmission)), ("transmission", in_transmission)]


def _swap(get: Callable[[Any], float]) -> Read:
    return lambda source: [(source.name_of(str(area.path)), get(area)) for area in source.server.areas]


def _remote(get: Callable[["Remote"], float]) -> Read:
    def read(source: Source) -> Sequence[Row]:
        remote = source.server.remote
        return [(str(remote.settings), get(remote))] if remote else []

    return read


FAMILIES: Final = (
    # -- requests
    Family(
        "nbdram_requests_total",
        "counter",
        "Requests, by export and command.",
        ("export", "command"),
        _commands(lambda e: e.counters.operations),
    ),
    Family(
        "nbdram_request_errors_total",
        "counter",
        "Requests that were answered with an error, by export and command.",
        ("export", "command"),
        _commands(lambda e: e.counters.errors),
    ),
    Family(
        "nbdram_read_bytes_total",
        "counter",
        "Bytes that clients read.",
        ("export",),
        _exports(lambda e: e.counters.read_bytes),
    ),
    Family(
        "nbdram_written_bytes_total",
        "counter",
        "Bytes that clients wrote.",
        ("export",),
        _exports(lambda e: e.counters.written_bytes),
    ),
    Family(
        "nbdram_request_duration_seconds",
        "histogram",
        "Time from a request's arrival to its reply, by command and path. inline: answered by the hot loop, of which "
        f"one batch in {SAMPLE_EVERY} is timed and counted {SAMPLE_EVERY} times; task: all that took longer.",
        ("command", "path"),
        _request_seconds,
    ),
    Family(
        "nbdram_write_waits_total",
        "counter",
        "Times that a WRITE had to wait for memory.",
        ("export",),
        _exports(lambda e: e.counters.write_waits),
    ),
    Family(
        "nbdram_write_wait_duration_seconds",
        "histogram",
        "How long WRITEs waited for memory, whatever came of it.",
        (),
        _server(lambda s: s.service.counters.write_wait_seconds),
    ),
    Family(
        "nbdram_writers_waiting",
        "gauge",
        "Requests that wait for memory now.",
        (),
        _server(lambda s: s.exports.budget.waiting),
    ),
    Family(
        "nbdram_out_of_memory_errors_total",
        "counter",
        "Requests that got ENOSPC because the memory budget was used up and waiting could not help.",
        ("export",),
        _exports(lambda e: e.counters.out_of_memory),
    ),
    # -- exports
    Family(
        "nbdram_export_size_bytes",
        "gauge",
        "The size of the export as its clients see it.",
        ("export",),
        _exports(lambda e: e.device.size),
    ),
    Family(
        "nbdram_export_connections",
        "gauge",
        "Open connections of the export.",
        ("export",),
        _exports(lambda e: e.connections),
    ),
    Family(
        "nbdram_export_connections_opened_total",
        "counter",
        "Connections that opened the export.",
        ("export",),
        _exports(lambda e: e.counters.connections_opened),
    ),
    # -- where the data is
    Family(
        "nbdram_stored_bytes",
        "gauge",
        "What the export holds, before compression, each page once.",
        ("export",),
        _exports(lambda e: e.device.stored_bytes),
    ),
    Family(
        "nbdram_resident_bytes",
        "gauge",
        "RAM for pages as they are.",
        ("export",),
        _exports(lambda e: e.device.resident_pages * PAGE),
    ),
    Family(
        "nbdram_compressed_bytes",
        "gauge",
        "RAM for compressed images.",
        ("export",),
        _exports(lambda e: e.device.cold_pages * PAGE),
    ),
    Family(
        "nbdram_compressed_content_bytes",
        "gauge",
        "What the compressed images in RAM hold, before compression.",
        ("export",),
        _exports(lambda e: e.device.cold_clusters * CLUSTER),
    ),
    Family(
        "nbdram_disk_bytes",
        "gauge",
        "Disk space for compressed images.",
        ("export",),
        _exports(lambda e: e.device.disk_pages * PAGE),
    ),
    Family(
        "nbdram_disk_content_bytes",
        "gauge",
        "What the images on disk hold, before compression.",
        ("export",),
        _exports(lambda e: e.device.disk_clusters * CLUSTER),
    ),
    Family(
        "nbdram_remote_bytes",
        "gauge",
        "Memory of other machines for compressed images.",
        ("export",),
        _exports(lambda e: e.device.remote_pages * PAGE),
    ),
    Family(
        "nbdram_remote_content_bytes",
        "gauge",
        "What the images in a remote hold, before compression.",
        ("export",),
        _exports(lambda e: e.device.remote_clusters * CLUSTER),
    ),
    Family(
        "nbdram_index_bytes",
        "gauge",
        "RAM for the index.",
        ("export",),
        _exports(lambda e: e.device.index_pages * PAGE),
    ),
    Family(
        "nbdram_compressed_ratio",
        "gauge",
        "RAM for compressed images by what they hold; 0 if there are none.",
        (),
        _server(lambda s: _ratio(_cold_pages(s) * PAGE, _cold_clusters(s) * CLUSTER)),
    ),
    Family(
        "nbdram_ram_per_stored_byte_ratio",
        "gauge",
        "RAM for pages, images and index by stored bytes; 0 if nothing is stored.",
        (),
        _server(lambda s: _ratio(_in_ram(s) * PAGE, _stored(s))),
    ),
    # -- the budget
    Family(
        "nbdram_memory_budget_bytes",
        "gauge",
        "RAM that the server may use in all.",
        (),
        _server(lambda s: s.exports.budget.limit_pages * PAGE),
    ),
    Family(
        "nbdram_memory_reclaim_start_bytes",
        "gauge",
        "Use of the budget from which on reclaim works.",
        (),
        _server(lambda s: (s.exports.budget.limit_pages - s.exports.budget.wake_below) * PAGE),
    ),
    Family(
        "nbdram_memory_write_wait_bytes",
        "gauge",
        "Use of the budget from which on writes wait.",
        (),
        _server(lambda s: (s.exports.budget.limit_pages - s.exports.budget.reserve_pages) * PAGE),
    ),
    Family(
        "nbdram_memory_used_bytes",
        "gauge",
        "RAM that counts against the budget.",
        (),
        _server(lambda s: s.exports.budget.used_pages * PAGE),
    ),
    Family(
        "nbdram_memory_overhead_bytes",
        "gauge",
        "The part of the RAM in use that is the process itself.",
        (),
        _server(lambda s: s.exports.budget.overhead_pages * PAGE),
    ),
    Family(
        "nbdram_memory_pressure_events_total",
        "counter",
        "Times that memory pressure of the machine or the control group lowered the budget (--memory auto).",
        (),
        _server(lambda s: s.auto_budget.events if s.auto_budget else 0),
    ),
    # -- paging
    Family(
        "nbdram_faults_total",
        "counter",
        "Reads of cold data, by where it was: a compressed image in RAM, one on disk, or one in a remote.",
        ("export", "source"),
        _faults,
    ),
    Family(
        "nbdram_fault_duration_seconds",
        "histogram",
        "How long a read of cold data took; of those from RAM one in 64 is timed and counted 64 times.",
        ("source",),
        _fault_seconds,
    ),
    Family(
        "nbdram_refaulted_pages_total",
        "counter",
        "Pages of 4 KiB that became resident again after they had been reclaimed.",
        ("export",),
        _exports(lambda e: e.device.refaults),
    ),
    Family(
        "nbdram_reclaim_clusters_total",
        "counter",
        "Clusters of 64 KiB that reclaim took up, by what came of it: compressed; dropped_clean: it still had its "
        "image; zeros: became a hole; demoted: its image went to disk or a remote; moved_on: from disk to a remote; "
        "made_denser: has a smaller image now; incompressible: left resident; thrown_away: was touched meanwhile.",
        ("result",),
        lambda source: list(vars(source.server.reclaimer.counters).items()),
    ),
    Family(
        "nbdram_integrity_errors_total",
        "counter",
        "Clusters whose image was found damaged; who read them got EIO.",
        ("export",),
        _exports(lambda e: e.device.integrity_errors),
    ),
    Family(
        "nbdram_swap_used_bytes",
        "gauge",
        "Disk space that a swap directory takes.",
        ("path",),
        _swap(lambda area: area.used_bytes),
    ),
    Family(
        "nbdram_swap_size_bytes",
        "gauge",
        "Disk space that a swap directory may take: its max, or what its file system has left.",
        ("path",),
        _swap(lambda area: area.size_bytes()),
    ),
    Family(
        "nbdram_swap_failing",
        "gauge",
        "1 after a swap directory could not be written to, until there is room again.",
        ("path",),
        _swap(lambda area: int(area.failing)),
    ),
    Family(
        "nbdram_missing_images_total",
        "counter",
        "Images that a remote had taken and does not have any more; who read them got EIO.",
        ("export",),
        _exports(lambda e: e.device.missing_images),
    ),
    Family(
        "nbdram_remote_used_bytes",
        "gauge",
        "Memory of a remote that is in use by this server.",
        ("remote",),
        _remote(lambda remote: remote.used_bytes),
    ),
    Family(
        "nbdram_remote_max_bytes",
        "gauge",
        "Memory of a remote that this server may use; 0: as much as it takes.",
        ("remote",),
        _remote(lambda remote: remote.max_bytes),
    ),
    Family(
        "nbdram_remote_failing",
        "gauge",
        "1 while a node of a remote has refused an image, and taken none since.",
        ("remote",),
        _remote(lambda remote: int(remote.failing)),
    ),
    Family(
        "nbdram_remote_failures_total",
        "counter",
        "Images that a remote could not take; they stayed where they were.",
        ("remote",),
        _remote(lambda remote: remote.failures),
    ),
    Family(
        "nbdram_remote_retries_total",
        "counter",
        "Commands that had to be sent to a remote again: lost connections, failovers, slots on the move.",
        ("remote",),
        _remote(lambda remote: remote.retries),
    ),
    Family(
        "nbdram_remote_stored_images_total",
        "counter",
        "Images that a remote has taken.",
        ("remote",),
        _remote(lambda remote: remote.stored_images),
    ),
    Family(
        "nbdram_remote_fetched_images_total",
        "counter",
        "Images that came back from a remote.",
        ("remote",),
        _remote(lambda remote: remote.fetched_images),
    ),
    # -- connections
    Family(
        "nbdram_connections",
        "gauge",
        "Open connections, by phase of the protocol.",
        ("phase",),
        _connections,
    ),
    Family(
        "nbdram_connections_accepted_total",
        "counter",
        "Connections that were accepted.",
        (),
        _server(lambda s: s.service.counters.connections_accepted),
    ),
    Family(
        "nbdram_handshake_failures_total",
        "counter",
        "Connections that ended before an export was opened, by reason.",
        ("reason",),
        lambda source: list(source.server.service.counters.handshake_failures.items()),
    ),
    Family(
        "nbdram_hang_ups_total",
        "counter",
        "Connections in transmission that the server ended: idle or stalled for too long, not allowed any more, or "
        "because their export was removed.",
        ("cause",),
        lambda source: source.server.service.counters.hung_up.items(),
    ),
    # -- settings
    Family(
        "nbdram_reload_failures_total",
        "counter",
        "Reloads that changed nothing, because a setting or a certificate was no good.",
        (),
        _server(lambda s: s.reloader.failures),
    ),
    Family(
        "nbdram_reload_success_timestamp_seconds",
        "gauge",
        "When the settings that are in force were read, in seconds since 1970.",
        (),
        _server(lambda s: s.reloader.succeeded_at),
    ),
    Family(
        "nbdram_tls_certificate_expiry_timestamp_seconds",
        "gauge",
        "When the certificate that is in use ends, in seconds since 1970; absent without TLS.",
        (),
        lambda source: [(tls.credentials.expires,)] if (tls := source.server.service.tls) else [],
    ),
    Family(
        "nbdram_protocol_errors_total",
        "counter",
        "Connections that were closed because the client could not be understood any more.",
        (),
        _server(lambda s: s.service.counters.protocol_errors),
    ),
    # -- the server itself
    Family(
        "nbdram_event_loop_lag_seconds",
        "histogram",
        "How much later than asked for a timer of the event loop ran; one is set four times a second.",
        (),
        _server(lambda s: s.lag.seconds),
    ),
    Family(
        "nbdram_ready",
        "gauge",
        "1 while the server serves; 0 while it starts or drains.",
        (),
        _server(lambda s: int(s.ready)),
    ),
    Family(
        "nbdram_build_info",
        "gauge",
        "Always 1; the label says which version this is.",
        ("version",),
        lambda _: [(__version__, 1)],
    ),
)
