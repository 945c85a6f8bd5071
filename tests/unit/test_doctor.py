"""What doctor finds: real sockets, TLS, tokens and disks; cards and torch as they would describe themselves."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import resource
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jwt
import pytest
import trustme
from typer.testing import CliRunner

from gen_worker.cli import app
from supervisor.config import load_settings
from supervisor.devices import Device, DeviceError, DeviceMemory, DeviceProbe
from supervisor.doctor import gpus, host, network, packages
from supervisor.doctor.checks import examine
from supervisor.doctor.credentials import check_token
from supervisor.doctor.findings import Finding, Host
from supervisor.doctor.network import check_port, check_scheduler
from supervisor.endpoints import plain
from supervisor.http_server import HttpServer

SECRET = "the-key-of-the-doctor-test-32-bytes"
SETTINGS_FRAME = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


def host_of(**env: str) -> Host:
    return Host(load_settings(env), env)


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def token(**claims: object) -> str:
    return jwt.encode(claims, SECRET, "HS256")


# -- token --------------------------------------------------------------------------------------


def test_no_token() -> None:
    (finding,) = check_token(host_of())
    assert (finding.level, "must take anybody" in finding.what) == ("note", True)


def test_a_token_and_its_claims() -> None:
    good = token(iss="issuer", aud="workers", exp=time.time() + 7200, secret="not shown")
    findings = check_token(host_of(AUTH_TOKEN=good, USE_TLS="true"))
    assert levels(findings) == ["ok", "ok"]
    assert "in 2.0 h" in findings[0].what
    assert "iss 'issuer', aud 'workers'" in findings[1].what
    assert "not verified" in findings[1].what
    assert not [finding for finding in findings if good in finding.what or "not shown" in finding.what]


@pytest.mark.parametrize(
    ("exp", "level", "words"),
    [
        (-10.0, "broken", "it expired at"),
        (600.0, "warning", "in 0.2 h"),
        (None, "note", "it does not expire"),
        ("soon", "note", "it does not expire"),
        (1e300, "warning", "which is no date"),
    ],
)
def test_how_long_a_token_lasts(exp: object, level: str, words: str) -> None:
    when = time.time() + exp if isinstance(exp, float) and exp < 1e9 else exp
    body = token(**({} if exp is None else {"exp": when}), sub="me")
    finding = check_token(host_of(WORKER_JWT=body, USE_TLS="true"))[0]
    assert finding.level == level
    assert words in finding.what


def test_a_token_in_clear_is_warned_of_and_one_from_a_file_is_replaced_there(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(token(exp=time.time() + 600))
    findings = check_token(host_of(AUTH_TOKEN_FILE=str(path)))
    assert levels(findings) == ["ok", "ok", "warning"]  # a file is read again: its token may be short-lived
    assert "travels in clear" in findings[2].what
    path.write_text("")
    (finding,) = check_token(host_of(AUTH_TOKEN_FILE=str(path)))
    assert (finding.level, "is empty" in finding.what) == ("broken", True)


def test_an_opaque_token_and_keys_that_are_not_there() -> None:
    assert "opaque" in check_token(host_of(AUTH_TOKEN="opaque", USE_TLS="1"))[0].what
    findings = check_token(host_of(AUTH_TOKEN=token(exp=1), SCHEDULER_JWKS_URL="http://127.0.0.1:1/jwks"))
    assert levels(findings) == ["broken"]  # HS256 is refused before any key is asked for
    assert "HS256" in findings[0].what


# -- network ------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(speak: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that takes one connection and does this with it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.settimeout(10)
                speak(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"localhost:{server.getsockname()[1]}"
        thread.join(10)


def http2(connection: socket.socket) -> None:
    if connection.recv(100).startswith(b"PRI * HTTP/2.0"):
        connection.sendall(SETTINGS_FRAME)
        connection.recv(100)


def http1(connection: socket.socket) -> None:
    connection.recv(100)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.parametrize(
    ("speak", "level", "words"),
    [
        (http2, "ok", "answers HTTP/2 in clear"),
        (http1, "broken", "speaks no HTTP/2"),
        (lambda connection: connection.recv(100), "broken", "speaks no HTTP/2"),
    ],
)
def test_a_scheduler_in_clear(speak: Callable[[socket.socket], None], level: str, words: str) -> None:
    with listening(speak) as address:
        (finding,) = check_scheduler(host_of(SCHEDULER_ADDR=address))
    assert (finding.level, finding.check) == (level, f"scheduler {address}")
    assert words in finding.what


def test_a_scheduler_that_is_not_there_beside_one_that_is() -> None:
    (finding,) = check_scheduler(host_of(SCHEDULER_ADDR="127.0.0.1:1"))
    assert (finding.level, "Connection refused" in finding.what) == ("broken", True)
    with listening(http2) as address:
        findings = check_scheduler(host_of(SCHEDULER_ADDR="127.0.0.1:1", SCHEDULER_ADDRS=address))
    assert levels(findings) == ["warning", "ok"]


@pytest.mark.parametrize(
    ("alpn", "trusted", "level", "words"),
    [
        (["h2"], True, "ok", "answers HTTP/2 TLSv1.3"),
        (["http/1.1"], True, "broken", "no HTTP/2 in ALPN"),
        (["h2"], False, "broken", "its certificate does not hold"),
    ],
)
def test_a_scheduler_with_tls(tmp_path: Path, alpn: list[str], trusted: bool, level: str, words: str) -> None:
    ca = trustme.CA()
    ca_file = tmp_path / "ca.pem"
    (ca if trusted else trustme.CA()).cert_pem.write_to_path(ca_file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    context.set_alpn_protocols(alpn)

    def speak(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            http2(secure)

    with listening(speak) as address:
        env = {"SCHEDULER_ADDR": address, "USE_TLS": "true", "SCHEDULER_CA_FILE": str(ca_file)}
        (finding,) = check_scheduler(host_of(**env))
    assert finding.level == level
    assert words in finding.what


def test_tls_is_dialed_and_there_is_none(tmp_path: Path) -> None:
    with listening(http1) as address:
        (finding,) = check_scheduler(host_of(SCHEDULER_ADDR=address, USE_TLS="true"))
    assert (finding.level, "no TLS" in finding.what) == ("broken", True)
    nonsense = tmp_path / "ca.pem"
    nonsense.write_text("no certificate")
    with listening(lambda connection: None) as address:
        env = {"SCHEDULER_ADDR": address, "USE_TLS": "true", "SCHEDULER_CA_FILE": str(nonsense)}
        (finding,) = check_scheduler(host_of(**env))
    assert "the certificates can't be used" in finding.what


def test_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "TIMEOUT_S", 0.1)  # what has the port says nothing
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        (finding,) = check_port(host_of(WORKER_HTTP_ADDR=address))
        assert (finding.level, finding.what) == ("warning", f"{address} can't be listened on: Address already in use")
    assert levels(check_port(host_of(WORKER_HTTP_ADDR=address))) == ["ok"]
    assert levels(check_port(host_of(WORKER_HTTP_ADDR=""))) == ["note"]
    assert levels(check_port(host_of(WORKER_HTTP_ADDR="no-such-host.invalid:80"))) == ["warning"]


async def test_the_port_of_a_worker_that_runs() -> None:
    server = HttpServer("127.0.0.1:0", lambda *_: plain(HTTPStatus.OK, "ok\n"))
    url = await server.start()
    assert url is not None
    host = host_of(WORKER_HTTP_ADDR=url.removeprefix("http://"))
    (finding,) = await asyncio.to_thread(check_port, host)
    assert (finding.level, "a worker answers" in finding.what) == ("ok", True)
    await server.stop()


# -- GPUs and torch -----------------------------------------------------------------------------


class Cards:
    """A probe of real cards, as NVML's describes them."""

    driver_version = "570.86.15"

    def __init__(self, sm: str = "90", free: float = 0.9) -> None:
        self.devices = [Device("GPU-1", "NVIDIA H100", 80 * 2**30, sm, "cuda:0", "GPU-1")]
        self.free = free
        self.lost = False

    def memory(self, device: Device) -> DeviceMemory:
        if self.lost:
            raise DeviceError("NVML can't read the memory of GPU-1: GPU is lost")
        return DeviceMemory(0, int(self.free * device.memory_bytes))


