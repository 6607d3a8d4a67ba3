"""Writes dashboards/nbdram.json: python grafana/generate.py

The panels are the tables below; a test holds the file against them, and runs every expression against Prometheus.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "dashboards" / "nbdram.json"

Json = dict[str, Any]

HERE = 'instance=~"$instance"'
EXPORT = 'instance=~"$instance",export=~"$export"'
WINDOW = "$__rate_interval"


@dataclass(frozen=True)
class Panel:
    """A panel: `queries` are (expression, legend); `width` is in 24ths of the page."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False
    help: str = ""


def rate(metric: str, labels: str = HERE, by: str = "") -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({metric}{{{labels}}}[{WINDOW}]))"


def total(metric: str, labels: str = HERE, by: str = "") -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} ({metric}{{{labels}}})"


def quantile(share: float, metric: str, by: str = "") -> str:
    grouping = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({grouping}) (rate({metric}_bucket{{{HERE}}}[{WINDOW}])))"


def one(title: str, unit: str, expression: str, **options: Any) -> Panel:
    return Panel(title, unit, ((expression, ""),), "stat", 4, **options)


ROWS: dict[str, list[Panel]] = {
    "Overview": [
        one("Servers ready", "short", total("nbdram_ready")),
        one("Stored", "bytes", total("nbdram_stored_bytes")),
        one(
            "Budget used",
            "percentunit",
            f"{total('nbdram_memory_used_bytes')} / {total('nbdram_memory_budget_bytes')}",
            help="Once there is more data than fits, reclaim keeps this at some 95 %: that is as it should be.",
        ),
        one(
            "RAM per stored byte",
            "percentunit",
            f"avg (nbdram_ram_per_stored_byte_ratio{{{HERE}}})",
            help="Below 100 %: cold data is compressed, or on disk.",
        ),
        one("Connections", "short", total("nbdram_connections")),
        one("Damaged images", "short", total("nbdram_integrity_errors_total"), help="Anything but 0 is lost data."),
        Panel(
            "Throughput",
            "Bps",
            ((rate("nbdram_read_bytes_total"), "read"), (rate("nbdram_written_bytes_total"), "written")),
        ),
        Panel("Requests", "ops", ((rate("nbdram_requests_total", by="command"), "{{command}}"),)),
        Panel("Errors", "ops", ((rate("nbdram_request_errors_total", by="command"), "{{command}}"),)),
        Panel(
            "Latency, half of the requests",
            "s",
            ((quantile(0.5, "nbdram_request_duration_seconds", "command"), "{{command}}"),),
            width=12,
        ),
        Panel(
            "Latency, 99 of 100 requests",
            "s",
            ((quantile(0.99, "nbdram_request_duration_seconds", "command"), "{{command}}"),),
            width=12,
        ),
    ],
    "Export detail": [
        Panel("Read", "Bps", ((rate("nbdram_read_bytes_total", EXPORT, "export"), "{{export}}"),)),
        Panel("Written", "Bps", ((rate("nbdram_written_bytes_total", EXPORT, "export"), "{{export}}"),)),
        Panel(
            "Requests", "ops", ((rate("nbdram_requests_total", EXPORT, "export, command"), "{{export}} {{command}}"),)
        ),
        Panel(
            "Stored",
            "bytes",
            ((total("nbdram_stored_bytes", EXPORT, "export"), "{{export}}"),),
            help="Before compression, each page once.",
        ),
        Panel(
            "Share of the size that is used",
            "percentunit",
            ((f"nbdram_stored_bytes{{{EXPORT}}} / nbdram_export_size_bytes{{{EXPORT}}}", "{{export}}"),),
        ),
        Panel(
            "Where the data is",
            "bytes",
            (
                (total("nbdram_resident_bytes", EXPORT), "resident"),
                (total("nbdram_compressed_bytes", EXPORT), "compressed"),
                (total("nbdram_disk_bytes", EXPORT), "on disk"),
                (total("nbdram_remote_bytes", EXPORT), "remote"),
            ),
            help="As it is in RAM; compressed in RAM; compressed and encrypted on disk, or on other machines.",
            stacked=True,
        ),
        Panel(
            "Reads of cold data",
            "ops",
            ((rate("nbdram_faults_total", EXPORT, "export, source"), "{{export}}, {{source}}"),),
        ),
        Panel(
            "Pages faulted back",
            "ops",
            ((rate("nbdram_refaulted_pages_total", EXPORT, "export"), "{{export}}"),),
            help="They had been reclaimed, and were needed again.",
        ),
        Panel("Errors", "ops", ((rate("nbdram_request_errors_total", EXPORT, "export"), "{{export}}"),)),
    ],
    "Memory and paging": [
        Panel(
            "Budget",
            "bytes",
            (
                (total("nbdram_memory_overhead_bytes"), "the server itself"),
                (total("nbdram_index_bytes"), "index"),
                (total("nbdram_resident_bytes"), "resident"),
                (total("nbdram_compressed_bytes"), "compressed"),
                (total("nbdram_memory_budget_bytes"), "budget"),
            ),
            width=12,
            help="All that the server holds in RAM, and the line that it keeps below.",
            stacked=True,
        ),
        Panel(
            "Compression: image by content",
            "percentunit",
            (
                (f"nbdram_compressed_ratio{{{HERE}}}", "in RAM"),
                (f"{total('nbdram_disk_bytes')} / ({total('nbdram_disk_content_bytes')} > 0) or vector(0)", "on disk"),
            ),
            width=12,
        ),
        Panel("Reads of cold data", "ops", ((rate("nbdram_faults_total", by="source"), "{{source}}"),)),
        Panel(
            "Time for a read of cold data, 99 of 100",
            "s",
            ((quantile(0.99, "nbdram_fault_duration_seconds", "source"), "{{source}}"),),
        ),
        Panel(
            "Working set faulted back in a minute",
            "percentunit",
            (("instance:nbdram_refaulted_working_set:ratio5m", "{{instance}}"),),
            help="Above 0.2 % the budget is too small for what is being used.",
        ),
        Panel(
            "Reclaim, clusters",
            "ops",
            ((rate("nbdram_reclaim_clusters_total", by="result"), "{{result}}"),),
            help="Clusters of 64 KiB, by what became of them. Thrown away: they were touched meanwhile.",
        ),
        Panel(
            "Writes that wait for memory",
            "ops",
            (
                (rate("nbdram_write_waits_total"), "began to wait"),
                (rate("nbdram_out_of_memory_errors_total"), "got ENOSPC"),
                (total("nbdram_writers_waiting"), "wait now"),
            ),
        ),
        Panel(
            "How long writes waited, 99 of 100", "s", ((quantile(0.99, "nbdram_write_wait_duration_seconds"), "wait"),)
        ),
        Panel(
            "Disk tier",
            "percentunit",
            ((f"nbdram_swap_used_bytes{{{HERE}}} / nbdram_swap_size_bytes{{{HERE}}}", "{{path}}"),),
        ),
        Panel("Disk tier failing", "short", ((f"nbdram_swap_failing{{{HERE}}}", "{{path}}"),)),
        Panel("Pressure lowered the budget", "ops", ((rate("nbdram_memory_pressure_events_total"), "events"),)),
    ],
    "Clients and the server itself": [
        Panel("Connections", "short", ((total("nbdram_connections", by="phase"), "{{phase}}"),)),
        Panel(
            "Connections opened",
            "ops",
            ((rate("nbdram_export_connections_opened_total", EXPORT, "export"), "{{export}}"),),
        ),
        Panel("Handshakes that failed", "ops", ((rate("nbdram_handshake_failures_total", by="reason"), "{{reason}}"),)),
        Panel("Connections that broke the protocol", "ops", ((rate("nbdram_protocol_errors_total"), "closed"),)),
        Panel(
            "Event loop late, 99 of 100",
            "s",
            ((quantile(0.99, "nbdram_event_loop_lag_seconds"), "late by"),),
            help="Far above a millisecond: the process gets no CPU, or was swapped out.",
        ),
        Panel(
            "CPU",
            "percentunit",
            ((f'rate(process_cpu_seconds_total{{{HERE},job="nbdram"}}[{WINDOW}])', "{{instance}}"),),
        ),
        Panel(
            "Memory of the process",
            "bytes",
            ((f'process_resident_memory_bytes{{{HERE},job="nbdram"}}', "{{instance}}"),),
        ),
        Panel("Open files", "short", ((f'process_open_fds{{{HERE},job="nbdram"}}', "{{instance}}"),)),
        Panel("Version", "short", ((f"count by (version) (nbdram_build_info{{{HERE}}})", "{{version}}"),)),
    ],
}

