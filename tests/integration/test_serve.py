"""`gen-worker serve` over HTTP: calls, streams, files, errors, cancels, reload, access, and a clean end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.dev_server import DevServer, copy_of, wait_for
from tests.support.worker_process import TENANTS, is_alive

TIMEOUT_S = 40.0


@pytest.fixture(scope="module")
def server() -> Iterator[DevServer]:
    with DevServer(TENANTS / "serve", "--executors", "2") as server:
        yield server.wait_ready()


@pytest.fixture
def client(server: DevServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
        yield client


def events_of(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    event = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            event = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield event, json.loads(line.removeprefix("data: "))


def runs_of(client: httpx.Client) -> list[Any]:
    found: list[Any] = client.get("/v1/state").json()["runs"]
    return found


def test_json_in_and_json_out(client: httpx.Client) -> None:
    response = client.post("/v1/functions/paint", json={"prompt": "a bay", "steps": 1, "size": {"width": 8}})
    assert response.status_code == 200
    answer = response.json()
    assert (answer["title"], answer["pixels"]) == ("a bay", 8 * 200)
    assert answer["image"].startswith("iVBOR")  # bytes are base64, here of a PNG
    record = client.get(f"/v1/runs/{response.headers['x-run-id']}").json()
    assert record["state"] == "succeeded"
    assert record["payload"]["prompt"] == "a bay"


def test_a_stream_is_a_list_or_events(client: httpx.Client) -> None:
    words = client.post("/v1/functions/tell", json={"words": 3}).json()
    assert [word["text"] for word in words] == ["Once ", "there ", "was "]
    headers = {"accept": "text/event-stream"}
    with client.stream("POST", "/v1/functions/tell", json={"words": 2}, headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(events_of(response))
    assert [kind for kind, _ in events] == [
        "run", "job.progress", "output.delta", "job.progress", "output.delta", "output.completed", "result",
    ]  # fmt: skip
    assert events[2][1] == {"text": "Once "}
    assert events[-1][1]["run_id"] == events[0][1]["run_id"]


@pytest.mark.parametrize(
    ("how", "status", "kind"),
    [("validation", 422, "validation"), ("retryable", 503, "retryable"), ("internal", 500, "internal"),
     ("memory", 507, "resource"), ("nonsense", 422, "validation")],
)  # fmt: skip
def test_errors_are_statuses(client: httpx.Client, how: str, status: int, kind: str) -> None:
    response = client.post("/v1/functions/fail", json={"how": how})
    assert (response.status_code, response.json()["error"]["type"]) == (status, kind)
    assert response.json()["error"]["retryable"] == (kind == "retryable")
    headers = {"accept": "text/event-stream"}
    with client.stream("POST", "/v1/functions/fail", json={"how": how}, headers=headers) as response:
        assert [(event, data["type"]) for event, data in events_of(response) if event == "error"] == [("error", kind)]


def test_bad_requests_say_what_is_wrong(client: httpx.Client) -> None:
    def post(path: str, **request: Any) -> tuple[int, str]:
        response = client.post(f"/v1/functions/{path}", **request)
        return response.status_code, response.json()["error"]["message"]

    as_json = {"content-type": "application/json"}
    assert post("tells", json={}) == (
        404, "there is no function 'tells'; there are: ask, fail, mirror, paint, tell, wait",
    )  # fmt: skip
    assert post("tell", content="{", headers=as_json)[0] == 400
    assert post("tell", json=[]) == (422, "the body must be a JSON object, the payload's fields")
    assert post("tell", content="words=3")[0] == 415
    assert post("tell", content="[" * 10_000, headers=as_json)[0] == 400
    code, message = post("tell", json={"words": 10**30})
    assert (code, message[:27]) == (422, "the payload can't be sent: ")
    assert post("tell?timeout_ms=soon", json={}) == (422, "timeout_ms=soon: expected milliseconds")
    assert post("mirror", json={"file": "x", "data": "*"}) == (
        422, "payload.data: not base64: Only base64 data is allowed",
    )  # fmt: skip
    code, message = post("paint", files={"prompt": (None, "x"), "size.widht": (None, "8")})
    assert (code, message) == (422, "size has no field 'widht'; did you mean 'width'?")


def test_a_deadline_is_a_504(client: httpx.Client) -> None:
    response = client.post("/v1/functions/wait?timeout_ms=200", json={})
    assert (response.status_code, response.json()["error"]["type"]) == (504, "timeout")


def test_files_come_as_parts_of_a_form_or_as_urls(client: httpx.Client) -> None:
    files = [("file", ("cat.txt", b"a cat", "text/plain")), ("data", ("d.bin", b"1234", "application/octet-stream"))]
    answer = client.post("/v1/functions/mirror", files=files, data={"note": "5"}).json()
    assert answer["note"] == "5"  # a text stays a text
    assert answer["data_size"] == 4
    stored = client.get(f"/v1/files/{answer['file']['ref']}")
    assert (stored.content, stored.headers["content-type"]) == (b"a cat", "text/plain; charset=utf-8")
    assert "sandbox" in stored.headers["content-security-policy"]
    assert client.get("/v1/files/no/such").status_code == 404
    odd = client.post(
        "/v1/functions/mirror", files=[("file", ("../" + "x" * 300 + " ö.png", b"1", "image/png"))]
    ).json()
    assert odd["file"]["ref"].endswith("x_ö.png")
    ref = answer["file"]["ref"]
    again = client.post("/v1/functions/mirror", json={"file": ref, "data": "QUI="}).json()
    assert (again["file"]["ref"], again["data_size"]) == (ref, 2)


def test_a_client_that_goes_away_cancels_its_run(client: httpx.Client, server: DevServer) -> None:
    headers = {"accept": "text/event-stream"}
    with client.stream("POST", "/v1/functions/wait", json={}, headers=headers) as response:
        kinds = events_of(response)
        run_id = next(kinds)[1]["run_id"]
        assert next(kinds)[0] == "job.progress"
    ended = wait_for(lambda: [run for run in runs_of(client) if run["run_id"] == run_id and run["state"] == "failed"])
    assert ended[0]["error"]["type"] == "canceled"
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/functions/wait", json={}, timeout=0.5)
    wait_for(lambda: not any(run["state"] == "running" for run in runs_of(client)))
    # Both executors are free again: neither still runs what nobody waits for.
    server.wait_for_log("serving ")
    assert client.post("/v1/functions/tell", json={"words": 0}).json() == []


def test_a_run_can_be_canceled_by_its_id(client: httpx.Client) -> None:
    headers = {"accept": "text/event-stream"}
    with client.stream("POST", "/v1/functions/wait", json={}, headers=headers) as response:
        events = events_of(response)
        run_id = next(events)[1]["run_id"]
        assert client.delete(f"/v1/runs/{run_id}").status_code == 202
        assert list(events)[-1][1]["type"] == "canceled"
    assert client.delete(f"/v1/runs/{run_id}").status_code == 404


def test_the_last_fifty_runs_are_kept(client: httpx.Client) -> None:
    ids = []
    for number in range(52):
        ids.append(client.post("/v1/functions/tell", json={"words": 0}).headers["x-run-id"])
        if number == 20:
            assert {run["run_id"] for run in runs_of(client)} >= set(ids)
    assert [run["run_id"] for run in runs_of(client)] == ids[:1:-1]


def test_the_state_is_watched_as_events(client: httpx.Client) -> None:
    with client.stream("GET", "/v1/state", headers={"accept": "text/event-stream"}) as response:
        states = (data for kind, data in events_of(response) if kind == "state")
        first = next(states)
        assert (first["title"], first["phase"]) == ("studio", "serving")
        assert len(first["executors"]) == 2
        assert first["resources"]["cpu_cores"] > 0
        with httpx.Client(base_url=client.base_url, timeout=TIMEOUT_S) as other:
            other.post("/v1/functions/tell", json={"words": 1})
        assert any(state["runs"][0]["function"] == "tell" for state in states)


def test_the_openapi_document_is_valid_and_complete(client: httpx.Client) -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    found = client.get("/openapi.json").json()
    validator.validate(found)
    assert sorted(found["paths"]) == [
        f"/v1/functions/{name}" for name in ("ask", "fail", "mirror", "paint", "tell", "wait")
    ]
    answers = found["paths"]["/v1/functions/tell"]["post"]["responses"]["200"]["content"]["application/json"]
    assert answers["schema"] == {"type": "array", "items": {"$ref": "#/components/schemas/tell.output.Word"}}
    assert found["components"]["schemas"]["paint.input.Paint"]["properties"]["steps"]["maximum"] == 50


def test_pages_of_other_origins_and_foreign_names_are_turned_away(client: httpx.Client) -> None:
    def status(**headers: str) -> int:
        return client.post("/v1/functions/tell", json={"words": 0}, headers=headers).status_code

    assert status() == 200
    assert status(origin=str(client.base_url).rstrip("/")) == 200
    assert status(origin="http://evil.example") == 403
    assert status(host="evil.example") == 403
    assert status(**{"sec-fetch-site": "cross-site"}) == 403


@pytest.mark.timeout(180)
def test_code_that_changes_replaces_the_executors_only(tmp_path: Path) -> None:
    project = copy_of("serve", tmp_path)
    with DevServer(project, "--executors", "2", "--verbose") as server:
        server.wait_ready()
        supervisor = psutil.Process(server.process.pid).children()[0]
        executors = {child.pid for child in supervisor.children() if "executor" in child.cmdline()}
        code = project / "studio.py"

        def call(words: int = 1) -> Any:
            return httpx.post(f"{server.url}/v1/functions/tell", json={"words": words}, timeout=TIMEOUT_S)

        assert call().json() == [{"text": "Once "}]
        code.write_text(code.read_text().replace("Once there", "Twice there"))
        server.wait_for_log("all executors are new")
        assert call().json() == [{"text": "Twice "}]
        assert supervisor.is_running()
        now = {child.pid for child in supervisor.children() if "executor" in child.cmdline()}
        assert len(now) == 2
        assert not now & executors
        # A worker that ended is said, and started again at the next change.
        supervisor.kill()
        server.wait_for_log("the worker is down: the worker ended with exit code -9")
        response = call()
        assert (response.status_code, response.json()["error"]["type"]) == (503, "unavailable")
        code.write_text(code.read_text().replace("Twice there", "Thrice there"))
        server.wait_for_log("^ready: ", 2)
        assert call().json() == [{"text": "Thrice "}]
        family = server.family()
        assert server.stop() == 0
        assert not [process for process in family if is_alive(process.pid)]


def test_a_token_is_asked_for(tmp_path: Path) -> None:
    with DevServer(TENANTS / "serve", "--token", "s3cret", "--no-reload") as server:
        with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
            assert client.get("/").status_code == 401
            assert client.get("/openapi.json", headers={"authorization": "Bearer wrong"}).status_code == 401
            assert client.get("/?token=wrong").status_code == 401
            assert client.get("/openapi.json", headers={"authorization": "Bearer s3cret"}).status_code == 200
            welcome = client.get("/?token=s3cret")
            assert (welcome.status_code, welcome.headers["location"]) == (303, "/")
            assert client.get("/").status_code == 200  # by the cookie
        family = server.family()
        server.process.kill()  # not told to stop: its worker must not outlive it
        wait_for(lambda: not [process for process in family if is_alive(process.pid)])
