"""All that a running server can tell of itself, as plain numbers, read when somebody asks."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nbdram import __version__
from nbdram.memory.layout import CLUSTER, PAGE
from nbdram.memory.recent import Recent
from nbdram.server.counters import COMMANDS

if TYPE_CHECKING:
    from nbdram.memory.tiers.remote import Remote
    from nbdram.server.exports import Export
    from nbdram.server.server import Server

Snapshot = dict[str, Any]  # ready for JSON: numbers, strings, and such dictionaries and lists


def take(server: "Server") -> Snapshot:
    """Sizes in bytes, times in seconds, the rest counted since the server started."""
    budget, reclaimer, fetcher = server.exports.budget, server.reclaimer, server.service.fetcher
    served = list(server.exports)
    exports = [_export(export) for export in served]
    ram_times = Recent()
    for device in server.exports.devices():
        ram_times.extend(device.ram_fault_times)
    counters = server.service.counters
    return {
        "version": __version__,
        "budget": {
            "limit": budget.limit_pages * PAGE,
            "used": budget.used_pages * PAGE,
            "overhead": budget.overhead_pages * PAGE,
        },
        "exports": exports,
        "faults": {
            "ram": sum(export["ram_faults"] for export in exports),
            "ram_seconds": _percentiles(ram_times),
            "disk": fetcher.fetched,
            "disk_seconds": _percentiles(fetcher.times),
            "remote": fetcher.fetched_from_remote,
            "remote_seconds": _percentiles(fetcher.remote_times),
            "refaulted_pages": sum(export["refaulted_pages"] for export in exports),
        },
        "reclaim": vars(reclaimer.counters).copy(),
        "swap": [
            {"path": str(area.path), "used": area.used_bytes, "max": area.max_bytes, "failing": area.failing}
            for area in server.areas
        ],
        "remote": server.remote and remote_facts(server.remote),
        "connections": len(server.service.connections),
        "tasks": len(asyncio.all_tasks(server.loop)) if server.loop else 0,
        "operations": _sum_by_name(export.counters.operations for export in served),
        "read_bytes": sum(export.counters.read_bytes for export in served),
        "written_bytes": sum(export.counters.written_bytes for export in served),
        "errors": sum(sum(export.counters.errors.values()) for export in served) + counters.protocol_errors,
        "handshake_failures": sum(counters.handshake_failures.values()),
        "write_waits": sum(export.counters.write_waits for export in served),
    }


def remote_facts(remote: "Remote") -> Snapshot:
    return {
        "url": str(remote.settings),
        "used": remote.used_bytes,
        "max": remote.max_bytes,
        "failing": remote.failing,
        "failures": remote.failures,
        "retries": remote.retries,
    }


def _export(export: "Export") -> Snapshot:
    device = export.device
    return {
        "name": export.name,
        "maximum": device.size,
        **export.held_bytes(),
        "compressed_from": device.cold_clusters * CLUSTER,
        "disk_from": device.disk_clusters * CLUSTER,
        "remote_from": device.remote_clusters * CLUSTER,
        "index": device.index_pages * PAGE,
        "ram_faults": device.ram_faults,
        "integrity_errors": device.integrity_errors,
        "missing_images": device.missing_images,
        "refaulted_pages": device.refaults,
        "connections": export.connections,
    }


def _sum_by_name(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter(dict.fromkeys(COMMANDS.values(), 0))
    for count in counts:
        total.update(count)
    return dict(total)


def _percentiles(times: Recent) -> dict[str, float | None]:
    return {"p50": times.percentile(0.5), "p99": times.percentile(0.99)}
