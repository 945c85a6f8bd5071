"""Payloads by their JSON Schema: from words on a command line, from a form, and from JSON to what the wire takes.

Owns: what JSON can't say. On the wire a payload is MessagePack, where bytes are bytes; in JSON they are base64. An
Asset may be given as its ref or URL alone. What a value must be beyond that is for the worker to judge.
"""

from __future__ import annotations

import base64
import binascii
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from gen_worker.errors import ValidationError

Node = Mapping[str, Any]

_REF: Final = "#/$defs/"
_ASSET_FIELDS: Final = frozenset({"ref", "tenant_id", "local_path", "mime_type", "size_bytes", "sha256"})
_MAX_REFS: Final = 100
_TYPES_OF: Final[Mapping[type, set[str]]] = {
    bool: {"boolean"}, type(None): {"null"}, int: {"integer", "number"}, float: {"number"},
    list: {"array"}, dict: {"object"},
}  # fmt: skip
"""Not of str: a JSON string in quotes is meant with its quotes."""
_WORDS: Final = {
    "integer": "an integer", "number": "a number", "boolean": "true or false", "string": "a text",
    "array": "a JSON list", "object": "a JSON object", "null": "null",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LocalFile:
    """`@path` as a value: the file's bytes, or the file as an Asset."""

    path: Path


Store = Callable[[Path], str]
"""Puts a file into the file store; returns its ref."""


def no_store(path: Path) -> str:
    """For payloads that come without files."""
    raise ValidationError(f"{path}: a file can't be given here")


class Schema:
    """The schema of one struct."""

    def __init__(self, document: Node) -> None:
        self.document = document
        self._defs: Node = document.get("$defs", {})

    # -- looking ------------------------------------------------------------------------------------

    def branches(self, node: Node) -> list[Node]:
        """What a value may be: the schema itself, or each of its anyOf, with references resolved."""
        for _ in range(_MAX_REFS):
            ref = node.get("$ref", "")
            if not ref.startswith(_REF):
                break
            node = self._defs.get(ref.removeprefix(_REF), {})
        return [each for option in node["anyOf"] for each in self.branches(option)] if "anyOf" in node else [node]

    def find(self, path: str) -> Node:
        """The schema of a field, `a.b` being field b of field a. Raises ValidationError when there is none."""
        node: Node = self.document
        names = path.split(".")
        for depth, name in enumerate(names):
            objects = [each for each in self.branches(node) if each.get("type") == "object" or _is_anything(each)]
            children = [_child(each, name) for each in objects]
            found = next((child for child in children if child is not None), None)
            if found is None:
                raise ValidationError(self._unknown(".".join(names[:depth]), name, objects))
            node = found
        return node

    # -- from words ---------------------------------------------------------------------------------

    def parse(self, words: Iterable[str]) -> dict[str, Any]:
        """A payload from `field=value` words. Raises ValidationError, which names the word.

        A value is what its field's schema says; `a.b=1` is a field of a field, a list is JSON or the field repeated,
        `@path` is a file where bytes or an Asset are wanted.
        """
        payload: dict[str, Any] = {}
        for word in words:
            path, equals, text = word.partition("=")
            if not equals or not path:
                raise ValidationError(f"{word!r} is not field=value")
            self._set(payload, path, text)
        return payload

    def _set(self, payload: dict[str, Any], path: str, text: str) -> None:
        node = self.find(path)
        *parents, last = path.split(".")
        place = payload
        for name in parents:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ValidationError(f"{path}: {name} has a value of its own already")
        lists = [branch for branch in self.branches(node) if branch.get("type") == "array"]
        if lists and not text.startswith("[") and text != "null":
            items = lists[0].get("items")
            value = self._value(items if isinstance(items, Mapping) else {}, path, text)
            place.setdefault(last, []).append(value)
        elif last in place:
            raise ValidationError(f"{path} is given twice")
        else:
            place[last] = self._value(node, path, text)

    def _value(self, node: Node, path: str, text: str) -> Any:
        branches = self.branches(node)
        if text.startswith("@") and any(_is_asset(branch) or is_bytes(branch) for branch in branches):
            return LocalFile(Path(text[1:]))
        choices = [choice for branch in branches for choice in branch.get("enum", ())]
        types = {kind for branch in branches for kind in _types(branch)}
        value = _from_json(text)
        if value in choices or text in choices:
            return text if text in choices else value
        if _type_of(value) & types or any(map(_is_anything, branches)):
            return text if isinstance(value, msgspec.UnsetType) else value
        if "string" in types or any(_is_asset(branch) for branch in branches):
            return text
        expected = " or ".join([*map(str, choices), *(_WORDS[kind] for kind in sorted(types) if kind in _WORDS)])
        raise ValidationError(f"{path}={text}: expected {expected}")

    # -- from JSON ----------------------------------------------------------------------------------

    def fit(self, value: Any, store: Store = no_store) -> Any:
        """A payload as the wire takes it. Raises ValidationError, which names the field."""
        return self._fit(self.document, value, "payload", store)

    def _fit(self, node: Node, value: Any, path: str, store: Store) -> Any:
        branches = self.branches(node)
        match value:
            case LocalFile():
                if any(is_bytes(branch) for branch in branches):
                    return _read(value.path)
                return {"ref": store(value.path)}
            case str():
                return _fit_text(branches, value, path)
            case dict():
                branch = next((each for each in branches if _matches(each, value)), {})
                return {
                    key: self._fit(_child(branch, key) or {}, item, f"{path}.{key}", store)
                    for key, item in value.items()
                }
            case list():
                branch = next((each for each in branches if each.get("type") == "array"), {})
                nodes = _item_nodes(branch)
                return [self._fit(next(nodes), item, f"{path}[{i}]", store) for i, item in enumerate(value)]
        return value

    def _unknown(self, parent: str, name: str, objects: list[Node]) -> str:
        known = sorted({key for branch in objects for key in branch.get("properties", {})})
        if not known:
            return f"{parent or 'the payload'} has no fields, and so no {name!r}"
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(known)}"
        return f"{f'{parent} has' if parent else 'there is'} no field {name!r}; {hint}"


