"""Which hosts a URL of a stranger may lead to.

Owns: what counts as a public address, and which URLs are read at all. A URL is parsed once, by httpx, and what was
parsed is what is connected to: there is no second reader that could see another host in it.
"""

from __future__ import annotations

import ipaddress
import re
from ipaddress import IPv4Address, IPv6Address
from typing import Final

import httpx

from gen_worker.errors import ValidationError

Address = IPv4Address | IPv6Address

MAX_URL_CHARS: Final = 8192
_MAX_PORT: Final = 65535

_GLOBAL_V6: Final = ipaddress.IPv6Network("2000::/3")
_TEREDO: Final = ipaddress.IPv6Network("2001::/32")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_NUMBER: Final = re.compile(r"[0-9]+|0[xX][0-9a-fA-F]*")


def is_public(address: Address) -> bool:
    """Whether it is a unicast address of the internet: not private, loopback, link-local, multicast, reserved or none.

    A v6 address that stands for a v4 one (mapped, 6to4, NAT64) is as public as that.
    """
    if isinstance(address, IPv6Address):
        inner = _v4_in(address)
        if inner is not None:
            return is_public(inner)
        if address not in _GLOBAL_V6 or address in _TEREDO or address.scope_id:
            return False
    return address.is_global and not (
        address.is_private
        or address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_reserved
        or address.is_unspecified
    )


def _v4_in(address: IPv6Address) -> IPv4Address | None:
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def parse_url(text: str) -> httpx.URL:
    """An http(s) URL with a host that has one meaning only. Raises ValidationError."""
    if len(text) > MAX_URL_CHARS:
        raise ValidationError(f"its URL has {len(text)} characters, at most {MAX_URL_CHARS} are allowed")
    if "\\" in text or not text.isprintable() or " " in text:
        raise ValidationError("its URL has a backslash, a space or an unprintable character")
    try:
        url = httpx.URL(text)
        host = url.raw_host.decode("ascii")
        port = url.port
    except (httpx.InvalidURL, ValueError) as error:
        raise ValidationError(f"its URL can't be read: {error}") from None
    if url.scheme not in {"http", "https"}:
        raise ValidationError("its URL must begin with http:// or https://")
    if url.userinfo:
        raise ValidationError("its URL names a user: that is not allowed")
    if not host or "%" in host or (port is not None and not 0 < port <= _MAX_PORT):
        raise ValidationError("its URL has no host that can be used")
    if literal(host) is None and _ends_in_number(host):
        raise ValidationError("its URL's host is a number: write an address in the usual notation, or a name")
    return url


def literal(host: str) -> Address | None:
    """The address that a URL's host spells out; None for a name."""
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None


def _ends_in_number(host: str) -> bool:
    """Such a host (`2130706433`, `0177.0.0.1`, `0x7f.1`, `127.1`) is a v4 address to some resolvers, never a name."""
    return _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]) is not None
