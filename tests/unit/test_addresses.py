"""Which URLs of strangers are read, and which addresses are public."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from gen_worker.errors import ValidationError
from supervisor.transfers.addresses import is_public, literal, parse_url


@pytest.mark.parametrize(
    "text",
    ["1.1.1.1", "93.184.216.34", "223.255.255.254", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:8.8.8.8",
     "2002:0808:0808::1", "64:ff9b::8.8.8.8"],
)  # fmt: skip
def test_public(text: str) -> None:
    assert is_public(ip_address(text))


@pytest.mark.parametrize(
    "text",
    [
        # v4: none, private, shared, loopback, link-local (metadata), test nets, benchmarks, multicast, reserved, all
        "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.255", "169.254.169.254",
        "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.2.1", "192.168.1.1", "198.18.0.1", "198.51.100.1",
        "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
        # v6: none, loopback, link-local, unique local, site-local, multicast, documentation, discard, Teredo
        "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12:3456::1", "fec0::1", "ff02::1", "2001:db8::1",
        "100::1", "2001::1", "4000::1",
        # v6 that stands for v4
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "2002:7f00:0001::1",
        "2002:0a00:0001::1", "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1",
    ],
)  # fmt: skip
def test_not_public(text: str) -> None:
    assert not is_public(ip_address(text))


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("http://example.com/a.png", "example.com"),
        ("HTTPS://Example.COM:8443/a%20b?x=1#f", "example.com"),
        ("https://bücher.example/", "xn--bcher-kva.example"),
        ("http://8.8.8.8/", "8.8.8.8"),
        ("http://[2606:2800:220:1::1]:80/", "2606:2800:220:1::1"),
        ("http://4chan.example/", "4chan.example"),
    ],
)
def test_urls_that_are_read(text: str, host: str) -> None:
    assert parse_url(text).raw_host.decode() == host


@pytest.mark.parametrize(
    "text",
    [
        # numbers that some resolvers take for v4 addresses
        "http://2130706433/", "http://0x7f000001/", "http://017700000001/", "http://0177.0.0.1/", "http://0x7f.1/",
        "http://127.1/", "http://127.0.1/", "http://127.0.0.1./", "http://127.0.0.0x1/", "http://1.2.3.4.5/",
        "http://256.256.256.256/", "http://①②⑦.⓪.⓪.①/",
        # a user in front of the host, and what one reader or another takes for one
        "http://user@example.com/", "http://user:pw@example.com/", "http://example.com@127.0.0.1/",
        "http://127.0.0.1\\@example.com/", "http://example.com\\.evil/", "http://a b.example/", "http://a\tb/",
        "http://a\r\nHost: b/", "http://a%2eb/", "http://[fe80::1%25eth0]/",
        # no http(s), no host, no port
        "ftp://example.com/", "file:///etc/passwd", "gopher://example.com/", "http:///x", "http://", "https:/a",
        "http://example.com:0/", "http://example.com:99999/", "http://example.com:x/", "http://[::1/",
        "http://" + "a" * 9000 + "/",
    ],
)  # fmt: skip
def test_urls_that_are_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="its URL"):
        parse_url(text)


def test_literals() -> None:
    assert literal("[::1]") == ip_address("::1")
    assert literal("127.0.0.1") == ip_address("127.0.0.1")
    assert literal("example.com") is None
    assert literal("127.1") is None
