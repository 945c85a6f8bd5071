"""Results that a scheduler's library refuses for their size: found, replaced, and nobody else's."""

from __future__ import annotations

import pytest

from gen_worker.wire import worker_scheduler_pb2 as pb
from supervisor.held_output import LargeResult
from supervisor.outbox import Outbox
from supervisor.oversize import STRIKES, refuses_size
from supervisor.transport import StatusCode, StreamStatus
from supervisor.transport.messages import in_one_piece
from supervisor.wire_codec import encode_result
from tests.unit.test_outbox import Box


def refused(words: str = "Received message exceeds the maximum configured message size.") -> StreamStatus:
    return StreamStatus(StatusCode.RESOURCE_EXHAUSTED, words)


def result(name: str, size: int) -> bytes:
    return encode_result(name, b"x" * size, None)


def sent(box: Box) -> dict[str, pb.TaskExecutionResult]:
    found = [pb.WorkerSchedulerMessage.FromString(message).run_result for message in box.send_all()]
    return {each.run_id: each for each in found}


@pytest.fixture
def box() -> Box:
    return Box()


@pytest.mark.parametrize(
    ("code", "words", "is_refusal"),
    [
        ("RESOURCE_EXHAUSTED", "SERVER: Received message larger than max (5000000 vs. 4194304)", True),
        ("RESOURCE_EXHAUSTED", "grpc: received message larger than max (5242906 vs. 4194304)", True),
        ("RESOURCE_EXHAUSTED", "gRPC message exceeds maximum size 4194304: 5242906", True),
        ("RESOURCE_EXHAUSTED", "Received message exceeds the maximum configured message size.", True),
        ("OUT_OF_RANGE", "Error, decoded message length too large: found 5 bytes, the limit is: 4 bytes", True),
        ("RESOURCE_EXHAUSTED", "no more workers", False),
        ("UNAVAILABLE", "grpc: received message larger than max", False),
    ],
)
def test_how_libraries_say_it(code: str, words: str, is_refusal: bool) -> None:
    assert refuses_size(StreamStatus(StatusCode[code], words)) is is_refusal


def test_one_that_is_named_by_its_size_is_given_up_at_once(box: Box) -> None:
    large, larger = result("large", 5_000_000), result("larger", 6_000_000)
    box.outbox.put_result(1, large)
    box.outbox.put_result(2, larger)
    box.send_all()
    box.outbox.stream_closed(refused(f"larger than max ({len(large)} vs. 4194304)"))
    again = sent(box)
    assert again["larger"].success, "it was not this one"
    assert (again["large"].success, again["large"].error_type, again["large"].safe_message) == (
        False,
        "validation",
        "output too large",
    )
    assert str(len(large)) in again["large"].error_message
    box.outbox.stream_closed(refused(f"larger than max ({len(larger)} vs. 4194304)"))
    again = sent(box)
    assert [each.success for each in again.values()] == [False, False]
    box.outbox.stream_closed()
    assert sent(box) == again, "a failure is sent again as any result"
    assert box.outbox._backlog._answers_bytes == 0


def test_the_largest_is_given_up_when_stream_after_stream_ends_so(box: Box) -> None:
    box.outbox.put_result(1, result("small", 10))
    box.outbox.put_result(2, result("large", 5000))
    for _ in range(STRIKES):
        assert all(each.success for each in sent(box).values())
        box.outbox.stream_closed(refused())
    again = sent(box)
    assert (again["small"].success, again["large"].success) == (True, False)


def test_one_that_was_refused_before_it_was_all_out(box: Box) -> None:
    box.outbox.put_event(1, b"event", 1)
    box.outbox.put_result(1, result("large", 5_000_000))
    box.take()
    box.outbox.accepted(1)
    for _ in range(STRIKES):
        box.take()
        box.outbox.accepted(0)
        box.outbox.stream_closed(refused())
        box.outbox.stream_opened()
    assert not sent(box)["large"].success


def test_other_ends_give_nothing_up(box: Box) -> None:
    box.outbox.put_result(1, result("large", 5_000_000))
    for _ in range(2 * STRIKES):
        assert sent(box)["large"].success
        box.outbox.stream_closed(StreamStatus(StatusCode.UNAVAILABLE, "gone"))


def test_the_keeper_keeps_the_failure_instead() -> None:
    kept: dict[int, bytes] = {}

    class Keeper:
        def keep(self, message: bytes | LargeResult) -> int:
            kept[len(kept) + 1] = in_one_piece(message)
            return len(kept)

        def forget(self, ticket: int) -> None:
            kept[ticket] = b""

    box = Box()
    box.outbox = Outbox(lambda *_: None, lambda: box.now, keeper=Keeper())
    large = result("large", 5_000_000)
    box.outbox.put_result(1, large)
    box.send_all()
    box.outbox.stream_closed(refused(f"larger than max ({len(large)} vs. 1)"))
    (failure,) = box.send_all()
    assert list(kept.values()) == [b"", failure]
