"""Exceptions to Failures: the error types, and what end users may read."""

from __future__ import annotations

import asyncio
import random
import re
import string

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_worker.errors import (
    AuthError,
    CanceledError,
    FatalError,
    ResourceError,
    RetryableError,
    RunCanceled,
    SignatureError,
    ValidationError,
    WorkerError,
)
from gen_worker.failures import DETAIL_MAX_BYTES, SAFE_MESSAGE_MAX_CHARS, describe, failure_of, sanitize


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


class TenantError(RetryableError):
    """A tenant's own."""


def undecodable() -> Exception:
    try:
        msgspec.msgpack.decode(b"\xc1")
    except msgspec.DecodeError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "error_type", "retryable", "message"),
    [
        (ValidationError("bad steps"), "validation", False, "bad steps"),
        (ValueError("bad steps"), "validation", False, "bad steps"),
        (ValueError(), "validation", False, "invalid request"),
        (undecodable(), "validation", False, "MessagePack data is malformed: invalid opcode '\\xc1' (byte 0)"),
        (RetryableError("try again"), "retryable", True, "try again"),
        (TenantError(), "retryable", True, "temporary failure"),
        (ResourceError("disk full"), "resource", False, "disk full"),
        (MemoryError(), "resource", False, "out of memory"),
        (OutOfMemoryError("CUDA: 3 GiB"), "resource", False, "out of memory"),
        (RuntimeError("CUDA out of memory. Tried"), "resource", False, "out of memory"),
        (CanceledError("stop"), "canceled", False, "canceled"),
        (InterruptedError("stop"), "canceled", False, "canceled"),
        (RunCanceled(), "canceled", False, "canceled"),
        (asyncio.CancelledError(), "canceled", False, "canceled"),
        (FatalError("never"), "fatal", False, "never"),
        (SignatureError("m.f is wrong"), "fatal", False, "m.f is wrong"),
        (AuthError("token refused"), "auth", False, "token refused"),
        (WorkerError("odd"), "internal", False, "odd"),
        (RuntimeError("password is hunter2"), "internal", False, "internal error"),
        (TimeoutError("http"), "internal", False, "internal error"),
        (KeyError("secret"), "internal", False, "internal error"),
        (SystemExit(3), "internal", False, "internal error"),
        (ExceptionGroup("tasks", [ValueError("leaf")]), "validation", False, "leaf"),
        (ExceptionGroup("tasks", [ValueError("a"), KeyError("b")]), "internal", False, "internal error"),
    ],
)
def test_mapping(error: BaseException, error_type: str, retryable: bool, message: str) -> None:
    failure = failure_of(error)
    assert (failure.error_type, failure.retryable, failure.safe_message) == (error_type, retryable, message)


@pytest.mark.parametrize("error", [RunCanceled(), CanceledError("x"), InterruptedError(), asyncio.CancelledError()])
def test_what_stops_a_run_past_its_deadline_is_a_timeout(error: BaseException) -> None:
    failure = failure_of(error, cancel_cause="timeout")
    assert (failure.error_type, failure.safe_message) == ("timeout", "deadline exceeded")


def test_a_deadline_does_not_hide_another_failure() -> None:
    assert failure_of(ValueError("x"), cancel_cause="timeout").error_type == "validation"


def test_an_unknown_error_type_of_a_tenant_is_internal() -> None:
    class Odd(WorkerError):
        error_type = "odd"  # type: ignore[assignment]

    assert failure_of(Odd("x")).error_type == "internal"


def test_an_error_that_can_not_be_printed() -> None:
    class Broken(ValidationError):
        def __str__(self) -> str:
            raise RuntimeError("no")

    failure = failure_of(Broken())
    assert failure.error_type == "validation"
    assert failure.safe_message == "(its message can't be shown: RuntimeError)"
    assert failure.detail.startswith("Broken: (its message can't be shown: RuntimeError)")


@pytest.mark.parametrize(
    ("message", "safe"),
    [
        ("get https://a.b/c?sig=x failed", "get <url> failed"),
        ("s3://bucket/key", "<url>"),
        ("no file /home/u/a.txt", "no file <path>"),
        ("open('/a b/c.txt')", "open('<path>')"),
        ("failed:/etc/passwd", "failed:<path>"),
        ("in ~/x/y", "in <path>"),
        ("Authorization: Bearer abcdefghijk", "Authorization: Bearer <secret>"),
        ("token=abcdef123456", "token=<secret>"),
        ('{"api_key": "hunter22"}', '{"api_key": "<secret>"}'),
        ("hf_abcdefghijklmnopqrst", "<secret>"),
        ("jwt eyJhbGciOi.eyJzdWIi.sig", "jwt <secret>"),
        ("key AbCd1234AbCd1234AbCd1234AbCd1234", "key <secret>"),
        # What must stay readable
        ("image/png or 1/2 or and/or", "image/png or 1/2 or and/or"),
        ("width / height", "width / height"),
        ("max_tokens=123456", "max_tokens=123456"),
        ("cozy:org/repo@sha256:" + "ab" * 32, "cozy:org/repo@sha256:" + "ab" * 32),
        ("runs/r1/outputs/a.png", "runs/r1/outputs/a.png"),
        ("two\nlines\t here\x00", "two lines here"),
        ("lone \ud800 surrogate", "lone ? surrogate"),
    ],
)
def test_sanitize(message: str, safe: str) -> None:
    assert sanitize(message) == safe


def test_a_long_message_is_cut() -> None:
    cut = sanitize("word " * 100_000)
    assert len(cut) == SAFE_MESSAGE_MAX_CHARS
    assert cut.endswith("…")


def test_a_secret_at_the_cut_is_not_halved() -> None:
    # The long URL shrinks to a few characters, so the end of what is scanned is within what is kept.
    url = "https://host/" + "x" * 3970
    assert sanitize(f"{url} then hf_abcdefghijklmnopqrst") == "<url> then"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=700))
def test_sanitize_never_lets_a_url_or_more_than_the_limit_through(noise: str) -> None:
    safe = sanitize(f"{noise} https://host/secret-path {noise}")
    assert len(safe) <= SAFE_MESSAGE_MAX_CHARS
    assert "secret-path" not in safe
    assert not re.search(r"[\n\r\x00]", safe)


def test_sanitize_is_quick_on_hostile_text() -> None:
    # Every pattern is linear on it; a quadratic one would run into pytest's timeout.
    chars = random.Random(7).choices(string.ascii_letters + "/:=-_.'\" ", k=200_000)
    for text in ("".join(chars), "a" * 200_000, "/a" * 100_000, "token=" * 50_000, "'/" * 100_000):
        assert len(sanitize(text)) <= SAFE_MESSAGE_MAX_CHARS


def test_detail_has_type_message_and_the_last_frames() -> None:
    def deep(level: int) -> None:
        if level == 0:
            raise KeyError("the key")
        deep(level - 1)

    with pytest.raises(KeyError) as caught:
        deep(50)
    detail = describe(caught.value)
    assert detail.startswith("KeyError: 'the key'\nTraceback")
    assert detail.count("in deep") <= 12
    assert detail.endswith("KeyError: 'the key'")


def test_detail_is_bounded_and_keeps_the_end() -> None:
    try:
        raise ValueError("ä" * 20_000)
    except ValueError as first:
        try:
            raise RuntimeError("the last word") from first
        except RuntimeError as error:
            detail = describe(error)
    assert len(detail.encode()) <= DETAIL_MAX_BYTES
    assert detail.startswith("RuntimeError: the last word")
    assert detail.endswith("RuntimeError: the last word")
