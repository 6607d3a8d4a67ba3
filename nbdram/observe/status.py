"""What the status page asks for, as JSON. It is made for that page and may change with it; tools read /metrics.

GET /api/status[?find=TEXT]     the server, the exports that hold or do most, and connections
GET /api/history[?export=NAME]  curves of the last ten minutes
GET /api/map?export=NAME        the map of a device
"""

import base64
import heapq
import json
import pkgutil
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from nbdram import __version__
from nbdram.memory.histogram import BOUNDS_S, Histogram
from nbdram.memory.layout import CLUSTER, PAGE
from nbdram.observe import device_map
from nbdram.observe.history import INTERVAL_S, POINTS, History
from nbdram.observe.snapshot import remote_facts
from nbdram.observe.web import Answer, Page

if TYPE_CHECKING:
    from nbdram.server.connection import Connection
    from nbdram.server.exports import Export
    from nbdram.server.server import Server

# With more, the page would take longer to make than it may, and nobody would read it.
_MAX_EXPORTS: Final = 100
_MAX_CONNECTIONS: Final = 100

_FILES: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/script.js": ("script.js", "text/javascript; charset=utf-8"),
    "/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
}


def status_pages(server: "Server", history: History) -> dict[str, Page]:
    """The page, and what it asks for."""

    def status(query: dict[str, str]) -> Answer:
        return _json(facts(server, query.get("find", "")))

    def curves(query: dict[str, str]) -> Answer:
        return _json({"interval_s": INTERVAL_S, "points": POINTS, "series": history.series(query.get("export"))})

    def map_of(query: dict[str, str]) -> Answer:
        export = next((export for export in list(server.exports) if export.name == query.get("export")), None)
        if export is not None:
            try:
                return _json(_map(export))
            except ValueError:
                pass  # it was removed just now
        return Answer(b"there is no export of this name\n", status=HTTPStatus.NOT_FOUND)

    found: dict[str, Page] = {"/api/status": status, "/api/history": curves, "/api/map": map_of}
    for path, (name, content_type) in _FILES.items():
        found[path] = _file(name, content_type)
    return found


def _file(name: str, content_type: str) -> Page:
    body = pkgutil.get_data("nbdram.observe", f"page/{name}")
    assert body is not None
    return lambda _: Answer(body, content_type)


def _json(content: dict[str, Any]) -> Answer:
    return Answer(json.dumps(content).encode(), "application/json")


def facts(server: "Server", find: str = "") -> dict[str, Any]:
    """What the status page shows: totals, and of the exports whose names have `find` in them those that matter most."""
    exports = list(server.exports)
    matching = [export for export in exports if find.casefold() in export.name.casefold()]
    shown = heapq.nlargest(_MAX_EXPORTS, matching, key=_importance) if len(matching) > _MAX_EXPORTS else matching
    devices = [export.device for export in exports]
    budget, counters, fetcher = server.exports.budget, server.service.counters, server.service.fetcher
    connections = list(server.service.connections)
    served = [connection for connection in connections if connection.export is not None]
    return {
        "version": __version__,
        "ready": server.ready,
        "time": time.time(),
        "uptime_s": time.monotonic() - server.started_at,
        "memory": {
            "limit": budget.limit_pages * PAGE,
            "used": budget.used_pages * PAGE,
            "overhead": budget.overhead_pages * PAGE,
            "resident": sum(device.resident_pages for device in devices) * PAGE,
            "compressed": sum(device.cold_pages for device in devices) * PAGE,
            "compressed_content": sum(device.cold_clusters for device in devices) * CLUSTER,
            "index": sum(device.index_pages for device in devices) * PAGE,
            "disk": sum(device.disk_pages for device in devices) * PAGE,
            "disk_content": sum(device.disk_clusters for device in devices) * CLUSTER,
            "remote": sum(device.remote_pages for device in devices) * PAGE,
            "remote_content": sum(device.remote_clusters for device in devices) * CLUSTER,
            "stored": sum(device.stored_bytes for device in devices),
            "waiting": budget.waiting,
        },
        "swap": [
            {
                "path": str(area.path),
                "used": area.used_bytes,
                "size": area.size_bytes(),
                "failing": area.failing,
            }
            for area in server.areas
        ],
        "remote": server.remote and remote_facts(server.remote),
        "latency_s": {
            "bounds": BOUNDS_S,
            "read": Histogram.total([counters.inline_seconds["read"], counters.task_seconds["read"]]).counts,
            "write": Histogram.total([counters.inline_seconds["write"], counters.task_seconds["write"]]).counts,
            "fault": Histogram.total(
                [*(device.ram_fault_seconds for device in devices), fetcher.seconds, fetcher.remote_seconds]
            ).counts,
            "loop": server.lag.seconds.counts,
        },
        "attach": [str(endpoint) for endpoint in server.endpoints],
        "export_count": len(exports),
        "matching_count": len(matching),
        "exports": [_export(export) for export in shown],
        "connection_count": len(connections),
        "connections": [_connection(connection) for connection in served[:_MAX_CONNECTIONS]],
    }


def _importance(export: "Export") -> tuple[int, int]:
    device = export.device
    held = device.resident_pages + device.cold_pages + device.disk_pages + device.remote_pages
    return export.connections, held


def _export(export: "Export") -> dict[str, Any]:
    device, counters = export.device, export.counters
    return {
        "name": export.name,
        "description": export.description,
        "read_only": export.read_only,
        "size": device.size,
        "stored": device.stored_bytes,
        **export.held_bytes(),
        "connections": export.connections,
        "requests": sum(counters.operations.values()),
        "read_bytes": counters.read_bytes,
        "written_bytes": counters.written_bytes,
        "ram_faults": device.ram_faults,
        "disk_faults": device.disk_faults,
        "remote_faults": device.remote_faults,
        "errors": sum(counters.errors.values()),
        "integrity_errors": device.integrity_errors,
    }


def _connection(connection: "Connection") -> dict[str, Any]:
    return {
        "peer": connection.peer,
        "export": connection.export.name,
        "replies": connection.replies.mode.value,
        "seconds": time.monotonic() - connection.opened_at,
    }


def _map(export: "Export") -> dict[str, Any]:
    drawn = device_map.draw(export.device)
    return {
        "size": export.device.size,
        "spans": drawn.spans,
        "cell_bytes": drawn.cell_bytes,
        "cells": base64.b64encode(drawn.cells).decode(),
        "complete": drawn.complete,
    }
