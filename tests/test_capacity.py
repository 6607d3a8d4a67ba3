"""The capacity model: its formulae, worked out by hand for one amount, and what the documentation shows of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.capacity import DEFAULT_SIZES, Facts, main, plan, table
from tests.helpers import GIB, TIB

# Images of half their size, no overheads, nodes of 64 GiB that may be filled to a half; 32 KiB a fault.
PLAIN = Facts(seal_bytes=0, key_bytes=0, allocator_share=1.0, usable_share=0.5, fault_bytes=32 << 10)


def test_memory_decides_how_many_nodes_there_are() -> None:
    found = plan(4 * TIB, PLAIN)
    assert (found.stored, found.node_memory) == (2 * TIB, 2 * TIB)
    assert (found.masters_for_memory, found.masters, found.nodes) == (64, 64, 128)
    assert (found.clusters, found.servers, found.index) == (1, 1, 4 * TIB // (64 << 10) * 25)
    assert found.fault_traffic == 4 * 200 * (32 << 10)
    assert found.demotion_traffic == found.replication_traffic == -(-2 * TIB // 864000)


def test_so_does_the_network_where_it_is_slow() -> None:
    slow = replace(PLAIN, faults_per_s_per_tib=1e6, node_network=1 << 30)
    found = plan(TIB, slow)
    assert found.masters == found.masters_for_network == 62  # 30.5 GiB/s at half a GiB/s each
    assert found.masters_for_memory == 16


def test_replicas_cost_memory_nodes_and_traffic() -> None:
    none, two = plan(TIB, replace(PLAIN, replicas=0)), plan(TIB, replace(PLAIN, replicas=2))
    assert (none.replica_memory, none.replication_traffic) == (0, 0)
    assert (two.replica_memory, two.replication_traffic) == (2 * none.node_memory, 2 * none.demotion_traffic)
    assert two.nodes == 3 * none.nodes


def test_a_little_takes_three_masters_and_very_much_takes_more_clusters_and_servers() -> None:
    assert plan(GIB, PLAIN).masters == 3
    large = plan(1024 * TIB, PLAIN)
    assert large.clusters == large.servers == -(-large.nodes // 1000) == 33


def test_the_documentation_shows_what_it_says() -> None:
    lines = [line.rstrip() for line in table(DEFAULT_SIZES, Facts()).splitlines()[1:] if line.strip()]
    assert "\n".join(f"    {line}" for line in lines) in (Path(__file__).parents[1] / "docs/remote.md").read_text()


def test_amounts_may_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    main(["40T", "--replicas", "2"])
    assert "40 TiB" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["many"])
    assert "'many' is not a size" in capsys.readouterr().err
