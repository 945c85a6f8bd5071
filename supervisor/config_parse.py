"""From the text of an environment variable to a typed value.

Owns: the notations that variables are written in. Each parser takes stripped text and returns the value, or raises
`Invalid` with what was expected; config.py adds the variable's name and the value. Parsers made for something that
may be absent (`optional`, `comma_list`, the JSON maps, `text`) give their empty value for empty text.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urlsplit

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_TRUE: Final = frozenset({"true", "1", "yes", "on"})
_FALSE: Final = frozenset({"false", "0", "no", "off"})
_SIZE: Final = re.compile(r"(\d+)\s*(KiB|MiB|GiB|TiB|)", re.ASCII | re.IGNORECASE)
_SIZE_FACTORS: Final = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_HOST: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*\.?")
_IPV6: Final = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[\w.-]+)?", re.ASCII)
_ADDRESS: Final = re.compile(r"(?:\[(?P<v6>[^\]]*)\]|(?P<host>[^:\[\]]*)):(?P<port>\d{1,5})", re.ASCII)
_GPU: Final = re.compile(r"\d{1,4}|(GPU|MIG)-[0-9A-Za-z/-]+", re.ASCII)
_TOKEN: Final = re.compile(r"[\x21-\x7e]+")
_DOTTED: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_MAX_PORT: Final = 65_535


class Invalid(ValueError):
    """The text is not what the variable takes; the message completes "expected ..."."""


class LocalModel(msgspec.Struct, frozen=True):
    """One entry of WORKER_MODEL_ARTIFACTS_JSON: a model whose files are already on this machine."""

    root_dir: str
    files: dict[str, str] = {}
    """Key -> path, relative to root_dir or absolute."""
    metadata: dict[str, str] = {}
    """What was not written as a string is here as JSON text."""


class _WrittenModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    root_dir: str
    files: dict[str, str] = {}
    metadata: dict[str, object] = {}


def text(value: str) -> str:
    """Any text."""
    return value


def token(value: str) -> str:
    """A bearer token: printable ASCII without spaces, as an HTTP header can carry it; may be empty."""
    if value and not _TOKEN.fullmatch(value):
        raise Invalid("a token of printable ASCII characters without spaces or line breaks")
    return value


def headers(value: str) -> str:
    """`name=value,name=value`, as OpenTelemetry writes HTTP headers; may be empty."""
    if value and not all(re.fullmatch(r"[\w-]+=[\x21-\x7e]*", item.strip(), re.ASCII) for item in value.split(",")):
        raise Invalid("HTTP headers as name=value, separated by commas")
    return value


def boolean(value: str) -> bool:
    lowered = value.lower()
    if lowered in _TRUE:
        return True
    if lowered in _FALSE:
        return False
    raise Invalid("true or false (also 1/0, yes/no, on/off)")


def integer(minimum: int) -> Callable[[str], int]:
    """A whole number of at least `minimum`."""

    def parse(value: str) -> int:
        if re.fullmatch(r"\d{1,18}", value, re.ASCII) and int(value) >= minimum:
            return int(value)
        raise Invalid(f"a whole number, {minimum} or more")

    return parse


def number(*, above_zero: bool = False) -> Callable[[str], float]:
    """A finite number of seconds or GB that is not negative, or `above_zero`."""

    def parse(value: str) -> float:
        try:
            parsed = float(value)
        except ValueError:
            parsed = math.nan
        if math.isfinite(parsed) and (parsed > 0 if above_zero else parsed >= 0):
            return parsed
        raise Invalid("a number above 0" if above_zero else "a number, 0 or more")

    return parse


def byte_size(value: str) -> int:
    """Bytes: `1048576`, or with a suffix, `1 MiB`."""
    if matched := _SIZE.fullmatch(value):
        return int(matched[1]) * _SIZE_FACTORS[matched[2].lower()]
    raise Invalid("a number of bytes, such as 1048576 or 1MiB (suffixes KiB, MiB, GiB, TiB)")


def split_address(value: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` -> host without brackets, and port. Raises Invalid."""
    matched = _ADDRESS.fullmatch(value)
    if matched and int(matched["port"]) <= _MAX_PORT:
        host = matched["host"] if matched["v6"] is None else matched["v6"]
        if (_HOST if matched["v6"] is None else _IPV6).fullmatch(host):
            return host, int(matched["port"])
    raise Invalid("host:port, such as localhost:8080, 10.0.0.7:8080 or [::1]:8080")