_HEIGHT = {"stat": 4, "timeseries": 8}


def dashboard() -> Json:
    panels: list[Json] = []
    at = 0
    for title, row in ROWS.items():
        panels.append(
            {"type": "row", "title": title, "collapsed": False, "gridPos": _place(0, at, 24, 1), "panels": []}
        )
        at += 1
        x = height = 0
        for panel in row:
            if x + panel.width > 24:
                x, at = 0, at + height
            height = _HEIGHT[panel.kind]
            panels.append(_panel(panel, _place(x, at, panel.width, height)))
            x += panel.width
        at += height
    for number, one_panel in enumerate(panels, 1):
        one_panel["id"] = number
    return {
        "uid": "nbdram",
        "title": "nbdram",
        "tags": ["nbdram"],
        "schemaVersion": 38,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_datasource(), _variable("instance"), _variable("export")]},
        "panels": panels,
    }


def _place(x: int, y: int, width: int, height: int) -> Json:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(panel: Panel, place: Json) -> Json:
    custom: Json = {"fillOpacity": 10, "showPoints": "never"}
    if panel.stacked:
        custom = {"fillOpacity": 60, "showPoints": "never", "stacking": {"mode": "normal", "group": "A"}}
    made: Json = {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": expression, "legendFormat": legend or "__auto"}
            for number, (expression, legend) in enumerate(panel.queries)
        ],
    }
    if panel.kind == "timeseries":
        made["fieldConfig"]["defaults"]["custom"] = custom
        made["options"] = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    overrides = [_in_color(series, color) for series, color in _COLORS.items() if panel.stacked]
    if panel.title == "Budget":
        overrides.append(_as_line("budget"))
    if panel.title == "Writes that wait for memory":
        overrides.append(_override("wait now", {"unit": "short"}))
    made["fieldConfig"]["overrides"] = overrides
    return made


# As on the status page.
_COLORS = {
    "the server itself": "#8e99a8",
    "index": "#6a7688",
    "resident": "#0072b2",
    "compressed": "#e69f00",
    "on disk": "#a6528a",
    "remote": "#009e73",
}


def _in_color(series: str, color: str) -> Json:
    return _override(series, {"color": {"mode": "fixed", "fixedColor": color}})


def _as_line(series: str) -> Json:
    """A limit is a line above what is stacked, not a part of it."""
    line = {"stacking": {"mode": "none"}, "fillOpacity": 0, "lineStyle": {"fill": "dash"}}
    return _override(series, {f"custom.{name}": value for name, value in line.items()})


def _override(series: str, properties: Json) -> Json:
    return {
        "matcher": {"id": "byName", "options": series},
        "properties": [{"id": name, "value": value} for name, value in properties.items()],
    }


def _datasource() -> Json:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}


def _variable(label: str) -> Json:
    return {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "query": {"query": f"label_values(nbdram_export_size_bytes, {label})", "refId": label},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }


def text() -> str:
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text())
