"""Fetching URLs of strangers: from public addresses only, whatever the URL, the resolver or the server try.

No packet leaves this machine: hosts are looked up in a table, and the only address that can be allowed is loopback's.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Sequence
from ipaddress import ip_address
from typing import Any

import pytest
import trustme

from gen_worker.errors import ValidationError
from supervisor.transfers.addresses import Address, is_public
from supervisor.transfers.retrying import TryAgain
from supervisor.transfers.web import PublicWeb, system_resolve

Request = tuple[str, dict[str, str]]
"""The request line and the headers."""


class Server:
    """Answers each path with what `answers` says: (status, headers, body)."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {"/a.png": (200, {}, b"pixels")}
        self.requests: list[Request] = []
        self.hold: asyncio.Event | None = None
        """While it is not set connections stay open, with nothing more to come."""
        self.open = 0
        self.names: list[str | None] = []
        """What TLS was asked for."""

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        if tls is not None:
            tls.sni_callback = lambda _, name, __: self.names.append(name)
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        self.port = self.server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        with contextlib.closing(writer):  # also when the test is over before it
            await self._answer(reader, writer)
        self.open -= 1

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        fields = (line.partition(": ") for line in head[1:] if line)
        self.requests.append((head[0], {name.lower(): value for name, _, value in fields}))
        status, headers, body = self.answers.get(head[0].split()[1], (404, {}, b""))
        headers = {"Content-Length": str(len(body)), **headers}
        lines = [f"HTTP/1.1 {status} x", *(f"{name}: {value}" for name, value in headers.items())]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await writer.drain()
        if self.hold is not None:
            await self.hold.wait()


class Names:
    """A resolver: each look-up of a name gives its next answer, the last one again and again."""

    def __init__(self, **names: list[list[str]]) -> None:
        self.names = {name.replace("_", "."): answers for name, answers in names.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[Address]:
        self.asked.append(host)
        answers = self.names[host]
        return [ip_address(text) for text in (answers.pop(0) if len(answers) > 1 else answers[0])]


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    await server.start()
    yield server
    server.server.close()


def loopback_too(address: Address) -> bool:
    """What a test allows so that it can be answered at all: a rule of its own for one address."""
    return address == ip_address("127.0.0.1")


async def get(names: Names, url: str, **options: Any) -> bytes:
    web = PublicWeb(timeout_s=20, resolve=names, **options)
    try:
        async with web.open(url) as response:
            return await response.aread()
    finally:
        await web.close()


async def test_a_file_of_an_allowed_address(server: Server) -> None:
    names = Names(pictures_example=[["127.0.0.1"]])
    assert await get(names, f"http://pictures.example:{server.port}/a.png", allowed=loopback_too) == b"pixels"
    (line, headers), *_ = server.requests
    assert (line, headers["host"]) == ("GET /a.png HTTP/1.1", f"pictures.example:{server.port}")
    assert headers["accept-encoding"] == "identity"
    assert "authorization" not in headers
    assert "cookie" not in headers


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "10.0.0.1", "169.254.169.254", "[fd00::1]", "0.0.0.0", "[::]"],
)
async def test_addresses_in_the_url(server: Server, host: str) -> None:
    names = Names()
    with pytest.raises(ValidationError, match="not on the public internet"):
        await get(names, f"http://{host}:{server.port}/a.png")
    assert (server.requests, names.asked) == ([], [])


@pytest.mark.parametrize(
    "answer",
    [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::1"], ["::ffff:127.0.0.1"], ["192.168.0.9"], ["fe80::1"], []],
)
async def test_names_of_private_addresses(server: Server, answer: list[str]) -> None:
    """One such address among several is enough."""
    with pytest.raises(ValidationError, match=r"host rebind\.example is not on the public internet"):
        await get(Names(rebind_example=[answer]), f"http://rebind.example:{server.port}/a.png")
    assert server.requests == []


async def test_localhost_by_the_systems_resolver(server: Server) -> None:
    web = PublicWeb(timeout_s=20)
    with pytest.raises(ValidationError, match="host localhost is not on the public internet"):
        async with web.open(f"http://localhost:{server.port}/a.png"):
            pass
    await web.close()
    assert server.requests == []
    assert not any(is_public(address) for address in await system_resolve("localhost", 80))


async def test_a_name_that_changes_between_check_and_connect(server: Server) -> None:
    """The first look-up gives what is allowed, every further one another address: there is no further one."""
    names = Names(rebind_example=[["127.0.0.1"], ["127.0.0.2"]])
    body = await get(names, f"http://rebind.example:{server.port}/a.png", allowed=loopback_too)
    assert (body, names.asked) == (b"pixels", ["rebind.example"])
    # The other way round: the first answer counts even if the second would be allowed.
    names = Names(rebind_example=[["127.0.0.2"], ["127.0.0.1"]])
    with pytest.raises(ValidationError, match="not on the public internet"):
        await get(names, f"http://rebind.example:{server.port}/a.png", allowed=loopback_too)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "location",
    ["http://10.0.0.1/", "http://[::1]:{port}/a.png", "http://inner.example:{port}/a.png", "http://2130706433/",
     "//inner.example:{port}/a.png", "http://127.0.0.3:{port}/a.png", "file:///etc/passwd", "http://u@outer.example/"],
)  # fmt: skip
async def test_redirects_to_where_it_must_not_go(server: Server, location: str) -> None:
    server.answers["/r"] = (302, {"Location": location.format(port=server.port)}, b"")
    names = Names(outer_example=[["127.0.0.1"]], inner_example=[["127.0.0.2"]])
    with pytest.raises(ValidationError, match=r"not on the public internet|its URL"):
        await get(names, f"http://outer.example:{server.port}/r", allowed=loopback_too)
    assert [line for line, _ in server.requests] == ["GET /r HTTP/1.1"]


