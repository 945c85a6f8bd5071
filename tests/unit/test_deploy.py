"""The files in deploy/, the Dockerfiles and the dashboard: valid, and in step with the code that they speak of."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import yaml

from gen_worker.testing.mock_orchestrator.cli import _parser
from supervisor.config import load_settings
from supervisor.endpoints import Endpoints, plain
from supervisor.http_server import HttpServer
from supervisor.metrics import describe
from supervisor.settings import VARIABLES
from supervisor.worker import FLUSH_S

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
DOCKERFILES = [ROOT / "Dockerfile", ROOT / "examples/hello/Dockerfile"]
OUTSIDE = {"up", "process_resident_memory_bytes", "process_cpu_seconds_total"}
"""Metrics that Prometheus and its client library give."""
TARGET_LABELS = {"instance", "job", "namespace", "pod"}
REGISTRIES = re.compile(r"\b(docker\.io|ghcr\.io|quay\.io|gcr\.io|nvcr\.io|pypi\.org|pytorch\.org)\b")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def manifest(kind: str) -> Any:
    return next(found for path in KUBERNETES if (found := load(path))["kind"] == kind)


# -- metrics that are spoken of -----------------------------------------------------------------


class Selectors:
    """All metrics in a query, with the labels that it matches, and the labels that it groups by."""

    def __init__(self, query: str) -> None:
        self.metrics: list[tuple[str, set[str]]] = []
        self.grouped: set[str] = set()
        self._walk(promql_parser.parse(query))

    def _walk(self, node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            self.metrics.append((node.name or "", {matcher.name for matcher in node.matchers.matchers}))
        modifier = getattr(node, "modifier", None)
        if isinstance(node, promql_parser.AggregateExpr) and modifier is not None:
            self.grouped |= set(modifier.labels)
        for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
            child = getattr(node, name, None)
            if isinstance(child, promql_parser.Expr):
                self._walk(child)
        for argument in getattr(node, "args", ()):
            self._walk(argument)


def labels_by_series() -> dict[str, set[str]]:
    found = {
        series: {*metric.labels, *TARGET_LABELS, *({"le"} if series.endswith("_bucket") else ())}
        for metric in describe()
        for series in metric.samples
    }
    return found | dict.fromkeys(OUTSIDE, TARGET_LABELS)


def queries() -> Iterator[tuple[str, str]]:
    for rule in load(DEPLOY / "prometheus/alerts.yml")["groups"][0]["rules"]:
        yield f"alert {rule['alert']}", rule["expr"]
    for panel in json.loads((DEPLOY / "grafana/dashboard.json").read_text())["panels"]:
        for target in panel.get("targets", []):
            # Grafana puts these in before Prometheus sees the query.
            yield f"panel {panel['title']}", target["expr"].replace("$__rate_interval", "5m")


@pytest.mark.parametrize(("where", "query"), list(queries()))
def test_queries_are_promql_on_metrics_and_labels_that_exist(where: str, query: str) -> None:
    known = labels_by_series()
    selectors = Selectors(query)
    assert selectors.metrics, where
    for name, labels in selectors.metrics:
        assert name in known, f"{where}: there is no {name}"
        assert labels <= known[name], f"{where}: {name} has no {labels - known[name]}"
    for label in selectors.grouped:
        assert all(label in known[name] for name, _ in selectors.metrics), f"{where}: not all have {label}"


def test_a_wrong_query_would_be_found() -> None:
    selectors = Selectors('sum by (cause) (rate(gen_worker_no_such_total{state="x"}[5m])) / on () up > 2')
    assert selectors.metrics == [("gen_worker_no_such_total", {"state"}), ("up", set())]
    assert selectors.grouped == {"cause"}


def test_label_values_of_alerts_exist() -> None:
    """A misspelled outcome would make an alert that never fires."""
    failures = "validation retryable resource canceled fatal auth internal timeout"
    outcomes = [*failures.split(), "success", "busy", "crashed"]
    known = {"outcome": {*outcomes, "failure"}, "state": {"given_up", "ready"}, "cause": {"stopped", "boot"}}
    for where, query in queries():
        for label, values in re.findall(r'(outcome|state|cause)!?=~?"([^"]*)"', query):
            assert set(values.split("|")) <= known[label], where


def test_every_metric_is_looked_at() -> None:
    """One that is on no panel and in no alert is forgotten when it is needed; those here are for queries by hand."""
    by_hand = {"gen_worker_info", "gen_worker_run_delta_bytes_total", "gen_worker_reading"}
    used = {name for _, query in queries() for name, _ in Selectors(query).metrics}
    assert {metric.name for metric in describe() if not used & set(metric.samples)} == by_hand


def test_each_alert_says_what_to_do() -> None:
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    for rule in load(DEPLOY / "prometheus/alerts.yml")["groups"][0]["rules"]:
        assert rule["alert"] in headings
        assert rule["annotations"]["todo"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]


def test_promtool_takes_the_rules() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: the package prometheus has it)")
    done = subprocess.run(
        ["promtool", "check", "rules", DEPLOY / "prometheus/alerts.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_has_room_for_its_panels() -> None:
    dashboard = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard))) - {"__all", "__rate_interval"} == variables


# -- Kubernetes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_manifests_follow_their_schema(path: Path) -> None:
    found = load(path)
    if found["kind"] == "Kustomization":
        assert sorted(found["resources"]) == sorted(each.name for each in KUBERNETES if each != path)
    elif found["kind"] == "PodMonitor":
        jsonschema.validate(found, json.loads((ROOT / "tests/support/schemas/podmonitor.json").read_text()))
    else:
        kubernetes_validate.validate(found, "1.31", strict=True)


def test_kustomize_makes_all_of_it() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", DEPLOY / "kubernetes"], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    made = sorted(each["kind"] for each in yaml.safe_load_all(done.stdout))
    assert made == sorted(kind for path in KUBERNETES if (kind := load(path)["kind"]) != "Kustomization")


def test_selectors_and_ports_fit_together() -> None:
    deployment, monitor, policy = manifest("Deployment"), manifest("PodMonitor"), manifest("NetworkPolicy")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert monitor["spec"]["selector"]["matchLabels"] == labels
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    endpoint = monitor["spec"]["podMetricsEndpoints"][0]
    assert endpoint["port"] in ports
    assert policy["spec"]["ingress"][0]["ports"][0]["port"] in ports
    routes = Endpoints(unready=list, status=lambda: pytest.fail("not asked"), metrics=lambda _: ("", b""))
    probes = [container[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert [probe["path"] for probe in probes] == ["/livez", "/livez", "/readyz"]
    for path in (*(probe["path"] for probe in probes), endpoint["path"]):
        assert routes.answer("GET", path).status is HTTPStatus.OK
    settings = load_settings(environment())
    assert settings.http_addr == f"0.0.0.0:{ports['http']}"
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    for directory in (settings.run_dir, settings.model_cache_dir, settings.auth_token_file):
        assert any(Path(mount) in directory.parents for mount in mounts if directory)


def environment() -> dict[str, str]:
    (container,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    return {entry["name"]: entry.get("value", "from-a-field") for entry in container["env"]}


def test_the_grace_period_covers_the_drain() -> None:
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    sleep, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    drain = load_settings(environment()).drain_timeout_seconds
    assert pod["terminationGracePeriodSeconds"] >= int(seconds) + drain + 2 * FLUSH_S


def test_the_environment_is_made_of_settings() -> None:
    known = {variable.env for variable in VARIABLES.values()}
    assert environment().keys() <= known | {"HOME"}
    assert load(DEPLOY / "compose.yaml")["services"]["worker"]["environment"].keys() <= known


# -- compose ------------------------------------------------------------------------------------


def test_compose() -> None:
    services = load(DEPLOY / "compose.yaml")["services"]
    assert services.keys() == {"orchestrator", "worker", "prometheus", "grafana"}
    for service in services.values():
        assert "build" in service or re.search(r":v?\d", service["image"]), "an image without a version"
        if "build" in service:
            assert (DEPLOY / service["build"]["context"] / "Dockerfile").is_file()
            assert all(f"ARG {name}=" in DOCKERFILES[0].read_text() for name in service["build"]["args"])
        for volume in service.get("volumes", ()):
            assert (DEPLOY / volume.split(":")[0]).exists(), volume
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "a port for everybody"
    settings = load_settings(services["worker"]["environment"])
    assert settings.scheduler_addr == "orchestrator:8080"
    assert int(services["worker"]["stop_grace_period"].rstrip("s")) >= settings.drain_timeout_seconds + 2 * FLUSH_S
    assert (ROOT / "examples/hello" / f"{settings.user_modules[0]}.py").is_file()
    assert services["orchestrator"]["entrypoint"] == ["python", "-m", "gen_worker.testing.mock_orchestrator"]
    assert _parser().parse_args(services["orchestrator"]["command"]).listen == "0.0.0.0:8080"


def test_prometheus_scrapes_the_worker_of_compose() -> None:
    prometheus = load(DEPLOY / "prometheus/prometheus.yml")
    assert prometheus["scrape_configs"][0]["static_configs"][0]["targets"] == ["worker:9090"]
    mounted = load(DEPLOY / "compose.yaml")["services"]["prometheus"]["volumes"]
    assert {Path(volume.split(":")[0]).name for volume in mounted} == {"prometheus.yml", *prometheus["rule_files"]}
    source = load(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]
    assert source["url"] == "http://prometheus:9090"


# -- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_hadolint(path: Path) -> None:
    program = shutil.which("hadolint") or Path(sys.executable).parent / "hadolint"
    if not Path(program).exists():
        pytest.skip("hadolint is not installed; the development packages have it")
    checked = subprocess.run([program, path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_what_is_copied_is_there_and_sent_to_the_daemon() -> None:
    sent = {line.lstrip("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [
        source
        for line in DOCKERFILES[0].read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    assert set(copied) == sent
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.parametrize("path", [*DOCKERFILES, ROOT / "gen_worker/cli/template/Dockerfile.tmpl"], ids=str)
def test_packages_go_where_the_worker_finds_them(path: Path) -> None:
    """Into the virtual environment, whose pip comes by --seed; the user's number is what runAsNonRoot can check."""
    text = path.read_text()
    assert re.findall(r"(?m)^USER (.*)$", text)[-1] == "10001"
    if path == DOCKERFILES[0]:
        assert "uv venv --seed" in text
    else:
        assert "FROM gen-worker" in text or "FROM ${BASE}" in text
        assert not re.findall(r"(?m)^[^#\n]*(?<!-m )\bpip install", text)


