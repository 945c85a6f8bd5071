"""Joined messages: what goes in comes out, wherever they are cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from supervisor.transport.messages import PREFIX_BYTES, Joined, Message, apart, count_of, wire_size

MESSAGES = st.lists(st.binary(max_size=300), min_size=1, max_size=12)


@given(MESSAGES)
def test_it_is_the_messages_with_their_prefixes(messages: list[bytes]) -> None:
    joined = Joined.of(messages)
    assert list(joined) == messages
    assert joined.count == len(messages)
    assert len(joined) == len(joined.data) == sum(PREFIX_BYTES + len(message) for message in messages)


@given(MESSAGES, st.data())
def test_it_can_be_cut_between_any_two(messages: list[bytes], data: st.DataObject) -> None:
    joined = Joined.of([b"first", *messages])
    count = data.draw(st.integers(1, joined.count - 1))
    first, others = joined.cut(count)
    assert (list(first), list(others)) == ([b"first", *messages][:count], [b"first", *messages][count:])
    assert (first.count, others.count) == (count, joined.count - count)
    assert first.data + others.data == joined.data


@given(MESSAGES, st.data())
def test_what_is_whole_within_some_bytes(messages: list[bytes], data: st.DataObject) -> None:
    joined = Joined.of(messages)
    size = data.draw(st.integers(0, len(joined)))
    whole = joined.whole_within(size)
    assert sum(PREFIX_BYTES + len(message) for message in messages[:whole]) <= size
    assert whole == len(messages) or sum(PREFIX_BYTES + len(message) for message in messages[: whole + 1]) > size


def test_joined_ones_and_others_count_as_what_they_hold() -> None:
    batch: list[Message] = [b"one", Joined.of([b"two", b"three"]), b""]
    assert count_of(batch) == 4
    assert list(apart(batch)) == [b"one", b"two", b"three", b""]
    assert list(map(wire_size, batch)) == [8, 18, 5]