async def test_redirects_are_followed_with_a_new_look_up_each(server: Server) -> None:
    server.answers["/r"] = (301, {"Location": "/s"}, b"")
    server.answers["/s"] = (307, {"Location": f"http://other.example:{server.port}/a.png"}, b"")
    names = Names(outer_example=[["127.0.0.1"]], other_example=[["127.0.0.1"]])
    assert await get(names, f"http://outer.example:{server.port}/r", allowed=loopback_too) == b"pixels"
    assert names.asked == ["outer.example", "outer.example", "other.example"]


async def test_a_loop_of_redirects(server: Server) -> None:
    server.answers["/r"] = (302, {"Location": "/r"}, b"")
    with pytest.raises(ValidationError, match="redirects more than 5 times"):
        await get(Names(a_example=[["127.0.0.1"]]), f"http://a.example:{server.port}/r", allowed=loopback_too)
    assert len(server.requests) == 6


async def test_proxy_variables_change_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server would be the proxy: it would be asked for the whole URL, and would look the host up by itself."""
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.port}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(ValidationError, match="not on the public internet"):
        await get(Names(inner_example=[["10.0.0.1"]]), "http://inner.example/a.png")
    assert server.requests == []
    names = Names(a_example=[["127.0.0.1"]])
    assert await get(names, f"http://a.example:{server.port}/a.png", allowed=loopback_too) == b"pixels"
    assert server.requests[0][0] == "GET /a.png HTTP/1.1"


async def test_tls_is_verified_for_the_name_of_the_url() -> None:
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("pictures.example").configure_cert(tls)
    server = Server()
    await server.start(tls)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    names = Names(pictures_example=[["127.0.0.1"]], other_example=[["127.0.0.1"]])
    try:
        url = f"https://pictures.example:{server.port}/a.png"
        assert await get(names, url, allowed=loopback_too, tls=trusting) == b"pixels"
        assert server.names == ["pictures.example"]
        url = f"https://other.example:{server.port}/a.png"
        with pytest.raises(TryAgain, match=r"its server on other\.example does not answer .*CERTIFICATE_VERIFY_FAILED"):
            await get(names, url, allowed=loopback_too, tls=trusting)
        assert server.names == ["pictures.example", "other.example"]
        assert len(server.requests) == 1
    finally:
        server.server.close()


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (404, ValidationError, "its server answered 404"),
        (401, ValidationError, "its server answered 401"),
        (204, ValidationError, "its server answered 204"),
        (304, ValidationError, "its server answered 304"),
        (503, TryAgain, "its server answered 503"),
        (429, TryAgain, "its server answered 429"),
    ],
)
async def test_answers(server: Server, status: int, error: type[Exception], words: str) -> None:
    server.answers["/a.png"] = (status, {"Retry-After": "7"}, b"")
    with pytest.raises(error, match=words) as caught:
        await get(Names(a_example=[["127.0.0.1"]]), f"http://a.example:{server.port}/a.png", allowed=loopback_too)
    assert getattr(caught.value, "after_s", 7.0) == 7.0


async def test_who_does_not_answer(server: Server) -> None:
    server.server.close()
    await server.server.wait_closed()
    with pytest.raises(TryAgain, match=r"its server on a\.example does not answer \(ConnectError"):
        await get(Names(a_example=[["127.0.0.1"]]), f"http://a.example:{server.port}/a.png", allowed=loopback_too)


async def test_a_body_that_breaks_off(server: Server) -> None:
    server.answers["/a.png"] = (200, {"Content-Length": "100"}, b"not all of it")
    with pytest.raises(TryAgain, match="the connection to its server broke"):
        await get(Names(a_example=[["127.0.0.1"]]), f"http://a.example:{server.port}/a.png", allowed=loopback_too)
