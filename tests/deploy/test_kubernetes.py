"""deploy/kubernetes: rendered by kustomize, held against Kubernetes' own schemas and against what nbdram needs."""

import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest
import yaml

from nbdram.config import parse_size
from tests.helpers import MIB

from .commands import understood

BASE: Final = Path(__file__).parents[2] / "deploy" / "kubernetes"
VERSIONS: Final = ("1.29", "1.37")  # the first with native sidecars, and the newest that the schemas know

_LABELS: Final = {"type": "object", "additionalProperties": {"type": "string"}}
# The part of the Prometheus Operator's resource that is used here.
POD_MONITOR: Final = {
    "type": "object",
    "additionalProperties": False,
    "required": ["selector"],
    "properties": {
        "selector": {"type": "object", "additionalProperties": False, "properties": {"matchLabels": _LABELS}},
        "podMetricsEndpoints": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "port": {"type": "string"},
                    "path": {"type": "string"},
                    "interval": {"type": "string", "pattern": r"^(\d+h)?(\d+m)?(\d+s)?$"},
                },
            },
        },
    },
}


def program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


@pytest.fixture(scope="module")
def rendered() -> str:
    done = subprocess.run([program("kubectl"), "kustomize", str(BASE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def objects(rendered: str) -> dict[str, Any]:
    """All that is made, by kind and name."""
    found = list(yaml.safe_load_all(rendered))
    return {f"{item['kind']} {item['metadata']['name']}": item for item in found}


@pytest.fixture(scope="module")
def sidecar(objects: dict[str, Any]) -> Any:
    """The pod with a server beside its application."""
    return objects["Deployment app-with-ram-disk"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def keeper(objects: dict[str, Any]) -> Any:
    return objects["DaemonSet keeper"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_all_of_it(rendered: str, version: str, tmp_path: Path) -> None:
    whole = [text for text in rendered.split("\n---\n") if "kind: PodMonitor" not in text]
    (tmp_path / "all.yaml").write_text("\n---\n".join(whole))
    command = [program("kubernetes-validate"), "--strict", "-k", version, str(tmp_path / "all.yaml")]
    checked = subprocess.run(command, capture_output=True, text=True)
    said = checked.stdout + checked.stderr
    assert checked.returncode == 0, said
    assert said.count(" passed for resource ") == len(whole), said


def test_the_prometheus_operator_finds_the_port_of_the_sidecar(objects: dict[str, Any], sidecar: Any) -> None:
    monitor = objects["PodMonitor nbdram"]
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    jsonschema.validate(monitor["spec"], POD_MONITOR)
    labels = objects["Deployment app-with-ram-disk"]["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert [port["name"] for port in sidecar["initContainers"][0]["ports"]] == ["metrics"]
    assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]


def test_only_the_metrics_can_be_reached_and_only_by_prometheus(objects: dict[str, Any], sidecar: Any) -> None:
    policy = objects["NetworkPolicy nbdram"]["spec"]
    labels = objects["Deployment app-with-ram-disk"]["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    (rule,) = policy["ingress"]
    assert rule["from"]
    assert [port["port"] for port in rule["ports"]] == [sidecar["initContainers"][0]["ports"][0]["containerPort"]]


def test_the_server_of_a_sidecar_has_no_privileges_and_starts_first(sidecar: Any) -> None:
    (server,) = sidecar["initContainers"]
    assert server["restartPolicy"] == "Always", "else it is no sidecar"
    assert sidecar["securityContext"]["runAsNonRoot"]
    for container in (server, *sidecar["containers"]):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    assert {
        probe: server[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    } == {
        "startupProbe": "/readyz",
        "readinessProbe": "/readyz",
        "livenessProbe": "/healthz",
    }


def test_the_data_of_a_sidecar_fits_into_the_memory_of_its_pod(sidecar: Any) -> None:
    (server,) = sidecar["initContainers"]
    volumes = {volume["name"]: volume["emptyDir"] for volume in sidecar["volumes"]}
    places = {mount["mountPath"]: volumes[mount["name"]] for mount in server["volumeMounts"]}
    asked = understood(server["args"])
    state = places[str(asked.state_dir)]
    assert state["medium"] == "Memory"
    limit = parse_size(server["resources"]["limits"]["memory"] + "B")
    assert limit // 2 + 16 * MIB <= parse_size(state["sizeLimit"] + "B") <= limit - 64 * MIB
    socket = next(text.removeprefix("unix:") for text in asked.listen)
    assert str(Path(socket).parent) in places
    assert asked.metrics.endswith(f":{server['ports'][0]['containerPort']}")


def test_the_application_finds_the_socket_of_its_sidecar(sidecar: Any) -> None:
    (server,), (app,) = sidecar["initContainers"], sidecar["containers"]
    asked = understood(server["args"])
    (variable,) = app["env"]
    export, _, path = variable["value"].removeprefix("nbd+unix:///").partition("?socket=")
    assert [text.partition("=")[0] for text in asked.export] == [export]
    assert asked.listen == [f"unix:{path}"]
    assert {mount["mountPath"] for mount in app["volumeMounts"]} == {str(Path(path).parent)}


def test_the_keeper_has_the_devices_of_its_node_and_leaves_its_notes_there(keeper: Any) -> None:
    (container,) = keeper["containers"]
    understood(container["args"])
    for probe in ("startupProbe", "livenessProbe"):
        understood(container[probe]["exec"]["command"][1:])
    assert container["securityContext"]["privileged"]
    assert keeper["hostNetwork"]
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in keeper["volumes"]}
    assert {mount["mountPath"]: paths[mount["name"]] for mount in container["volumeMounts"]} == {
        "/run/nbdram": "/run/nbdram",
        "/dev": "/dev",
    }
