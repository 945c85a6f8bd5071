"""Auth: where the token comes from, and its verification against a real JWKS server."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import psutil
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from supervisor.auth import (
    MAX_TOKEN_BYTES,
    Auth,
    AuthError,
    AuthSettings,
    KeysUnreachable,
    TokenFileUnreadable,
    TokenRefused,
    unverified_claims,
)

KEYS: dict[str, Any] = {
    "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
KEYS |= {"RS512": KEYS["RS256"], "PS256": KEYS["RS256"]}
OTHER_RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
NOW = 1_800_000_000.0


def public_jwk(algorithm: str, key: Any, **fields: str) -> dict[str, Any]:
    entry: dict[str, Any] = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key(), as_dict=True)
    entry.pop("key_ops", None)
    return entry | fields


def token(algorithm: str = "RS256", *, key: Any = None, kid: str | None = "k1", **claims: Any) -> str:
    body = {"sub": "worker", "iat": NOW - 60, "exp": NOW + 3600} | claims
    headers = {} if kid is None else {"kid": kid}
    return jwt.encode(body, KEYS[algorithm] if key is None else key, algorithm=algorithm, headers=headers)


class JwksServer:
    """A JWKS over HTTP. `document` is what it serves; None: status 503."""

    def __init__(self) -> None:
        self.document: Any = {"keys": [public_jwk("RS256", KEYS["RS256"], kid="k1")]}
        self.fetches = 0
        self.go_on = threading.Event()
        self.go_on.set()
        self.authorizations: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.fetches += 1
                outer.go_on.wait(5)
                outer.authorizations.append(self.headers["Authorization"])
                body = outer.document if isinstance(outer.document, bytes) else json.dumps(outer.document).encode()
                self.send_response(503 if outer.document is None else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://user:hunter2@127.0.0.1:{self._server.server_port}/jwks?secret=hunter3"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def jwks() -> Iterator[JwksServer]:
    server = JwksServer()
    yield server
    server.stop()


def verifying(jwks: JwksServer, written: str, **fields: Any) -> Auth:
    return Auth(AuthSettings(auth_token=written, jwks_url=jwks.url, **fields), now=lambda: NOW)


async def bearer(auth: Auth) -> str:
    try:
        ((name, value),) = await auth.metadata()
    finally:
        auth.close()
    assert name == "authorization"
    assert value.startswith("Bearer ")
    return value.removeprefix("Bearer ")


# -- where the token comes from -------------------------------------------------------------------


async def test_without_a_token_there_is_no_metadata() -> None:
    assert await Auth(AuthSettings()).metadata() == []


async def test_auth_token_wins_over_worker_jwt_and_a_file_over_both(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from-file\n")
    assert await bearer(Auth(AuthSettings(worker_jwt="b"))) == "b"
    assert await bearer(Auth(AuthSettings(auth_token="a", worker_jwt="b"))) == "a"
    assert await bearer(Auth(AuthSettings(auth_token="a", worker_jwt="b", token_file=file))) == "from-file"


async def test_the_file_is_read_again_for_each_dial(tmp_path: Path) -> None:
    file = tmp_path / "token"
    auth = Auth(AuthSettings(token_file=file))
    for written in ("one", "  two \n"):
        file.write_text(written)
        assert await bearer(auth) == written.strip()


def missing(_: Path) -> None:
    pass


def empty(file: Path) -> None:
    file.write_text(" \n")


def directory(file: Path) -> None:
    file.mkdir()


def huge(file: Path) -> None:
    file.write_text("x" * (MAX_TOKEN_BYTES + 1))


@pytest.mark.parametrize(
    ("make", "says"),
    [(missing, "No such file"), (empty, "is empty"), (directory, "Is a directory"), (huge, "expected one token")],
)
async def test_a_file_without_a_token_is_named_and_may_get_better(tmp_path: Path, make: Any, says: str) -> None:
    file = tmp_path / "token"
    make(file)
    with pytest.raises(TokenFileUnreadable, match=says) as caught:
        await Auth(AuthSettings(token_file=file)).metadata()
    assert not caught.value.final
    assert f"AUTH_TOKEN_FILE {file}" in str(caught.value)


@pytest.mark.parametrize("written", ["two words", "line\nbreak", "caf\u00e9", "nul\x00byte"])
async def test_what_does_not_fit_into_a_header_is_refused(tmp_path: Path, written: str) -> None:
    file = tmp_path / "token"
    file.write_text(written)
    for settings, final in ((AuthSettings(auth_token=written), True), (AuthSettings(token_file=file), False)):
        with pytest.raises(TokenRefused, match="can't stand in a header") as caught:
            await Auth(settings).metadata()
        assert caught.value.final is final
        assert written not in str(caught.value)


async def test_the_log_is_told_what_to_conceal() -> None:
    concealed: list[str] = []
    await bearer(Auth(AuthSettings(auth_token="opaque-token"), conceal=concealed.extend))
    assert concealed == ["opaque-token"]


def test_settings_do_not_show_tokens() -> None:
    assert "hunter2" not in repr(AuthSettings(auth_token="hunter2", worker_jwt="hunter2"))


async def test_jwt_and_cryptography_are_not_loaded_by_a_verification(jwks: JwksServer) -> None:
    code = (
        "import asyncio, sys\n"
        "from supervisor.auth import Auth, AuthSettings\n"
        f"auth = Auth(AuthSettings(auth_token={token()!r}, jwks_url={jwks.url!r}), now=lambda: {NOW})\n"
        "assert asyncio.run(auth.metadata())\n"
        "print([name for name in ('jwt', 'cryptography') if name in sys.modules])"
    )
    done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# -- verification ---------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", sorted(KEYS))
@pytest.mark.parametrize("kid", ["k1", None])
async def test_asymmetric_algorithms_are_verified(jwks: JwksServer, algorithm: str, kid: str | None) -> None:
    others = [public_jwk("RS256", OTHER_RSA, kid="k0"), public_jwk("ES256", KEYS["ES256"], kid="k9", use="enc")]
    jwks.document = {"keys": [*others, public_jwk(algorithm, KEYS[algorithm], kid="k1")]}
    signed = token(algorithm, kid=kid)
    assert await bearer(verifying(jwks, signed)) == signed


def forged_none() -> str:
    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part({'alg': 'none', 'kid': 'k1'})}.{part({'sub': 'worker'})}."


def forged_hs256() -> str:
    """Signed with the public key as the secret, as in the well-known attack."""
    public = KEYS["RS256"].public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    secret = base64.urlsafe_b64encode(pem).rstrip(b"=").decode()
    key = jwt.PyJWK({"kty": "oct", "k": secret}, "HS256").key
    head, body, _ = jwt.encode({"sub": "worker"}, "x" * 32, algorithm="HS256", headers={"kid": "k1"}).split(".")
    signature = jwt.get_algorithm_by_name("HS256").sign(f"{head}.{body}".encode(), key)
    return f"{head}.{body}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def tampered() -> str:
    head, _, signature = token().split(".")
    return ".".join([head, token(sub="admin").split(".")[1], signature])


BAD = {
    "another key under a known kid": (lambda: token(key=OTHER_RSA), "signature is wrong"),
    "another key without a kid": (lambda: token(key=OTHER_RSA, kid=None), "signature is wrong"),
    "tampered": (tampered, "signature is wrong"),
    "unknown kid": (lambda: token(kid="k2"), "none of the keys at .* has its kid"),
    "key of another type": (lambda: token("ES256"), "fits ES256"),
    "expired": (lambda: token(exp=NOW - 31), "it has expired"),
    "not yet valid": (lambda: token(nbf=NOW + 31), "not valid yet"),
    "issued in the future": (lambda: token(iat=NOW + 31), "not valid yet"),
    "wrong issuer": (lambda: token(iss="https://other"), "issuer is not SCHEDULER_JWT_ISSUER"),
    "no issuer": (lambda: token(aud="gen-workers"), "it has no iss claim"),
    "wrong audience": (lambda: token(iss="https://issuer", aud="others"), "audience is not SCHEDULER_JWT_AUDIENCE"),
    "no audience": (lambda: token(iss="https://issuer"), "it has no aud claim"),
    "none": (forged_none, "its algorithm 'none' is not one of"),
    "HS256": (forged_hs256, "its algorithm 'HS256' is not one of"),
    "no JWT": (lambda: "opaque", "it is not a JWT"),
    "expiry is text": (lambda: token(iss="https://issuer", aud="gen-workers", exp="never"), "malformed"),
}


@pytest.mark.parametrize("case", sorted(BAD))
async def test_a_bad_token_is_refused_for_good_unless_it_comes_from_a_file(
    jwks: JwksServer, case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    make, says = BAD[case]
    claims_asked = "issuer" in case or "audience" in case or "text" in case
    asked: dict[str, Any] = {"issuer": "https://issuer", "audience": "gen-workers"} if claims_asked else {}
    written = make()
    file = tmp_path / "token"
    file.write_text(written)
    in_file = Auth(AuthSettings(token_file=file, jwks_url=jwks.url, **asked), now=lambda: NOW)
    for auth, final in ((verifying(jwks, written, **asked), True), (in_file, False)):
        with pytest.raises(TokenRefused, match=says) as caught:
            await auth.metadata()
        assert caught.value.final is final
        assert caught.value.__cause__ is None
        shown = f"{caught.value} {caplog.text}"
        assert len(str(caught.value).splitlines()) == 1
        for secret in (written, written.rpartition(".")[2] or written, "hunter"):
            assert secret not in shown


async def test_issuer_audience_and_leeway_are_honoured(jwks: JwksServer) -> None:
    good = token(iss="https://issuer", aud=["x", "gen-workers"], exp=NOW - 29, nbf=NOW + 29)
    assert await bearer(verifying(jwks, good, issuer="https://issuer", audience="gen-workers")) == good


async def test_claims_that_no_one_asks_for_do_not_matter(jwks: JwksServer) -> None:
    good = token(iss="https://any", aud="any")
    assert await bearer(verifying(jwks, good)) == good


# -- the key cache --------------------------------------------------------------------------------


async def test_keys_are_fetched_once_per_ttl(jwks: JwksServer) -> None:
    auth = verifying(jwks, token())
    for _ in range(3):
        await bearer(auth)
    assert jwks.fetches == 1
    auth = verifying(jwks, token(), jwks_ttl_s=0)
    for _ in range(3):
        await bearer(auth)
    assert jwks.fetches == 4


async def test_a_password_in_the_url_is_used(jwks: JwksServer) -> None:
    await bearer(verifying(jwks, token()))
    assert jwks.authorizations == ["Basic " + base64.b64encode(b"user:hunter2").decode()]


async def test_an_unknown_kid_fetches_at_once(jwks: JwksServer, tmp_path: Path) -> None:
    file = tmp_path / "token"
    auth = Auth(AuthSettings(token_file=file, jwks_url=jwks.url), now=lambda: NOW)
    file.write_text(token())
    await bearer(auth)
    jwks.document["keys"].append(public_jwk("EdDSA", KEYS["EdDSA"], kid="k2"))
    rotated = token("EdDSA", kid="k2")
    file.write_text(rotated)
    assert await bearer(auth) == rotated
    assert jwks.fetches == 2


@pytest.mark.parametrize("document", [None, b"<html>", b"\xff\xfe", [], {}, {"keys": 1}])
async def test_a_jwks_that_can_not_be_had_is_no_verdict_on_the_token(jwks: JwksServer, document: Any) -> None:
    working, jwks.document = jwks.document, document
    auth = verifying(jwks, token())
    with pytest.raises(KeysUnreachable, match=r"no keys at http://127.0.0.1:\d+/jwks: .*nothing is dialed") as caught:
        await auth.metadata()
    assert not caught.value.final
    assert "hunter" not in str(caught.value)
    jwks.document = working
    assert await bearer(auth) == token()


async def test_a_jwks_server_that_is_down_is_no_verdict_either(jwks: JwksServer, unused_tcp_port: int) -> None:
    auth = Auth(AuthSettings(auth_token=token(), jwks_url=f"http://127.0.0.1:{unused_tcp_port}/"), now=lambda: NOW)
    with pytest.raises(KeysUnreachable, match="refused"):
        await auth.metadata()


async def test_older_keys_serve_on_while_the_jwks_is_down(jwks: JwksServer, caplog: pytest.LogCaptureFixture) -> None:
    auth = verifying(jwks, token(), jwks_ttl_s=0)
    await bearer(auth)
    jwks.document = None
    assert await bearer(auth) == token()
    assert "serve on" in caplog.text
    assert "hunter" not in caplog.text


async def test_an_unusable_key_does_not_spoil_the_others(jwks: JwksServer) -> None:
    broken: list[Any] = [
        7,
        {},
        {"kty": "RSA", "kid": "k1"},
        {"kty": "RSA", "kid": "k1", "n": "!", "e": "?"},
        {"kty": "XY", "kid": "k1"},
    ]
    jwks.document = {"keys": broken + jwks.document["keys"]}
    assert await bearer(verifying(jwks, token())) == token()


async def test_fetching_does_not_hold_up_the_event_loop(jwks: JwksServer) -> None:
    jwks.go_on.clear()
    verification = asyncio.create_task(bearer(verifying(jwks, token())))
    async with asyncio.timeout(5):
        while not jwks.fetches:
            await asyncio.sleep(0.001)
    jwks.go_on.set()  # the server answers only because the loop came to this line
    assert await verification == token()


async def test_a_verification_does_not_outlive_who_asked_for_it(jwks: JwksServer) -> None:
    jwks.go_on.clear()
    code = (
        "from supervisor.token_check import TokenCheck\n"
        f"TokenCheck({jwks.url!r}, 300, None, None).verify({token()!r}, {NOW})"
    )
    asks = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    async with asyncio.timeout(20):
        while not jwks.fetches:
            await asyncio.sleep(0.01)
    (verifies,) = psutil.Process(asks.pid).children()
    asks.kill()
    await asks.wait()
    await asyncio.to_thread(psutil.wait_procs, [verifies], 3)
    assert not verifies.is_running() or verifies.status() == psutil.STATUS_ZOMBIE
    jwks.go_on.set()


async def test_no_verdict_without_a_process(jwks: JwksServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for program, words in (("/nowhere/python", "no process verifies the token"), ("/bin/false", "failed (1)")):
        monkeypatch.setattr("supervisor.token_check.sys.executable", program)
        with pytest.raises(KeysUnreachable, match=re.escape(words)) as caught:
            await verifying(jwks, token()).metadata()
        assert not caught.value.final


# -- expiry ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claims", "warns"),
    [
        ({"iat": NOW - 2000, "exp": NOW + 301}, False),
        ({"iat": NOW - 2000, "exp": NOW + 299}, True),
        ({"iat": NOW - 80_000, "exp": NOW + 8000}, True),  # under a tenth of its life is left
        ({"iat": NOW - 10, "exp": NOW + 290}, False),  # short-lived, and still in its first half
        ({"iat": NOW - 151, "exp": NOW + 149}, True),
        ({"exp": NOW + 10**12}, False),
        ({"exp": 10**400}, False),
        ({"exp": "soon"}, False),
        ({"exp": True}, False),
    ],
)
async def test_a_token_near_its_end_is_announced(
    claims: dict[str, Any], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    written = jwt.encode({}, "x" * 32, algorithm="HS256").split(".")
    written[1] = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    await bearer(Auth(AuthSettings(worker_jwt=".".join(written)), now=lambda: NOW))
    assert ("the token from WORKER_JWT expires at" in caplog.text) is warns
    assert written[1] not in caplog.text


async def test_the_warning_comes_later_when_the_stream_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    auth = Auth(AuthSettings(auth_token=token("RS256", iat=time.time() - 1000, exp=time.time() + 300.05)))
    await auth.metadata()
    assert not caplog.text
    async with asyncio.timeout(5):
        while "the token from AUTH_TOKEN expires at" not in caplog.text:
            await asyncio.sleep(0.01)
    auth.close()


async def test_an_expired_token_without_a_jwks_is_the_schedulers_to_refuse(caplog: pytest.LogCaptureFixture) -> None:
    old = token(exp=NOW - 5)
    assert await bearer(Auth(AuthSettings(auth_token=old), now=lambda: NOW)) == old
    assert "expired 5 s ago" in caplog.text


@pytest.mark.parametrize(
    "opaque", ["", "abc", "a.b.c", "a.e30", "a.W10.c", "....", "a.\u00e9.c", "a." + "W" * 5000 + ".c"]
)
def test_claims_of_what_is_no_jwt_are_empty(opaque: str) -> None:
    assert unverified_claims(opaque) == {}


def test_every_error_is_one_tree() -> None:
    for kind in (TokenRefused, TokenFileUnreadable, KeysUnreachable):
        assert issubclass(kind, AuthError)
