"""`python -m bench.capacity`: nodes, network and cost for cold data in a Redis or Valkey cluster, by formulae.

Every figure that was measured is a field of `Facts`, with where it comes from; change them to what you measure.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

from bench import report
from nbdram.config import parse_size
from nbdram.errors import UsageError

_CLUSTER: Final = 64 << 10
_KIB, _GIB, _TIB = 1 << 10, 1 << 30, 1 << 40
_MOST_NODES: Final = 1000  # masters and replicas that Redis Cluster is made for
DEFAULT_SIZES: Final = (1 * _TIB, 100 * _TIB, 10 * 1024 * _TIB)


@dataclass(frozen=True)
class Facts:
    """What a plan rests on."""

    image_share: float = 0.5  # image bytes per byte of content (lz4, 16 KiB blocks)
    seal_bytes: int = 44  # salt, nonce and tag of each image
    key_bytes: int = 150  # key, entry of the hash table, object
    allocator_share: float = 1.147  # jemalloc's size classes over values, a quarter of them raw: used_memory, measured
    node_ram: int = 64 * _GIB  # of one redis-server
    usable_share: float = 0.75  # of it for data: copy-on-write of a resync, replication buffers
    replicas: int = 1  # of each master
    index_bytes: int = 25  # per cluster in the RAM of nbdram: word, reference, two generations
    fault_bytes: int = 32 * _KIB + 100  # an image and its command on the wire
    faults_per_s_per_tib: float = 200.0  # of cold content: what clients ask for again
    demoted_share_per_day: float = 0.1  # of the content, written anew
    node_network: int = 10_000_000_000 // 8  # bytes per second of a node
    network_share: float = 0.5  # of it to plan with
    server_content: int = 64 * _TIB  # of one nbdram: the largest device


@dataclass(frozen=True)
class Plan:
    """For `content` bytes of cold data."""

    content: int
    stored: int  # images, sealed
    node_memory: int  # what they take in the memory of masters
    masters_for_memory: int
    masters_for_network: int
    masters: int
    nodes: int
    clusters: int  # Redis clusters: one is made for so many nodes
    servers: int  # nbdram servers
    index: int  # RAM of nbdram for all of it
    fault_traffic: int  # bytes per second, all masters together
    demotion_traffic: int
    replication_traffic: int
    replica_memory: int


def plan(content: int, facts: Facts) -> Plan:
    """The formulae."""
    images = math.ceil(content / _CLUSTER)
    stored = math.ceil(content * facts.image_share) + images * facts.seal_bytes
    node_memory = math.ceil(stored * facts.allocator_share) + images * facts.key_bytes
    masters_for_memory = math.ceil(node_memory / (facts.node_ram * facts.usable_share))
    fault_traffic = math.ceil(facts.faults_per_s_per_tib * content / _TIB * facts.fault_bytes)
    demotion_traffic = math.ceil(stored * facts.demoted_share_per_day / 86400)
    replication_traffic = demotion_traffic * facts.replicas
    a_node = facts.node_network * facts.network_share
    masters_for_network = math.ceil((fault_traffic + demotion_traffic + replication_traffic) / a_node)
    masters = max(3, masters_for_memory, masters_for_network)
    nodes = masters * (1 + facts.replicas)
    clusters = math.ceil(nodes / _MOST_NODES)
    return Plan(
        content=content,
        stored=stored,
        node_memory=node_memory,
        masters_for_memory=masters_for_memory,
        masters_for_network=masters_for_network,
        masters=masters,
        nodes=nodes,
        clusters=clusters,
        servers=max(clusters, math.ceil(content / facts.server_content)),  # a server has one remote
        index=images * facts.index_bytes,
        fault_traffic=fault_traffic,
        demotion_traffic=demotion_traffic,
        replication_traffic=replication_traffic,
        replica_memory=node_memory * facts.replicas,
    )


def table(sizes: Sequence[int], facts: Facts) -> str:
    plans = [plan(size, facts) for size in sizes]
    rows = []
    for field in fields(Plan):
        values = [getattr(one, field.name) for one in plans]
        if field.name.endswith("_traffic"):
            shown = [f"{value / 1e6:.4g} MB/s" for value in values]
        elif field.name in ("content", "stored", "node_memory", "index", "replica_memory"):
            shown = [report.size(value) for value in values]
        else:
            shown = [str(value) for value in values]
        rows.append([field.name.replace("_", " "), *shown])
    return report.table("Capacity", ["", *(report.size(size) for size in sizes)], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.capacity", description=__doc__)
    for field in fields(Facts):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default, help="default: %(default)s")
    parser.add_argument("sizes", metavar="SIZE", nargs="*", help="content, as in 40T; default: 1T 100T 10P")
    given = vars(parser.parse_args(arguments))
    try:
        sizes = [parse_size(text) for text in given.pop("sizes")]
        if 0 in sizes:
            raise UsageError("there is nothing to plan for 0 bytes")
    except UsageError as error:
        parser.error(str(error))
    print(table(sizes or DEFAULT_SIZES, replace(Facts(), **given)))


if __name__ == "__main__":
    main()