def torch(**said: Any) -> gpus.Torch:
    return gpus.Torch(**{"version": "2.13.0", "cuda": "12.8", "available": True, "count": 1, **said})


@pytest.mark.parametrize(
    ("said", "driver", "level", "words"),
    [
        (torch(), "570.86", "ok", "sees 1 GPUs"),
        (torch(archs=["sm_80", "sm_90"]), "570.86", "ok", ""),
        (torch(archs=["sm_90a"]), "570.86", "ok", ""),
        (torch(archs=["sm_80", "compute_80"]), "570.86", "ok", ""),
        (torch(archs=["sm_80", "sm_100"]), "570.86", "broken", "not built for sm_90"),
        (torch(cuda=None), "570.86", "broken", "CPU build"),
        (torch(cuda="13.0", available=False, problem="too old"), "570.86", "broken", "older than 580"),
        (torch(cuda="12.8"), "515.1", "broken", "older than 525"),
        (torch(available=False, problem="CUDA unknown error"), "570.86", "broken", "CUDA unknown error"),
        (gpus.Torch(missing="No module named 'torch'"), "570.86", "warning", "No module"),
        (gpus.Torch(problem="its import ended with -11: x"), "570.86", "broken", "ended with -11"),
    ],
)
def test_torch_against_the_driver(said: gpus.Torch, driver: str, level: str, words: str) -> None:
    cards = Cards()
    cards.driver_version = driver
    (finding,) = gpus.check_torch(host_of(), cast("DeviceProbe", cards), said)
    assert finding.level == level
    assert words in finding.what
    assert bool(finding.todo) is (level != "ok")


