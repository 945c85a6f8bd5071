"""Turns an exception into the Failure that goes on the wire.

Owns: the mapping of exceptions to error types, and what end users get to read. `safe_message` never holds a URL, a
local path or a secret and has at most 500 characters; `detail` is for operators: type, message and last frames.
Where one exception raised another the outermost decides: a function may translate what a library raised.
"""

from __future__ import annotations

import asyncio
import re
import traceback
from typing import Final, get_args

from gen_worker.errors import CanceledError, RunCanceled, WorkerError
from gen_worker.pipe.messages import CancelCause, ErrorType, Failure

SAFE_MESSAGE_MAX_CHARS: Final = 500
"""The scheduler's limit on what is shown to end users."""
DETAIL_MAX_BYTES: Final = 8 * 1024
"""Enough for a message and the last frames; it crosses the pipe and the wire with every failed run."""

_MESSAGE_MAX_CHARS: Final = 2000
_LAST_FRAMES: Final = -12
_SCAN_MAX_CHARS: Final = 4000
"""Bounds what the patterns below look at; several times what is kept."""

_DEFAULT_MESSAGES: Final[dict[ErrorType, str]] = {
    "validation": "invalid request",
    "retryable": "temporary failure",
    "resource": "resource exhausted",
    "canceled": "canceled",
    "fatal": "fatal error",
    "auth": "not authorized",
    "internal": "internal error",
    "timeout": "deadline exceeded",
}
_ERROR_TYPES: Final = frozenset(get_args(ErrorType))
_CANCELED: Final = (RunCanceled, asyncio.CancelledError, InterruptedError, CanceledError)

_REPLACEMENTS: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (re.compile(r"\b[a-z][a-z0-9+.-]{0,30}://[^\s'\"<>]+", re.IGNORECASE), "<url>"),
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE), r"\1 <secret>"),
    (
        re.compile(
            r"\b([\w-]{0,40}(?:token|secret|passw(?:or)?d|api[_-]?key|access[_-]?key|authorization|signature)"
            r"['\"]?\s{0,3}[=:]\s{0,3}['\"]?)(?!<secret>|(?:bearer|basic)\b)[^\s'\",;&<>]{6,}",
            re.IGNORECASE,
        ),
        r"\1<secret>",
    ),
    (re.compile(r"\beyJ[\w-]{4,}\.[\w-]{4,}(?:\.[\w-]*)?"), "<secret>"),  # a JWT
    (re.compile(r"\b(?:hf_|sk-|ghp_|gho_|ghs_|github_pat_|glpat-|xox[abp]-|r8_|AKIA)[\w-]{12,}"), "<secret>"),
    # Long and mixed in case and digits: a key. Lower-case hex is left alone: digests and run ids are useful to read.
    (re.compile(r"\b(?=[\w-]*[a-z])(?=[\w-]*[A-Z])(?=[\w-]*\d)[A-Za-z0-9_-]{32,}"), "<secret>"),
    (re.compile(r"(?P<quote>['\"`])(?:~?/)[^'\"`]+(?P=quote)"), r"\g<quote><path>\g<quote>"),
    (re.compile(r"(?<![\w.~:/<])~?/[^\s'\"`,;:()\[\]{}<>/][^\s'\"`,;:()\[\]{}<>]*"), "<path>"),
    (re.compile(r"(?<=:)/[\w.-]+/[^\s'\"`,;:()\[\]{}<>]*"), "<path>"),
)


def failure_of(error: BaseException, *, cancel_cause: CancelCause | None = None) -> Failure:
    """The Failure for what a function raised.

    `cancel_cause` is the run's (`ctx.cancel_cause`): with "timeout", whatever stops a canceled function is a timeout.
    """
    error = _sole_leaf(error)
    error_type, retryable, message = _classify(error, cancel_cause)
    return Failure(
        error_type=error_type,
        safe_message=sanitize(message) or _DEFAULT_MESSAGES[error_type],
        detail=describe(error),
        retryable=retryable,
    )


def sanitize(message: str) -> str:
    """One line of at most 500 characters with URLs, absolute paths and token-like strings replaced."""
    text = message.encode("utf-8", "replace").decode("utf-8")
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    if len(text) > _SCAN_MAX_CHARS:
        # Whole words only: half a secret would not be told for one.
        text = text[:_SCAN_MAX_CHARS].rpartition(" ")[0]
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    if len(text) > SAFE_MESSAGE_MAX_CHARS:
        text = text[: SAFE_MESSAGE_MAX_CHARS - 1].rstrip() + "…"
    return text


def describe(error: BaseException) -> str:
    """`Type: message` and the last frames, for operators; at most 8 KiB of UTF-8."""
    name = type(error).__name__
    message = _text_of(error)[:_MESSAGE_MAX_CHARS]
    head = f"{name}: {message}" if message else name
    try:
        frames = "".join(traceback.format_exception(error, limit=_LAST_FRAMES))
    except Exception as broken:  # noqa: BLE001  # formatting runs the tenant's __str__, which may raise anything
        frames = f"(the traceback can't be shown: {type(broken).__name__})"
    head_bytes = head.encode("utf-8", "replace")
    room = DETAIL_MAX_BYTES - len(head_bytes) - 1
    # The end of a traceback says where it happened, so that is what is kept.
    tail_bytes = frames.encode("utf-8", "replace")[-room:]
    return f"{head_bytes.decode()}\n{tail_bytes.decode('utf-8', 'ignore')}".rstrip()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device memory ran out; torch's types are told by name, since torch is not imported here."""
    if isinstance(error, MemoryError) or any(base.__name__ == "OutOfMemoryError" for base in type(error).__mro__):
        return True
    text = _text_of(error)
    return isinstance(error, RuntimeError) and ("CUDA out of memory" in text or "CUDA error: out of memory" in text)


def _classify(error: BaseException, cancel_cause: CancelCause | None) -> tuple[ErrorType, bool, str]:
    if isinstance(error, _CANCELED):
        return ("timeout" if cancel_cause == "timeout" else "canceled"), False, ""
    if is_out_of_memory(error):
        return "resource", False, "out of memory"
    if isinstance(error, WorkerError):
        known = error.error_type in _ERROR_TYPES
        return (error.error_type if known else "internal"), error.retryable, _text_of(error)
    if isinstance(error, ValueError):
        return "validation", False, _text_of(error)
    return "internal", False, ""


def _sole_leaf(error: BaseException) -> BaseException:
    """What a TaskGroup raised, when it was one thing only."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:  # noqa: BLE001  # the tenant's __str__ may raise anything
        return f"(its message can't be shown: {type(broken).__name__})"
