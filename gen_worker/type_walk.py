"""What a payload's type is made of."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec


def types_in(type_: type) -> Iterator[msgspec.inspect.Type]:
    """The type as msgspec sees it, and every type that a value of it may hold, each once."""
    seen: set[int] = set()
    links: list[object] = [msgspec.inspect.type_info(type_)]
    while links:
        link = links.pop()
        if isinstance(link, tuple):
            links += link
        elif isinstance(link, (msgspec.inspect.Type, msgspec.inspect.Field)) and id(link) not in seen:
            seen.add(id(link))
            links += [getattr(link, name) for name in link.__struct_fields__]
            if isinstance(link, msgspec.inspect.Type):
                yield link