def address(value: str) -> str:
    """A `host:port` that can be dialed."""
    if split_address(value)[1] == 0:
        raise Invalid("host:port with a port from 1 to 65535")
    return value


def listen_address(value: str) -> str:
    """A `host:port` to listen on; port 0 takes a free one; empty is off."""
    if value:
        split_address(value)
    return value


def http_url(value: str) -> str:
    """An http or https URL without its trailing slash; may be empty."""
    try:
        parts = urlsplit(value)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if value and (not usable or re.search(r"\s", value)):
        raise Invalid("a URL that starts with http:// or https://")
    return value.rstrip("/")


def path(value: str) -> Path:
    """A path, made absolute; `~` is the home directory."""
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError:
        raise Invalid("a path; there is no home directory to put in the place of ~") from None


def existing_file(value: str) -> Path:
    """The path of a file that is there."""
    found = path(value)
    if not found.is_file():
        raise Invalid("the path of a file that exists")
    return found


def gpu(value: str) -> str:
    if not _GPU.fullmatch(value):
        raise Invalid("GPU indices or UUIDs, such as 0,2 or GPU-8f6e... or MIG-1c2d...")
    return str(int(value)) if value.isdigit() else value


def module_name(value: str) -> str:
    if not _DOTTED.fullmatch(value):
        raise Invalid("dotted module names, such as my_app.functions")
    return value


def choice(*options: str) -> Callable[[str], str]:
    """One of `options`, in any case."""

    def parse(value: str) -> str:
        if value.lower() in options:
            return value.lower()
        raise Invalid(f"{', '.join(options[:-1])} or {options[-1]}")

    return parse


def optional(parse: Callable[[str], T]) -> Callable[[str], T | None]:
    """What `parse` makes of the text; None when there is none."""
    return lambda value: parse(value) if value else None


def comma_list(parse: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Comma-separated items without duplicates; an empty item, as after a trailing comma, is skipped."""

    def parse_all(value: str) -> tuple[T, ...]:
        items = tuple(parse(stripped) for item in value.split(",") if (stripped := item.strip()))
        if len(set(items)) < len(items):
            raise Invalid("a list in which nothing stands twice")
        return items

    return parse_all


def local_models(value: str) -> dict[str, LocalModel]:
    """WORKER_MODEL_ARTIFACTS_JSON: model id -> where its files are."""
    shape = '{"<model id>": {"root_dir": "<path>", "files": {...}, "metadata": {...}}}'
    written = _json_map(value, dict[str, _WrittenModel], shape)
    for model_id, model in written.items():
        if not model.root_dir:
            raise Invalid(f"{shape} with a root_dir that is not empty, for {model_id!r} too")
    return {
        model_id: LocalModel(
            root_dir=model.root_dir,
            files=model.files,
            metadata={key: item if isinstance(item, str) else _json_text(item) for key, item in model.metadata.items()},
        )
        for model_id, model in written.items()
    }


def runtime_loaders(value: str) -> dict[str, str]:
    """WORKER_RUNTIME_LOADERS_JSON: a type's qualified name -> `module:callable`."""
    shape = '{"<type>": "<module>:<callable>"}'
    loaders = _json_map(value, dict[str, str], shape)
    for type_name, target in loaders.items():
        module, separator, name = target.partition(":")
        if not separator or not _DOTTED.fullmatch(module) or not _DOTTED.fullmatch(name):
            raise Invalid(f"{shape}; {target!r}, given for {type_name!r}, is not <module>:<callable>")
    return loaders


def _json_map(value: str, kind: type[dict[str, T]], shape: str) -> dict[str, T]:
    if not value:
        return {}
    try:
        return msgspec.json.decode(value, type=kind)
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise Invalid(f"JSON {shape} ({error})") from None


def _json_text(item: object) -> str:
    return msgspec.json.encode(item).decode()
