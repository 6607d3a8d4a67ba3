"""One cluster for all tests that leave it as it was."""

from collections.abc import Iterator

import pytest

from tests.memory.tiers.redis_cluster import Cluster, cluster


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("redis")) as made:
        yield made
