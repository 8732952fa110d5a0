"""What operators get: Prometheus's configuration and rules, and Grafana's dashboard, beside a real server."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.feedback import FIRST
from tests.server.conftest import Server, free_port, wait_for
from tests.server.process import ROOT
from tests.server.test_http import QUESTION

DEPLOY = ROOT / "server" / "deploy"
RULES = DEPLOY / "prometheus" / "rules" / "abmll.yml"
NAME = re.compile(r"\b(?:abmll|process|vllm)[:_][a-zA-Z0-9_:]+")
KEY = "a key of the tests"
# A port on which nobody listens.
NOBODY = "127.0.0.1:1"

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="Debian's package prometheus is not installed",
)


def groups() -> list[dict[str, Any]]:
    return yaml.safe_load(RULES.read_text())["groups"]


def dashboard() -> dict[str, Any]:
    return json.loads((DEPLOY / "grafana" / "dashboards" / "abmll.json").read_text())


def asked_by_panels() -> dict[str, str]:
    """The dashboard's expressions, its variables filled in; the panel's title of each."""
    filled: dict[str, str] = {}
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "1m")
            filled[re.sub(r"\$(instance|task)\b", ".*", expression)] = panel["title"]
    return filled


class Prometheus:
    """A real Prometheus with our configuration, told of other targets and shorter intervals."""

    def __init__(self, folder: Path, targets: list[str]) -> None:
        shutil.copytree(DEPLOY / "prometheus" / "rules", folder / "rules")
        config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"] = [{"targets": targets}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "abmll.key").write_text(KEY)
        address = f"127.0.0.1:{free_port()}"
        self.http = httpx.Client(base_url=f"http://{address}/api/v1", timeout=30)
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        self.log = folder / "log"
        with self.log.open("w") as stream:
            self.process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=stream, stderr=stream)

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression; what is not PromQL fails."""
        reply = self.http.get("/query", params={"query": expression})
        assert reply.is_success, (expression, reply.text)
        return reply.json()["data"]["result"]

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.http.get("../../-/ready").is_success
        except httpx.TransportError:
            return False

    def knows(self, expression: str) -> bool:
        return bool(self.ask(expression))

    def rules(self) -> list[dict[str, Any]]:
        """Every rule of every group, with its health and its alerts."""
        return [rule for group in self.http.get("/rules").json()["data"]["groups"] for rule in group["rules"]]


class Exporter:
    """A target that notes what it is asked with."""

    def __init__(self) -> None:
        self.sent: list[str | None] = []
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                exporter.sent.append(self.headers["Authorization"])
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def exporter() -> Iterator[Exporter]:
    made = Exporter()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture(scope="module")
