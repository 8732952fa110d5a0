"""The manifests for Kubernetes: built by kustomize, they are what Kubernetes, Ray and our command line take."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.scripts.scripts import cli as ray_commands

from server.app import create_app
from server.options import load_settings
from server.settings import Settings
from tests.command_line import CommandLine
from tests.server.process import ROOT

DEPLOY = ROOT / "server" / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ["base", "overlays/one-gpu", "overlays/many-gpus", "overlays/many-nodes"]
# The oldest with sidecars, and the newest that the schemas are of.
VERSIONS = ["1.29", "1.37"]

Resource = Mapping[str, Any]


def has_kustomize() -> bool:
    if shutil.which("kubectl") is None:
        return False
    done = subprocess.run(["kubectl", "version", "--client", "--output=json"], capture_output=True, check=False)
    return "kustomizeVersion" in json.loads(done.stdout or b"{}")


pytestmark = pytest.mark.skipif(not has_kustomize(), reason="no kubectl of version 1.24 or later is installed")


@cache
def built(folder: Path | str) -> list[Resource]:
    done = subprocess.run(["kubectl", "kustomize", KUBERNETES / folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # deprecations
    return list(yaml.safe_load_all(done.stdout))


def of_kind(resources: list[Resource], kind: str) -> dict[str, Resource]:
    return {resource["metadata"]["name"]: resource for resource in resources if resource["kind"] == kind}


def pods(resources: list[Resource]) -> Iterator[tuple[Resource, Resource]]:
    """Workloads, and the pods' specifications."""
    for resource in resources:
        if resource["kind"] in ("StatefulSet", "Deployment"):
            yield resource, resource["spec"]["template"]["spec"]


def containers(pod: Resource) -> list[Resource]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


def container(resources: list[Resource], name: str) -> Resource:
    (found,) = [each for _, pod in pods(resources) for each in containers(pod) if each["name"] == name]
    return found


def told(resources: list[Resource], each: Resource) -> dict[str, str]:
    """A container's environment, without what comes from secrets."""
    maps = of_kind(resources, "ConfigMap")
    environment: dict[str, str] = {}
    for source in each.get("envFrom", ()):
        if "configMapRef" in source:
            environment |= maps[source["configMapRef"]["name"]]["data"]
    return environment | {variable["name"]: variable.get("value", "") for variable in each.get("env", ())}


