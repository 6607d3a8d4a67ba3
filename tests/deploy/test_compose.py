"""deploy/compose.yaml: as Compose's own schema wants it, and true about the files and options that it names."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.observe.tools import tool

from .commands import understood

DEPLOY: Final = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def services() -> Any:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


def mounts(service: Any) -> dict[str, str]:
    """What is mounted, by its place in the container."""
    found = {}
    for volume in service["volumes"]:
        if isinstance(volume, str):
            source, target = volume.split(":")[:2]
        else:
            source, target = volume["source"], volume["target"]
        found[target] = source
    return found


def test_compose_knows_all_of_it() -> None:
    checker = [str(Path(sys.executable).parent / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    checked = subprocess.run([*checker, str(DEPLOY / "compose.yaml")], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_files_that_are_mounted_exist(services: Any) -> None:
    files = [source for service in services.values() for source in mounts(service).values() if source[0] == "."]
    assert len(files) == 4
    for source in files:
        assert (DEPLOY / source).exists(), source
    assert (DEPLOY / services["nbdram"]["build"]["context"] / services["nbdram"]["build"]["dockerfile"]).is_file()


def test_the_server_keeps_its_data_outside_of_its_container_in_ram(services: Any) -> None:
    asked = understood(services["nbdram"]["command"])
    assert mounts(services["nbdram"])[str(asked.state_dir)].startswith("/dev/shm/")
    for text in (*asked.listen, f"unix:{asked.control}"):
        assert mounts(services["nbdram"])[str(Path(text.removeprefix("unix:")).parent)] == "socket"


def test_nothing_is_open_beyond_this_host(services: Any) -> None:
    for service in services.values():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), port


def test_prometheus_scrapes_the_server_and_evaluates_the_rules(services: Any, tmp_path: Path) -> None:
    places = mounts(services["prometheus"])
    assert "--config.file=/etc/prometheus/prometheus.yml" in services["prometheus"]["command"]
    assert (DEPLOY / places["/etc/prometheus/prometheus.yml"]).samefile(DEPLOY / "compose-prometheus.yml")
    (tmp_path / "prometheus.yml").write_bytes((DEPLOY / "compose-prometheus.yml").read_bytes())
    (tmp_path / "rules").symlink_to((DEPLOY / places["/etc/prometheus/rules"]).resolve())
    checked = subprocess.run([tool("promtool"), "check", "config", tmp_path / "prometheus.yml"], capture_output=True)
    assert checked.returncode == 0, checked.stdout
    rules = re.search(rb"SUCCESS: (\d+) rules found", checked.stdout)
    assert rules
    assert int(rules[1]) > 0
    (job,) = yaml.safe_load((DEPLOY / "compose-prometheus.yml").read_text())["scrape_configs"]
    host, _, port = job["static_configs"][0]["targets"][0].partition(":")
    assert understood(services[host]["command"]).metrics.endswith(f":{port}")


def test_grafana_finds_prometheus_and_the_dashboard(services: Any) -> None:
    places = mounts(services["grafana"])
    provisioning = DEPLOY / places["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] in [f"http://{name}:9090" for name in services]
    (provider,) = yaml.safe_load((provisioning / "dashboards/nbdram.yaml").read_text())["providers"]
    assert list((DEPLOY / places[provider["options"]["path"]]).glob("*.json"))
