"""The encoded shape of every message on the pipe.

Fields may be appended with a default; what stands here must not change.
"""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_worker.pipe import messages as m

BOTH_WAYS: list[tuple[Any, list[Any]]] = [
    (m.SocketFrame(9, b"data", is_text=True), [10, 9, b"data", True]),
    (m.SocketFrame(9, m.Blob(1048576, 3)), [10, 9, [1048576, 3], False]),
    (m.SocketClose(9, "closed"), [11, 9, "closed"]),
    (m.SocketCredit(9, 4096), [12, 9, 4096]),
]

DOWN: list[tuple[Any, list[Any]]] = [
    (
        m.Init(1, 2, "cuda:0", ("a", "b"), "/app", "/run", 64, 5.0, 100, 200, 0, {"a.Tensor": "mod:load"}),
        [1, 1, 2, "cuda:0", ["a", "b"], "/app", "/run", 64, 5.0, 100, 200, 0, {"a.Tensor": "mod:load"}, "", 0, False],
    ),
    (m.Take(1, "cuda:0", "GPU-1"), [17, 1, "cuda:0", "GPU-1"]),
    (
        m.Run(7, "run-7", "draw", b"\x80", {"pipe": "cozy:a/b:latest"}, 1500, 12.5, "tenant", "user", 262144),
        [2, 7, "run-7", "draw", b"\x80", {"pipe": "cozy:a/b:latest"}, 1500, 12.5, "tenant", "user", 262144],
    ),
    (
        m.Run(8, "run-8", "draw", m.Blob(1048576, 3), {}, 0, 0.0, "", "", 1),
        [2, 8, "run-8", "draw", [1048576, 3], {}, 0, 0.0, "", "", 1],
    ),
    (m.Cancel(7, "timeout"), [3, 7, "timeout"]),
    (m.Credit(7, 4096), [4, 7, 4096]),
    (
        m.LoadModel("cozy:a/b:latest", "torch.nn.Module", "/models/b", {"w": "w.bin"}, {"dtype": "fp16"}),
        [5, "cozy:a/b:latest", "torch.nn.Module", "/models/b", {"w": "w.bin"}, {"dtype": "fp16"}],
    ),
    (m.UnloadModel("cozy:a/b:latest"), [6, "cozy:a/b:latest", False]),
    (m.UnloadModel("cozy:a/b:latest", to_host=True), [6, "cozy:a/b:latest", True]),
    (m.Shutdown(), [7]),
    (m.Free(2097152), [8, 2097152]),
    (
        m.SocketOpen(9, "s-9", "talk", {"p": "cozy:a/b:latest"}, 1500, 12.5, "tenant", "user", 262144, 1024),
        [9, 9, "s-9", "talk", {"p": "cozy:a/b:latest"}, 1500, 12.5, "tenant", "user", 262144, 1024],
    ),
    (
        m.FileReply(7, 1, (m.LocalFile("/run/in.png", 3, "ab", "image/png"),)),
        [13, 7, 1, [["/run/in.png", 3, "ab", "image/png"]], None, 0],
    ),
    (
        m.FileReply(7, 2, failure=m.Failure("auth", "no access"), failed=1),
        [13, 7, 2, [], ["auth", "no access", "", False], 1],
    ),
    *BOTH_WAYS,
]

UP: list[tuple[Any, list[Any]]] = [
    (m.Parked(1, "driver"), [31, 1, "driver"]),
    (
        m.Ready(
            1,
            (
                m.FunctionInfo(
                    "draw", "sync", b"in", b"out", b"", (m.InjectionInfo("pipe", "mod.Pipe", "deployment", "sd"),), 2
                ),
                m.FunctionInfo("tell", "async_generator"),
            ),
            {"python": "3.11"},
        ),
        [
            20,
            1,
            [
                ["draw", "sync", b"in", b"out", b"", [["pipe", "mod.Pipe", "deployment", "sd"]], 2],
                ["tell", "async_generator", b"", b"", b"", [], 0],
            ],
            {"python": "3.11"},
        ],
    ),
    (m.Event(7, "job.progress", b"{}"), [21, 7, "job.progress", b"{}"]),
    (m.Deltas(7, (b"{}", b"[]")), [30, 7, [b"{}", b"[]"]]),
    (m.Result(7, b"out"), [22, 7, b"out", None, False, False]),
    (m.Result(7, poisoned=True), [22, 7, b"", None, True, False]),
    (m.Result(7, m.Blob(0, 1048576)), [22, 7, [0, 1048576], None, False, False]),
    (
        m.Result(7, failure=m.Failure("retryable", "busy", "why", retryable=True)),
        [22, 7, b"", ["retryable", "busy", "why", True], False, False],
    ),
    (m.ModelLoaded("id", "mod.Pipe", 1024, 0.5), [23, "id", "mod.Pipe", 1024, 0.5, None, False]),
    (
        m.ModelLoaded("id", "mod.Pipe", 0, 0.5, m.Failure("resource", "out of memory")),
        [23, "id", "mod.Pipe", 0, 0.5, ["resource", "out of memory", "", False], False],
    ),
    (m.ModelLoaded("id", "mod.Pipe", 0, 0.5, poisoned=True), [23, "id", "mod.Pipe", 0, 0.5, None, True]),
    (m.ModelUnloaded("id", 1024), [24, "id", 1024, None, 0, False]),
    (m.ModelUnloaded("id", 1024, None, 512, poisoned=True), [24, "id", 1024, None, 512, True]),
    (m.Memory(1024, 2048, 512), [28, 1024, 2048, 512]),
    (
        m.ModelUnloaded("id", 0, m.Failure("internal", "internal error", "still used")),
        [24, "id", 0, ["internal", "internal error", "still used", False], 0, False],
    ),
    (m.Fatal("import", "no module x", "trace"), [25, "import", "no module x", "trace"]),
    (m.Free(0), [8, 0]),
    *BOTH_WAYS,
    (m.FetchFile(7, 1, ("a.png", "https://host/b")), [26, 7, 1, ["a.png", "https://host/b"]]),
    (m.StoreFile(7, 2, "runs/r/outputs/a", True, b"ticket"), [27, 7, 2, "runs/r/outputs/a", True, b"ticket"]),
]