def test_the_image_and_the_project_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dockerfile = DOCKERFILES[0].read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S*)$", dockerfile, re.MULTILINE))
    assert arguments["TORCH"] in project["optional-dependencies"]["demo"]
    safetensors = next(each for each in project["optional-dependencies"]["torch"] if each.startswith("safetensors"))
    assert f'"{safetensors}"' in dockerfile
    assert f"Programming Language :: Python :: {arguments['PYTHON_VERSION']}" in project["classifiers"]
    (entrypoint,) = json.loads(re.findall(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)[0])
    assert entrypoint in project["scripts"]
    address = re.findall(r"WORKER_HTTP_ADDR=(\S+)", dockerfile)[0]
    assert address == f"0.0.0.0:{re.findall(r'^EXPOSE (.*)$', dockerfile, re.MULTILINE)[0]}"


async def test_the_health_check(monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = re.findall(r"HEALTHCHECK .*\\\n\s+CMD (\[.*\])", DOCKERFILES[0].read_text())
    python, *arguments = json.loads(text)
    assert (python, "9090" in arguments[-1]) == ("python", True)
    healthy = True

    def respond(method: str, path: str, _: str) -> Any:
        assert (method, path) == ("GET", "/livez")
        return plain(HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE, "")

    server = HttpServer("127.0.0.1:0", respond)
    url = await server.start()
    assert url is not None

    async def check() -> int:
        command = [argument.replace("9090", url.rpartition(":")[2]) for argument in arguments]
        process = await asyncio.create_subprocess_exec(sys.executable, *command, stderr=asyncio.subprocess.DEVNULL)
        return await process.wait()

    assert await check() == 0
    healthy = False
    assert await check() == 1
    await server.stop()
    assert await check() == 1


def test_no_file_names_a_registry() -> None:
    files = [*DOCKERFILES, *(path for path in DEPLOY.rglob("*") if path.is_file())]
    assert not [path for path in files if REGISTRIES.search(path.read_text())]


def test_the_example_makes_its_manifest_as_its_image_does() -> None:
    run = next(line for line in DOCKERFILES[1].read_text().splitlines() if line.startswith("RUN"))
    assert run.endswith("python -m gen_worker.discover > .cozy/manifest.json")
    made = subprocess.run(
        [sys.executable, "-m", "gen_worker.discover"], cwd=ROOT / "examples/hello", capture_output=True, check=True
    )
    assert [function["name"] for function in json.loads(made.stdout)["functions"]] == ["greet", "words"]