def test_torch_is_asked_in_a_process_without_the_secrets(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "import os\n__version__ = '9.9'\nclass version: cuda = None\nassert 'AUTH_TOKEN' not in os.environ\n"
    )
    env = {"AUTH_TOKEN": "secret-secret", "PYTHONPATH": str(tmp_path), "WORKER_FAKE_GPU_COUNT": "1"}
    findings = gpus.check_gpus(host_of(**env))
    assert (findings[-1].level, findings[-1].what) == ("ok", "9.9, a CPU build")
    assert "simulated" in findings[0].what
    (tmp_path / "torch.py").write_text("import os, sys\nprint('no room', file=sys.stderr, flush=True)\nos._exit(3)\n")
    assert gpus.ask_torch(env).problem == "its import ended with 3: no room"
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: not found')\n")
    assert gpus.ask_torch(env).missing == "libcudart.so.12: not found"


def test_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = Cards(free=0.1)
    monkeypatch.setattr(gpus, "open_probe", lambda **_: cards)
    monkeypatch.setattr(gpus, "ask_torch", lambda _: torch())
    found = {finding.check: finding for finding in gpus.check_gpus(host_of(CUDA_VISIBLE_DEVICES="0"))}
    assert found["driver"].what == "NVIDIA 570.86.15, NVML answers"
    assert "(CUDA_VISIBLE_DEVICES=0): NVIDIA H100 GPU-1" in found["CUDA"].what
    assert (found["memory of GPU-1"].level, found["memory of GPU-1"].what) == ("warning", "8.0 of 80.0 GiB free")
    cards.lost = True
    assert gpus.check_gpus(host_of())[2].level == "broken"

    def refuse(**_: object) -> DeviceProbe:
        raise DeviceError("GPU '7' names 0 of the GPUs here: none")

    monkeypatch.setattr(gpus, "open_probe", refuse)
    assert levels(gpus.check_gpus(host_of())) == ["broken"]