FEWEST: list[tuple[list[Any], Any]] = [
    ([20, 1, [["f", "sync"]], {}], m.Ready(1, (m.FunctionInfo("f", "sync"),), {})),
    ([22, 7], m.Result(7)),
    ([23, "id", "t", 0, 0.5], m.ModelLoaded("id", "t", 0, 0.5)),
    ([24, "id", 0], m.ModelUnloaded("id", 0)),
    ([25, "internal", "why"], m.Fatal("internal", "why")),
]
"""What the first version's shortest messages look like: they stay readable whatever is appended."""


def name_of(case: Any) -> str:
    return type(case).__name__ if isinstance(case, msgspec.Struct) else ""


@pytest.mark.parametrize(("message", "shape"), DOWN + UP, ids=name_of)
def test_shape(message: Any, shape: list[Any]) -> None:
    assert msgspec.msgpack.decode(m.encode(message)) == shape


@pytest.mark.parametrize(("message", "shape"), DOWN, ids=name_of)
def test_round_trip_down(message: Any, shape: list[Any]) -> None:
    assert m.decode_downward(m.encode(message)) == message
    assert m.decode_downward(msgspec.msgpack.encode(shape)) == message


@pytest.mark.parametrize(("message", "shape"), UP, ids=name_of)
def test_round_trip_up(message: Any, shape: list[Any]) -> None:
    assert m.decode_upward(m.encode(message)) == message
    assert m.decode_upward(msgspec.msgpack.encode(shape)) == message


@pytest.mark.parametrize(("shape", "message"), FEWEST)
def test_fields_with_defaults_may_be_absent(shape: list[Any], message: Any) -> None:
    assert m.decode_upward(msgspec.msgpack.encode(shape)) == message


@pytest.mark.parametrize(("message", "shape"), UP, ids=name_of)
def test_appended_fields_of_a_newer_end_are_ignored(message: Any, shape: list[Any]) -> None:
    assert m.decode_upward(msgspec.msgpack.encode([*shape, "new"])) == message


def test_the_tables_cover_both_unions() -> None:
    assert {type(message) for message, _ in DOWN} == set(get_args(m.Downward))
    assert {type(message) for message, _ in UP} == set(get_args(m.Upward))


def test_no_two_tags_are_equal() -> None:
    kinds = set(get_args(m.Downward)) | set(get_args(m.Upward))
    assert len({kind.__struct_config__.tag for kind in kinds}) == len(kinds)


def test_the_unions_are_closed() -> None:
    down = {kind.__struct_config__.tag for kind in get_args(m.Downward)}
    up = {kind.__struct_config__.tag for kind in get_args(m.Upward)}
    for tag in range(256):
        for known, decode in ((down, m.decode_downward), (up, m.decode_upward)):
            if tag not in known:
                with pytest.raises(msgspec.ValidationError):
                    decode(msgspec.msgpack.encode([tag, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]))


@pytest.mark.parametrize(
    "shape",
    [
        [],
        [None],
        ["22", 7],
        [21, 7],
        [21, "7", "t", b""],
        [21, 7, "t", "text"],
        [22, 7, [1]],
        [22, 7, b"", ["unheard of", "message"]],
        [25, "unheard of", "message"],
        {"tag": 22},
        22,
        None,
    ],
)
def test_wrong_shapes_are_refused(shape: Any) -> None:
    with pytest.raises(msgspec.ValidationError):
        m.decode_upward(msgspec.msgpack.encode(shape))


@given(
    st.binary(max_size=64)
    | st.tuples(st.sampled_from(range(1, 30)), st.binary(max_size=40)).map(
        lambda pair: bytes([0x94, pair[0]]) + pair[1]
    )
)
def test_garbage_raises_nothing_but_value_errors(data: bytes) -> None:
    for decode in (m.decode_upward, m.decode_downward):
        try:
            decode(data)
        except ValueError:
            continue


def test_messages_can_not_be_changed() -> None:
    message = m.Free(0)
    with pytest.raises(AttributeError):
        message.offset = 1  # type: ignore[misc]
