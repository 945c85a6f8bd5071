from __future__ import annotations

import pytest

from supervisor.quarantine import REFUSED_S, REMEMBERED, STRIKES, WHOLE_BYTES, Quarantine, fingerprint


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quarantine(clock: Clock) -> Quarantine:
    return Quarantine(clock)


def test_refused_after_three_strikes_with_the_count_in_the_message(quarantine: Quarantine) -> None:
    request = fingerprint("crash", b"payload")
    for count in range(1, STRIKES):
        assert quarantine.strike(request) == count
        assert quarantine.refusal(request, "crash") is None
    quarantine.strike(request)
    failure = quarantine.refusal(request, "crash")
    assert failure is not None
    assert failure.error_type == "fatal"
    assert not failure.retryable
    assert "3 times" in failure.safe_message
    assert "crash" in failure.detail
    assert "60 more minutes" in failure.detail


def test_another_payload_or_function_is_another_request(quarantine: Quarantine) -> None:
    for _ in range(STRIKES):
        quarantine.strike(fingerprint("crash", b"payload"))
    assert quarantine.refusal(fingerprint("crash", b"other"), "crash") is None
    assert quarantine.refusal(fingerprint("other", b"payload"), "other") is None


def test_suspect_only_before_the_last_strike(quarantine: Quarantine) -> None:
    request = fingerprint("f", b"")
    assert not quarantine.is_suspect(request)
    quarantine.strike(request)
    assert not quarantine.is_suspect(request)
    quarantine.strike(request)
    assert quarantine.is_suspect(request)


def test_a_harmless_end_clears_the_request(quarantine: Quarantine) -> None:
    request = fingerprint("f", b"")
    quarantine.strike(request)
    quarantine.strike(request)
    quarantine.clear(request)
    assert not quarantine.is_suspect(request)
    assert quarantine.strike(request) == 1
    quarantine.clear(fingerprint("never seen", b""))


def test_an_hour_later_it_may_run_again(quarantine: Quarantine, clock: Clock) -> None:
    request = fingerprint("f", b"")
    for _ in range(STRIKES):
        quarantine.strike(request)
    clock.now += REFUSED_S - 1
    assert quarantine.refusal(request, "f") is not None
    clock.now += 1
    assert quarantine.refusal(request, "f") is None
    assert quarantine.strike(request) == 1


def test_memory_is_bounded(quarantine: Quarantine) -> None:
    for index in range(REMEMBERED + 10):
        quarantine.strike(fingerprint("f", index.to_bytes(4, "big")))
    assert len(quarantine) == REMEMBERED
    assert quarantine.strike(fingerprint("f", (0).to_bytes(4, "big"))) == 1


@pytest.mark.parametrize("size", [WHOLE_BYTES, WHOLE_BYTES + 1, 64 * WHOLE_BYTES])
def test_fingerprints_tell_ends_and_lengths_apart(size: int) -> None:
    payload = bytes(size)
    prints = {
        fingerprint("f", payload),
        fingerprint("f", payload[:-1]),
        fingerprint("f", b"\1" + payload[1:]),
        fingerprint("f", payload[:-1] + b"\1"),
        fingerprint("g", payload),
    }
    assert len(prints) == 5
    assert fingerprint("f", bytes(size)) in prints