def test_a_driver_without_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version").write_text("NVRM")
    monkeypatch.setattr(gpus, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(gpus, "ask_torch", lambda _: torch(cuda=None))
    findings = gpus.check_gpus(host_of(CUDA_VISIBLE_DEVICES="-1"))
    assert [finding.check for finding in findings if finding.level == "broken"] == ["driver", "CUDA"]


# -- this host ----------------------------------------------------------------------------------


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"WORKER_MODEL_CACHE_DIR": str(tmp_path / "a" / "b"), "WORKER_RUN_DIR": str(tmp_path)}
    monkeypatch.setattr(host, "SPEED_BYTES", 2**20)
    monkeypatch.setattr(host, "SLOW", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=2**40, free=2**39))
    assert levels(host.check_disks(host_of(**env))) == ["ok", "ok", "ok"]
    assert not list(tmp_path.iterdir())  # nothing is made, nothing stays
    monkeypatch.setattr(host, "SLOW", 2**60)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=2**40, free=2**30))
    findings = host.check_disks(host_of(**env))
    assert levels(findings) == ["broken", "warning", "broken"]
    assert "over 95% full" in findings[0].what


def test_a_directory_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    env = {"WORKER_MODEL_CACHE_DIR": str(tmp_path), "WORKER_OUTBOX_DIR": str(tmp_path / "out")}
    findings = {finding.check: finding for finding in host.check_disks(host_of(**env))}
    assert findings["model cache"].level == findings["WORKER_OUTBOX_DIR"].level == "broken"
    assert f"uid {os.getuid()}" in findings["WORKER_OUTBOX_DIR"].what


def test_memory_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "memory_limit", lambda: 2**30)
    assert levels(host.check_memory(host_of())) == ["warning"]
    limits = {resource.RLIMIT_NOFILE: 1024, resource.RLIMIT_NPROC: -1, resource.RLIMIT_CORE: -1}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], -1))
    findings = host.check_limits(host_of())
    assert levels(findings) == ["warning", "ok", "note"]
    assert "ulimit -n 4096" in findings[0].todo


# -- packages -----------------------------------------------------------------------------------


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(packages.check_packages(host_of())) == ["ok", "ok"]
    owners = {"supervisor": ["supervisor", "gen_worker"], "executor": ["gen-worker"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    finding = packages.check_packages(host_of())[1]
    assert (finding.level, finding.todo) == ("warning", "pip uninstall supervisor")
    monkeypatch.setattr(packages, "find_clash", lambda: "the package 'executor' is found at /x: pip uninstall executor")
    finding = packages.check_packages(host_of())[1]
    assert (finding.level, finding.todo) == ("broken", "pip uninstall executor")
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["no-such-dist>=1", "not-this; extra == 'torch'"])
    assert "not installed: no-such-dist" in packages.check_packages(host_of())[2].what


# -- the command --------------------------------------------------------------------------------


def test_settings_that_do_not_parse() -> None:
    (finding,) = examine({"RECONNECT_DELAY": "often"})
    assert (finding.level, finding.check) == ("broken", "settings")
    assert "RECONNECT_DELAY is 'often'" in finding.what


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpus, "ask_torch", lambda _: torch(cuda=None))
    env = {
        "SCHEDULER_ADDR": "127.0.0.1:1", "WORKER_HTTP_ADDR": "127.0.0.1:0", "WORKER_MODEL_CACHE_DIR": str(tmp_path),
        "AUTH_TOKEN": "opaque-s3cret", "WORKER_TYPO_GPUS": "", "WORKER_GPU": "0", "WORKER_FAKE_GPU_COUNT": "1",
    }  # fmt: skip
    shown = CliRunner().invoke(app, ["doctor"], env=env)
    assert shown.exit_code == 1
    assert "BROKEN  scheduler 127.0.0.1:1: can't be reached" in shown.output
    assert "did you mean WORKER_GPUS?" in shown.output
    as_json = CliRunner().invoke(app, ["doctor", "--json"], env=env)
    assert {finding["level"] for finding in json.loads(as_json.output)} >= {"ok", "warning", "broken"}
    assert "opaque-s3cret" not in shown.output + as_json.output
    with listening(http2) as address:
        healthy = CliRunner().invoke(app, ["doctor"], env={**env, "SCHEDULER_ADDR": address})
    assert healthy.exit_code == 0, healthy.output