def _child(branch: Node, name: str) -> Node | None:
    """The schema of a member; None when the object has none of this name."""
    if _is_anything(branch) or branch.keys().isdisjoint(("properties", "additionalProperties")):
        return {}
    found = branch.get("properties", {}).get(name, branch.get("additionalProperties"))
    if found is None or found is False:
        return None
    return found if isinstance(found, Mapping) else {}


def _item_nodes(branch: Node) -> Iterator[Node]:
    yield from branch.get("prefixItems", ())
    items = branch.get("items")
    while True:
        yield items if isinstance(items, Mapping) else {}


def _matches(branch: Node, value: dict[str, Any]) -> bool:
    """Whether the object may be meant by this branch: a union of structs says which one by a tag."""
    if branch.get("type") != "object":
        return False
    tags = {name: node["enum"] for name, node in branch.get("properties", {}).items() if "enum" in node}
    return all(name not in value or value[name] in choices for name, choices in tags.items())


def _types(branch: Node) -> set[str]:
    kind = branch.get("type", ())
    return {kind} if isinstance(kind, str) else set(kind)


def _type_of(value: Any) -> set[str]:
    return _TYPES_OF.get(type(value), set())


def _from_json(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError):
        return msgspec.UNSET


def _fit_text(branches: list[Node], value: str, path: str) -> Any:
    if any(_is_asset(branch) for branch in branches):
        return {"ref": value}
    encoded = [is_bytes(branch) for branch in branches if "string" in _types(branch)]
    if not encoded or not all(encoded):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValidationError(f"{path}: not base64: {error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValidationError(f"@{path} can't be read: {error.strerror}") from error


def _is_anything(branch: Node) -> bool:
    return branch.keys().isdisjoint(("type", "enum", "const"))


def _is_asset(branch: Node) -> bool:
    return branch.get("title") == "Asset" and set(branch.get("properties", ())) >= _ASSET_FIELDS


def is_bytes(branch: Node) -> bool:
    """Whether a field of this schema is bytes, which JSON has as base64."""
    return branch.get("contentEncoding") == "base64"
