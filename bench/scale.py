"""What huge exports, many exports and many connections cost, in speed and in memory."""

import re
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Final

from bench import fio, idle, report, rounds
from bench.errors import NoMatch
from bench.fio import Job
from bench.host import need_memory
from bench.options import Found, Options
from bench.proc import Memory
from bench.servers import DEFAULT_EXPORT, PEERS, Server, nbdram, running
from bench.serving import OURS, detail_table, speed_table

_READS: Final = Job("4K randread QD64", "randread", "4k", 64)
_IDLE: Final = 1000
_PLAIN, _HUGE, _CROWDED = "1 GiB", "1 TiB", f"1 GiB, {_IDLE} idle"

_SIZES: Final = ("1G", "1T", "64T")
_PEER_SIZES: Final = ("1G", "1T")
_EXPORTS: Final = (1, 100, 1000)
_CONNECTIONS: Final = (0, 1, 10, 100, 1000)
_PEER_CONNECTIONS: Final = (0, 1, 10, 100)  # nbdkit starts 16 threads for each
_SETTLE_S: Final = 0.3
_ACTIVE: Final = (1, 10, 100)


def run(options: Options) -> Found:
    """Run the parts whose name matches."""
    parts: Mapping[str, Callable[[Options], Found]] = {
        "speed": speed,
        "memory": memory,
        "aggregate": aggregate,
    }
    chosen = [name for name in parts if re.search(options.only, name, re.IGNORECASE)]
    if not chosen:
        raise NoMatch(f"no part matches {options.only!r}: {', '.join(parts)}")
    found: dict[str, object] = {}
    for name in chosen:
        found[name] = parts[name](options)
        print()
    return found


def speed(options: Options) -> Found:
    """The same GiB: alone, as the first of a TiB, and beside a thousand idle connections."""
    need_memory(4)
    servers = [
        nbdram({DEFAULT_EXPORT: "1G"}, name=_PLAIN),
        nbdram({DEFAULT_EXPORT: "1T"}, name=_HUGE),
        nbdram({DEFAULT_EXPORT: "1G"}, name=_CROWDED),
    ]
    with running(servers):
        for server in servers:
            fio.fill(server.uri())
        with idle.connections(servers[-1], _IDLE):
            results = rounds.measure([_READS], servers, options)
    samples = results[_READS.name]
    rows = []
    for name, found in samples.items():
        row = [name, f"{rounds.median(found, rounds.speed) / 1000:.1f}"]
        others = max(sample.others for sample in found)
        for figure in (rounds.speed, rounds.cpu):
            values = rounds.ratios(found, samples[_PLAIN], figure)
            row += [f"{statistics.median(values):.2f}", report.span(values)]
        rows.append([*row, f"{others:.2f}"])
    head = ["export", "kIOPS", "ratio", "range", "ratio CPU", "range", "others"]
    print(report.table(f"nbdram: {_READS.name}, by size and idle connections", head, rows))
    return rounds.as_json(results)


def memory(options: Options) -> Found:
    """What a server holds when nothing was written to it."""
    found: dict[str, Memory] = {}
    for size in _SIZES:
        found[f"{OURS}, 1 export of {size}"] = _empty(nbdram({DEFAULT_EXPORT: size}))
    for peer in options.peers:
        for size in _PEER_SIZES:
            found[f"{peer}, 1 export of {size}"] = _empty(PEERS[peer](size))
    for count in _EXPORTS:
        exports = {f"ram{number}": "1G" for number in range(count)}
        found[f"{OURS}, {count} exports of 1G"] = _empty(nbdram(exports))
    found |= _with_connections(nbdram({DEFAULT_EXPORT: "1G"}), _CONNECTIONS)
    for peer in options.peers:
        found |= _with_connections(PEERS[peer]("1G"), _PEER_CONNECTIONS)
    rows = [[name, *map(report.size, _columns(usage))] for name, usage in found.items()]
    head = ["server", "Rss", "Pss_Anon", "RssAnon", "page tables", "memfds", "own"]
    print(report.table("Memory of a server with empty devices", head, rows))
    print("own = RssAnon + page tables + memfds; Rss also has shared libraries")
    return {name: asdict(usage) for name, usage in found.items()}


def _columns(usage: Memory) -> list[int]:
    shown = [usage.rss, usage.pss_anon, usage.rss_anon, usage.page_tables, usage.memfd]
    return [*shown, usage.own]


def _empty(server: Server) -> Memory:
    with server:
        return _settled(server)


def _settled(server: Server) -> Memory:
    time.sleep(_SETTLE_S)  # what start-up and handshakes have left behind gets cleaned up
    return server.memory()


def _with_connections(server: Server, counts: tuple[int, ...]) -> dict[str, Memory]:
    found = {}
    with server, ExitStack() as stack:
        held = 0
        for count in counts:
            stack.enter_context(idle.connections(server, count - held))
            held = count
            found[f"{server.name}, {count} connections"] = _settled(server)
    return found


def aggregate(options: Options) -> Found:
    """All servers with 1, 10 and 100 connections that are busy."""
    jobs = [Job(f"4K randread {n} x QD8", "randread", "4k", 8, connections=n) for n in _ACTIVE]
    names = [OURS, *options.peers]
    need_memory(len(names) + 1)
    servers = [nbdram({DEFAULT_EXPORT: "1G"}), *(PEERS[peer]("1G") for peer in options.peers)]
    with running(servers):
        for server in servers:
            fio.fill(server.uri())
        results = rounds.measure(jobs, servers, options)
    print(speed_table(jobs, results, names, "Many busy connections"), end="\n\n")
    print(detail_table(jobs, results, names))
    return rounds.as_json(results)
