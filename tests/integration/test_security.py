"""TLS, mTLS and tokens, end to end: the real supervisor, a scheduler with certificates, an issuer's JWKS over HTTP."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import grpc
import jwt
import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from gen_worker.testing.mock_orchestrator import MockOrchestrator
from tests.support.worker_process import WAIT_S, WorkerProcess, eventually

TENANT: Final[dict[str, Any]] = {"tenant": "isolation", "modules": "isolation_functions"}
TOKEN_REFUSED: Final = 77
ISSUER, AUDIENCE = "https://issuer.test", "gen-worker"


def worker(orchestrator: MockOrchestrator, env: Mapping[str, str]) -> WorkerProcess:
    return WorkerProcess(orchestrator.address, env=env, **TENANT)


# -- TLS ------------------------------------------------------------------------------------------


class Authority:
    """A CA made for the test, and what it has issued as files."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.ca = trustme.CA()
        self.ca_file = directory / "ca.pem"
        self.cert_file = directory / "client.pem"
        self.key_file = directory / "client.key"
        client = self.ca.issue_cert("worker@example.test")
        self.ca.cert_pem.write_to_path(str(self.ca_file))
        client.cert_chain_pems[0].write_to_path(str(self.cert_file))
        client.private_key_pem.write_to_path(str(self.key_file))

    def server(self, *, clients: trustme.CA | None = None, host: str = "127.0.0.1") -> grpc.ServerCredentials:
        """Credentials for this host; with `clients`, only theirs are let in."""
        own = self.ca.issue_cert(host)
        pair = (own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())
        if clients is None:
            return grpc.ssl_server_credentials([pair])
        return grpc.ssl_server_credentials([pair], clients.cert_pem.bytes(), require_client_auth=True)

    def env(self, *, client: Authority | None = None) -> dict[str, str]:
        files = {"USE_TLS": "true", "SCHEDULER_CA_FILE": str(self.ca_file)}
        if client is not None:
            files |= {
                "SCHEDULER_CLIENT_CERT_FILE": str(client.cert_file),
                "SCHEDULER_CLIENT_KEY_FILE": str(client.key_file),
            }
        return files


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "stranger")


async def test_tls_with_a_private_ca(authority: Authority) -> None:
    async with (
        MockOrchestrator(tls=authority.server(), required_token="the-token") as orchestrator,
        worker(orchestrator, authority.env() | {"AUTH_TOKEN": "the-token"}) as process,
    ):
        await orchestrator.wait_for_worker(timeout=WAIT_S)
        handle = await orchestrator.run("look_around", {})
        seen = await handle.output(WAIT_S)
        assert "SCHEDULER_CLIENT_KEY_FILE" not in seen["environment"]
        process.signal(signal.SIGTERM)
        assert await process.exit_code() == 0


async def test_mtls(authority: Authority) -> None:
    async with (
        MockOrchestrator(tls=authority.server(clients=authority.ca)) as orchestrator,
        worker(orchestrator, authority.env(client=authority)) as process,
    ):
        await orchestrator.wait_for_worker(timeout=WAIT_S)
        seen = await (await orchestrator.run("look_around", {})).output(WAIT_S)
        shown = repr((seen["environment"], seen["supervisor"]["environ"]))
        assert str(authority.key_file) not in shown
        assert str(authority.cert_file) in shown  # which is no secret
        assert "PRIVATE KEY" not in "\n".join(process.log)


HINTS: Final = {
    "wrong_ca": "the scheduler's certificate is not from a CA in SCHEDULER_CA_FILE",
    "wrong_host": "the scheduler's certificate is not for the host in SCHEDULER_ADDR",
    "no_client_certificate": "the scheduler may want TLS (USE_TLS) or another client certificate",
    "clients_of_another_ca": "the scheduler may want TLS (USE_TLS) or another client certificate",
    "no_tls": "the scheduler may want TLS (USE_TLS)",
    "tls_to_a_plain_port": "the scheduler does not speak TLS, and USE_TLS is true",
}


