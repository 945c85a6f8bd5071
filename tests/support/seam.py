"""Messages as they pass the transport's seam, for tests that want bytes."""

from __future__ import annotations

from collections.abc import Sequence

from supervisor.transport.large import LargeRequest


def plain(messages: Sequence[bytes | LargeRequest]) -> list[bytes]:
    """None of them is large, or the stream has no arena for such."""
    found = [message for message in messages if isinstance(message, bytes)]
    assert len(found) == len(messages)
    return found
