"""Letting go of what a caught exception keeps alive.

Owns: nothing.
"""

from __future__ import annotations

import traceback


def drop_frames(error: BaseException) -> None:
    """Let go of what the frames of a failed run hold: tensors would else wait for a garbage collection."""
    seen: set[int] = set()
    links = [error]
    while links:
        link = links.pop()
        if id(link) in seen:
            continue
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link.__traceback__ = None
        links += [other for other in (link.__cause__, link.__context__) if other is not None]
        if isinstance(link, BaseExceptionGroup):
            links += link.exceptions