@pytest.mark.parametrize("case", HINTS)
async def test_a_handshake_that_fails_is_one_line_per_dial(
    authority: Authority, stranger: Authority, case: str
) -> None:
    tls: dict[str, grpc.ServerCredentials] = {
        "wrong_host": authority.server(host="scheduler.test"),
        "no_client_certificate": authority.server(clients=authority.ca),
        "clients_of_another_ca": authority.server(clients=authority.ca),
    }
    env = {
        "wrong_ca": stranger.env(),
        "clients_of_another_ca": authority.env(client=stranger),
        "no_tls": {},
    }.get(case, authority.env())
    server = None if case == "tls_to_a_plain_port" else tls.get(case, authority.server())
    async with (
        MockOrchestrator(tls=server) as orchestrator,
        worker(orchestrator, env | {"MAX_RECONNECT_ATTEMPTS": "2"}) as process,
    ):
        assert await process.exit_code() == 69
        failed = [line for line in process.log if "no stream to" in line]
        assert len(failed) == 2
        for line in failed:
            assert f"no stream to {orchestrator.address}: UNAVAILABLE" in line
            assert HINTS[case] in line
        assert not any("Traceback" in line for line in process.log)
        assert orchestrator.workers == {}


# -- tokens ---------------------------------------------------------------------------------------