def shown(abmll: CommandLine, resources: list[Resource], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the real command line makes of the server's arguments and environment."""
    each = container(resources, "abmll")
    command, *options = each["args"]
    assert command == "serve"
    for name in [name for name in os.environ if name.startswith("ABMLL_")]:
        monkeypatch.delenv(name)
    for name, value in told(resources, each).items():
        if name.startswith("ABMLL_"):
            monkeypatch.setenv(name, value)
    rows = abmll("config", "show", "--json", *options).json
    return Settings.model_validate({row["name"]: row["value"] for row in rows if row["table"] == "serve"})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_takes_every_resource(overlay: str, version: str) -> None:
    for resource in built(overlay):
        kubernetes_validate.validate(dict(resource), version, strict=True)
    wrong = json.loads(json.dumps(of_kind(built(overlay), "StatefulSet")["abmll"]))
    wrong["spec"]["template"]["spec"]["containers"][0]["imagee"] = "abmll"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_server_s_arguments_are_settings(
    overlay: str, abmll: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = shown(abmll, built(overlay), monkeypatch)
    assert (settings.host, settings.port) == ("0.0.0.0", 8000)
    assert settings.engine == ("torch" if overlay == "base" else "vllm")
    assert (settings.model is None) is (settings.objects is None) is (settings.posterior is None) is (overlay == "base")
    assert load_settings({}, None).settings.objects == settings.objects  # from the ConfigMap


def test_there_are_as_many_gpus_as_engines_and_adaptation_take(
    abmll: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = shown(abmll, one_node := built("overlays/many-gpus"), monkeypatch)
    assert int(container(one_node, "abmll")["resources"]["limits"]["nvidia.com/gpu"]) == (settings.replicas or 0) + 1

    settings = shown(abmll, nodes := built("overlays/many-nodes"), monkeypatch)
    workers = {
        name: worker["spec"]["template"]["spec"]["containers"][0]
        for name, worker in of_kind(nodes, "Deployment").items()
    }
    assert of_kind(nodes, "Deployment")["abmll-engine"]["spec"]["replicas"] == settings.replicas
    # Questions are let in for as many engines as there may be, not as there are.
    assert settings.replicas is not None
    assert settings.max_replicas is not None
    assert settings.replicas < settings.max_replicas <= 2 * settings.replicas
    assert {worker["resources"]["limits"]["nvidia.com/gpu"] for worker in workers.values()} == {"1"}
    assert "nvidia.com/gpu" not in container(nodes, "abmll")["resources"]["limits"]
    # A server that sees no GPU yet places engines by their CPU: one a pod then, too, and none where tasks are taught.
    assert (engine := started(workers["abmll-engine"]))["num_gpus"] == engine["num_cpus"] == 1
    adaptation = started(workers["abmll-adaptation"])
    for kind in ("CPU", "GPU"):
        assert adaptation[f"num_{kind.lower()}s"] == settings.adapt_resources.pop(kind) == 0
    assert json.loads(adaptation["resources"]) == settings.adapt_resources
    assert told(nodes, workers["abmll-adaptation"])["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "0"


def started(each: Resource) -> dict[str, Any]:
    """What Ray's own command line makes of a container's command."""
    program, command, *options = each["command"]
    assert program == "ray"
    return ray_commands.commands[command].make_context(command, options).params


def test_the_pods_of_a_cluster_find_its_head() -> None:
    nodes = built("overlays/many-nodes")
    services = of_kind(nodes, "Service")
    head = started(container(nodes, "ray-head"))
    assert head["head"]
    for name, worker in of_kind(nodes, "Deployment").items():
        host, port = started(worker["spec"]["template"]["spec"]["containers"][0])["address"].split(":")
        service = services[host]["spec"]
        assert int(port) == service["ports"][0]["port"] == head["port"], name
        assert service["publishNotReadyAddresses"]
    (server,) = of_kind(nodes, "StatefulSet").values()
    order = [each["name"] for each in containers(server["spec"]["template"]["spec"])]
    assert order.index("ray-head") < order.index("abmll")
    assert container(nodes, "ray-head")["restartPolicy"] == "Always"
    probe = container(nodes, "ray-head")["startupProbe"]["exec"]["command"]
    assert started({"command": probe})["address"] == f"localhost:{head['port']}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_whatever_is_named_is_there(overlay: str, tmp_path: Path) -> None:
    resources = built(overlay)
    paths = create_app(Settings(store=tmp_path)).openapi()["paths"]
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    secrets = dict(re.findall(r"create secret generic (\w+) ((?:.*\\\n)*.*)", readme))
    for workload, pod in pods(resources):
        claims = [claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())]
        volumes = {*claims, *(volume["name"] for volume in pod["volumes"])}
        for each in containers(pod):
            assert {mount["name"] for mount in each["volumeMounts"]} <= volumes
            ports = {port["name"] for port in each.get("ports", ())}
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                probe = each.get(kind, {})
                asked = probe.get("httpGet") or probe.get("tcpSocket")
                assert asked is None or asked["port"] in ports
                assert "httpGet" not in probe or probe["httpGet"]["path"] in paths
            for source in each["envFrom"]:
                assert "secretRef" not in source or source["secretRef"]["name"] in secrets
            for variable in each["env"]:
                key = variable.get("valueFrom", {}).get("secretKeyRef")
                assert key is None or f"={key['key']}=" in secrets[key["name"]]
            words = " ".join([*each.get("command", ()), *each.get("args", ())])
            assert set(re.findall(r"\$\((\w+)\)", words)) <= told(resources, each).keys()
    labels = [workload["spec"]["template"] for workload, _ in pods(resources)]
    for name, service in of_kind(resources, "Service").items():
        behind = [pod for pod in labels if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()]
        assert len(behind) == 1, name
        ports = {port["name"] for each in containers(behind[0]["spec"]) for port in each.get("ports", ())}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_container_may_more_than_it_must(overlay: str) -> None:
    for _, pod in pods(built(overlay)):
        assert pod["securityContext"]["runAsNonRoot"]
        # A Service called abmll would be told as ABMLL_PORT=tcp://..., which is a setting's name.
        assert pod["enableServiceLinks"] is pod["automountServiceAccountToken"] is False
        for each in containers(pod):
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }
            assert {"/tmp", "/home/abmll"} <= {mount["mountPath"] for mount in each["volumeMounts"]}


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_posterior_is_fetched_before_the_server_starts(
    slash: str, tmp_path: Path, abmll: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = built("overlays/one-gpu")
    *command, address, folder = container(one, "posterior")["command"]
    monkeypatch.chdir(tmp_path)
    assert Path(folder) == shown(abmll, one, monkeypatch).posterior
    assert address == "$(POSTERIOR_URL)"
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "posterior.json").write_text("{}")
    for _ in range(2):  # a container that is started anew finds what it has fetched before
        subprocess.run(
            [sys.executable, *command[1:], f"{(tmp_path / 'made').as_uri()}{slash}", f"{tmp_path}/got/"], check=True
        )
    assert [path.relative_to(tmp_path / "got") for path in (tmp_path / "got").rglob("*")] == [Path("posterior.json")]


@pytest.mark.parametrize("component", ["service-monitor", "service-monitor-with-key"])
def test_a_monitor_asks_where_metrics_are(component: str, tmp_path: Path) -> None:
    parts = {"resources": "base", "components": f"components/{component}"}
    lists = {kind: [os.path.relpath(KUBERNETES / part, tmp_path.resolve())] for kind, part in parts.items()}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(lists))
    resources = built(tmp_path.resolve())
    (monitor,) = of_kind(resources, "ServiceMonitor").values()
    service = of_kind(resources, "Service")["abmll"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["path"] in create_app(Settings(store=tmp_path)).openapi()["paths"]
    credentials = {"authorization": {"type": "Bearer", "credentials": {"name": "abmll-metrics", "key": "key"}}}
    assert endpoint.items() >= (credentials if component.endswith("key") else {}).items()
    assert ("authorization" in endpoint) == component.endswith("key")


@pytest.mark.parametrize("overlay", ["base", "overlays/one-gpu"])
def test_a_first_key_is_made_where_there_is_none(
    overlay: str, tmp_path: Path, abmll: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path.resolve()
    parts = {"resources": overlay, "components": "components/first-key"}
    lists: dict[str, Any] = {kind: [os.path.relpath(KUBERNETES / part, folder)] for kind, part in parts.items()}
    images = [{"name": "abmll", "newName": "registry.example/abmll", "newTag": "0.1.0"}]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(lists | {"images": images}))
    resources = built(folder)
    kubernetes_validate.validate(dict(of_kind(resources, "StatefulSet")["abmll"]), VERSIONS[-1], strict=True)
    making, server = container(resources, "keys"), container(resources, "abmll")
    assert making["image"] == server["image"] == "registry.example/abmll:0.1.0"
    path = told(resources, making)["ABMLL_KEY_FILE"]
    assert path == told(resources, server)["ABMLL_KEY_FILE"]
    for each in (making, server):
        assert {"name": "store", "mountPath": str(Path(path).parent)} in each["volumeMounts"]
    assert making["securityContext"] == server["securityContext"]

    environment = os.environ | {"ABMLL_KEY_FILE": str(tmp_path / "keys.sqlite3")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    said = [
        subprocess.run(making["command"], env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert said[0].startswith("abmll_")
    assert said[1] == ""
    monkeypatch.setenv("ABMLL_KEY_FILE", environment["ABMLL_KEY_FILE"])
    assert [(key["name"], len(key["rights"])) for key in abmll("keys", "list", "--json").json] == [("first", 3)]


def test_a_pod_that_never_became_ready_is_replaced_by_an_apply() -> None:
    for overlay in OVERLAYS:  # kubernetes/kubernetes#67250
        assert of_kind(built(overlay), "StatefulSet")["abmll"]["spec"]["podManagementPolicy"] == "Parallel"


def test_images_are_named_in_one_place() -> None:
    for overlay in OVERLAYS:
        images = {each["image"] for _, pod in pods(built(overlay)) for each in containers(pod)}
        assert images == {"abmll:cpu" if overlay == "base" else "abmll:gpu"}