def watched(server: Server, exporter: Exporter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus, with two scrapes between which people have asked every kind of question."""
    target = server.url.removeprefix("http://")
    made = Prometheus(tmp_path_factory.mktemp("prometheus"), [target, f"127.0.0.1:{exporter.http.server_port}", NOBODY])
    try:
        wait_for(made.ready)
        for seed in range(FIRST):  # drift is told from there on
            assert server.http.post("/generate", json=QUESTION | {"draws": 1, "seed": seed}).status_code == 200
        ask_around(server)
        wait_for(lambda: made.knows('abmll_feedback_count{task="global"} > 0'))
        ask_around(server)
        wait_for(lambda: made.knows('rate(abmll_requests_total{route="/score"}[1m]) > 0'))
        wait_for(lambda: made.knows("abmll:errors:share5m"))
        yield made
    finally:
        made.http.close()
        made.process.terminate()
        made.process.wait(30)


def ask_around(server: Server) -> None:
    text = {"prompt": "the film", "max_tokens": 2, "draws": 2}
    for seed, question in enumerate([QUESTION, QUESTION | {"abstain_below": 1.0}, text]):
        reply = server.http.post("/generate", json=question | {"seed": seed})
        assert reply.status_code == 200, reply.text
        if question is QUESTION:
            said = {"request_id": reply.json()["request_id"], "answer": 0}
            assert server.http.post("/feedback", json=said).status_code == 200
    assert server.http.post("/score", json={"prompt": "the film", "answer": "a delight"}).status_code == 200


@needs_prometheus
@pytest.mark.parametrize(
    "what", ["check config prometheus.yml", "check rules rules/abmll.yml", "test rules tests/abmll_test.yml"]
)
def test_prometheus_accepts_the_configuration_and_the_rules_do_as_their_tests_say(what: str) -> None:
    told = subprocess.run(
        ["promtool", *what.split()], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stdout + told.stderr
    assert "SUCCESS" in told.stdout


def test_every_alert_is_tested_and_says_how_grave_it_is_and_what_to_do() -> None:
    tested = (DEPLOY / "prometheus" / "tests" / "abmll_test.yml").read_text()
    page = (DEPLOY / "README.md").read_text()
    alerts = [rule for group in groups() for rule in group["rules"] if "alert" in rule]
    assert alerts
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["annotations"].keys() == {"summary", "description"}
        assert f'alertname="{alert["alert"]}"' in tested
        assert f"`{alert['alert']}`" in page


@needs_prometheus
def test_targets_are_scraped_with_the_key_and_rules_are_evaluated(watched: Prometheus, exporter: Exporter) -> None:
    def states() -> list[str]:
        return sorted(each["health"] for each in watched.http.get("/targets").json()["data"]["activeTargets"])

    wait_for(lambda: states() == ["down", "up", "up"])
    assert set(exporter.sent) == {f"Bearer {KEY}"}
    # Each group of rules is evaluated at a time of its own.
    wait_for(lambda: all(rule["health"] != "unknown" for rule in watched.rules()))
    wait_for(lambda: watched.knows('ALERTS{alertname="AbmllDown"}'))
    rules = watched.rules()
    assert len(rules) == sum(len(group["rules"]) for group in groups())
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    (down,) = [alert for rule in rules if rule["name"] == "AbmllDown" for alert in rule["alerts"]]
    assert (down["labels"]["instance"], down["state"] in ("pending", "firing")) == (NOBODY, True)
    recorded = {rule["record"] for group in groups() for rule in group["rules"] if "record" in rule}
    # Of adaptation jobs none has ended yet.
    recorded.remove("abmll:adaptation_failures:share1h")
    wait_for(lambda: all(watched.knows(name) for name in recorded))


@needs_prometheus
def test_every_expression_of_the_dashboard_is_answered(watched: Prometheus) -> None:
    empty = {title for expression, title in asked_by_panels().items() if not watched.ask(expression)}
    assert empty == {"vLLM's requests", "KV and prefix cache", "Tokens"}


def test_every_metric_named_by_rules_and_dashboard_exists(server: Server) -> None:
    ask_around(server)
    rules = [rule for group in groups() for rule in group["rules"]]
    named = {name for rule in rules for name in NAME.findall(rule["expr"])}
    named |= {name for expression in asked_by_panels() for name in NAME.findall(expression)}
    named |= {name for variable in dashboard()["templating"]["list"] for name in NAME.findall(str(variable["query"]))}
    families = list(text_string_to_metric_families(server.http.get("/metrics").text))
    exported = {sample.name for family in families for sample in family.samples} | {family.name for family in families}
    vllm = {name for name in named if name.startswith("vllm:")}
    assert named - vllm - exported - {rule.get("record") for rule in rules} == set()
    assert len(named & exported) > 30
    found = importlib.util.find_spec("vllm")
    if found is not None and found.origin is not None:
        source = (Path(found.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
        known = set(re.findall(r'name="(vllm:[a-z_]+)"', source))
        assert {re.sub("_total$", "", name) for name in vllm} - known == set()


def test_every_route_named_by_rules_and_dashboard_exists(server: Server) -> None:
    text = RULES.read_text() + "".join(asked_by_panels())
    named = {route for routes in re.findall(r'route[=!]~"([^"]+)"', text) for route in routes.split("|")}
    assert named <= server.http.get("/openapi.json").json()["paths"].keys()


def test_the_dashboard_has_what_grafana_needs_to_show_it() -> None:
    board = dashboard()
    panels = board["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["description"]
            assert panel["targets"]
    variables = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(panels)))
    assert used == variables


def test_what_compose_mounts_exists_and_what_it_runs_is_pinned_and_watched() -> None:
    """Read only: no container engine runs here."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        if "build" in service:
            assert (DEPLOY / service["build"]["context"] / "Dockerfile").is_file()
        else:
            assert re.fullmatch(r"\S+:v?\d+\.\d+\.\d+", service["image"]), name
        assert service["healthcheck"]["test"]
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}
        for volume in service["volumes"]:
            source = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"], volume
    manifest = yaml.safe_load((DEPLOY / "kubernetes" / "base" / "server.yaml").read_text())
    grace = manifest["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert compose["services"]["abmll"]["stop_grace_period"] == f"{grace}s"
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"][0]
    (target,) = scraped["static_configs"][0]["targets"]
    assert target.split(":") == ["abmll", compose["services"]["abmll"]["command"][-1]]
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert httpx.URL(sources[0]["url"]).host in compose["services"]
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/abmll.yml").read_text())["providers"][0]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in compose["services"]["grafana"]["volumes"]