class Issuer:
    """An HTTP server with a JWKS at `url`; its keys and whether it answers may be changed at any time."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {}
        self.up = True
        self.fetches = 0
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.fetches += 1
                body = json.dumps({"keys": [issuer.jwk(kid) for kid in issuer.keys]}).encode()
                self.send_response(200 if issuer.up else 503)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/jwks.json"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def jwk(self, kid: str) -> dict[str, Any]:
        public = self.keys[kid].public_key()
        by_type: Sequence[tuple[type, Any]] = (
            (rsa.RSAPublicKey, RSAAlgorithm),
            (ec.EllipticCurvePublicKey, ECAlgorithm),
            (ed25519.Ed25519PublicKey, OKPAlgorithm),
        )
        algorithm = next(algorithm for kind, algorithm in by_type if isinstance(public, kind))
        return {**algorithm.to_jwk(public, as_dict=True), "kid": kid, "use": "sig"}

    def token(self, kid: str, algorithm: str, *, life_s: float = 3600, **claims: Any) -> str:
        now = time.time()
        body = {"iss": ISSUER, "aud": AUDIENCE, "sub": "worker", "iat": now, "exp": now + life_s, **claims}
        return jwt.encode(body, self.keys[kid], algorithm, headers={"kid": kid})

    def env(self, token: str = "", **more: str) -> dict[str, str]:
        return {
            "AUTH_TOKEN": token,
            "SCHEDULER_JWKS_URL": self.url,
            "SCHEDULER_JWT_ISSUER": ISSUER,
            "SCHEDULER_JWT_AUDIENCE": AUDIENCE,
            **more,
        }


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture
def issuer(rsa_key: rsa.RSAPrivateKey) -> Iterator[Issuer]:
    issuer = Issuer()
    issuer.keys = {
        "RS256": rsa_key,
        "ES256": ec.generate_private_key(ec.SECP256R1()),
        "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    }
    yield issuer
    issuer.close()


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
async def test_a_good_token_is_shown_to_the_scheduler(issuer: Issuer, algorithm: str) -> None:
    token = issuer.token(algorithm, algorithm)
    async with (
        MockOrchestrator(required_token=token) as orchestrator,
        worker(orchestrator, issuer.env(token)) as process,
    ):
        await orchestrator.wait_for_worker(timeout=WAIT_S)
        assert issuer.fetches == 1
        assert token not in "\n".join(process.log)


def unsigned(issuer: Issuer) -> str:
    return jwt.encode({"iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 60}, "", "none", headers={"kid": "RS256"})


def signed_with_the_public_key(issuer: Issuer) -> str:
    """What an attacker can make who has nothing but the published key; PyJWT itself refuses to make one."""
    public = issuer.keys["RS256"].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    claims = {"iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 60}
    parts = [encoded(json.dumps(part).encode()) for part in ({"alg": "HS256", "kid": "RS256", "typ": "JWT"}, claims)]
    signature = hmac.new(public, ".".join(parts).encode(), hashlib.sha256).digest()
    return ".".join([*parts, encoded(signature)])


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed_by_a_stranger(issuer: Issuer) -> str:
    stranger = Issuer.__new__(Issuer)
    stranger.keys = {"EdDSA": ed25519.Ed25519PrivateKey.generate()}
    return stranger.token("EdDSA", "EdDSA")


REFUSED: Final = {
    "alg none": (unsigned, "its algorithm 'none' is not one of"),
    "HS256 with the public key": (signed_with_the_public_key, "its algorithm 'HS256' is not one of"),
    "wrong issuer": (lambda i: i.token("ES256", "ES256", iss="https://other.test"), "its issuer is not"),
    "wrong audience": (lambda i: i.token("ES256", "ES256", aud="someone-else"), "its audience is not"),
    "wrong signature": (signed_by_a_stranger, "its signature is wrong"),
    "expired": (lambda i: i.token("ES256", "ES256", life_s=-3600), "it has expired"),
    "not a JWT": (lambda _: "opaque-token", "it is not a JWT"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_bad_token_ends_the_worker_with_one_line(issuer: Issuer, case: str) -> None:
    make, words = REFUSED[case]
    token = make(issuer)
    async with MockOrchestrator() as orchestrator, worker(orchestrator, issuer.env(token)) as process:
        assert await process.exit_code() == TOKEN_REFUSED
        assert orchestrator.stream_count == 0
        critical = [line for line in process.log if "CRITICAL" in line]
        assert len(critical) == 1
        assert "the token from AUTH_TOKEN can't be used: " in critical[0]
        assert words in critical[0]
        assert not any("Traceback" in line or token in line for line in process.log)


async def test_a_rotated_key_is_fetched_and_the_token_file_is_read_at_each_connect(
    issuer: Issuer, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    first = issuer.token("RS256", "RS256")
    file.write_text(f"{first}\n")
    env = issuer.env(AUTH_TOKEN_FILE=str(file), SCHEDULER_JWKS_TTL_SECONDS="3600")
    async with MockOrchestrator() as orchestrator, worker(orchestrator, env) as process:
        connection = await orchestrator.wait_for_worker(timeout=WAIT_S)
        assert connection.authorization == f"Bearer {first}"
        issuer.keys = {"next": ec.generate_private_key(ec.SECP256R1())}
        second = issuer.token("next", "ES256")
        file.write_text(second)
        connection.close()
        await eventually(lambda: orchestrator.stream_count > 1, what="the worker dials again")
        connection = await orchestrator.wait_for_worker(timeout=WAIT_S)
        assert connection.authorization == f"Bearer {second}"
        assert issuer.fetches == 2
        # A file without a good token is waited for: it is being rotated.
        file.write_text("")
        connection.close()
        await process.wait_for_log("is not dialed", f"AUTH_TOKEN_FILE {file} is empty")
        file.write_text(signed_by_a_stranger(issuer))
        await process.wait_for_log("is not dialed", "none of the keys at")
        third = issuer.token("next", "ES256", sub="third")
        file.write_text(third)
        await eventually(
            lambda: any(each.authorization == f"Bearer {third}" for each in orchestrator.connections), what="the third"
        )
        assert not [line for line in process.log if first in line or second in line or third in line]


async def test_an_unreachable_jwks_is_retried_and_said(issuer: Issuer) -> None:
    issuer.up = False
    env = issuer.env(issuer.token("ES256", "ES256"))
    async with MockOrchestrator() as orchestrator, worker(orchestrator, env) as process:
        line = await process.wait_for_log("is not dialed: no keys at", issuer.url)
        assert "503" in line
        assert "is not verified, so nothing is dialed" in line
        assert orchestrator.stream_count == 0
        issuer.up = True
        await orchestrator.wait_for_worker(timeout=WAIT_S)


async def test_expiry_is_announced_ahead(issuer: Issuer) -> None:
    """Five minutes ahead: here one second after the token was made, or at the dial when that comes later."""
    token = issuer.token("ES256", "ES256", life_s=301, iat=time.time() - 3600)
    async with MockOrchestrator() as orchestrator, worker(orchestrator, issuer.env(token)) as process:
        line = await process.wait_for_log("WARNING", "the token from AUTH_TOKEN expires at")
        assert "replace it and restart the worker before then" in line
        await orchestrator.wait_for_worker(timeout=WAIT_S)


async def test_a_scheduler_that_refuses_the_token_is_dialed_on() -> None:
    """The scheduler may learn of the token, or its issuer's keys, later: only the operator is told."""
    async with (
        MockOrchestrator(required_token="another") as orchestrator,
        worker(orchestrator, {"WORKER_JWT": "not-that-one"}) as process,
    ):
        line = await process.wait_for_log("ERROR", "refused the token", "check that AUTH_TOKEN")
        assert "not-that-one" not in line
        orchestrator.required_token = "not-that-one"
        await orchestrator.wait_for_worker(timeout=WAIT_S)
