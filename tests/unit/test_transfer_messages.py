"""The encoded shape of every message between supervisor and transfer process.

Fields may be appended with a default; what stands here must not change.
"""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest

from gen_worker.pipe.messages import Failure, LocalFile
from supervisor.transfers import messages as m

SETTINGS = m.TransferSettings(
    model_cache_dir="/cache",
    model_cache_max_bytes=1,
    max_concurrent_downloads=2,
    hub_url="http://hub",
    hub_token="secret-hub",
    hf_token="secret-hf",
    hf_home="/hf",
    hf=m.HuggingFaceOptions(("unet",), True, ("fp16",), True, True),
    gpu_sm=90,
    retry=m.RetrySettings(3, 0.1, 0.2),
    http_timeout_s=4.0,
    files=m.FileSettings("/cache", "/run", 5, 6, "socket", 12345, 7.5),
)
FILES = m.ModelFiles("hf:a/b", "/root", {"label": "x"}, 10, 9, 1.5, "/lock")

DOWN: list[tuple[Any, list[Any]]] = [
    (
        m.Start(1, SETTINGS),
        [
            1,
            1,
            [
                "/cache", 1, 2, "http://hub", "secret-hub", "secret-hf", "/hf",
                [["unet"], True, ["fp16"], True, True], 90, [3, 0.1, 0.2], 4.0,
                ["/cache", "/run", 5, 6, "socket", 12345, 7.5],
            ],
        ],
    ),
    (m.Request(7, m.FetchModel("hf:a/b")), [2, 7, [100, "hf:a/b"]]),
    (m.Request(8, m.ListModels()), [2, 8, [101]]),
    (m.Request(9, m.RemoveModel("hf:a/b")), [2, 9, [102, "hf:a/b"]]),
    (
        m.Request(10, m.FetchInputs("run-1", 1, ("a", "http://b"), m.FileAccess("http://s", "secret-t", "tenant"))),
        [2, 10, [110, "run-1", 1, ["a", "http://b"], ["http://s", "secret-t", "tenant"]]],
    ),
    (m.Request(11, m.RemoveInputs("run-1")), [2, 11, [111, "run-1"]]),
    (
        m.Request(12, m.StoreOutput("runs/r/outputs/a", b"t", True, m.FileAccess("http://s"))),
        [2, 12, [112, "runs/r/outputs/a", b"t", True, ["http://s", "", ""]]],
    ),
    (m.Cancel(7), [3, 7]),
]  # fmt: skip

UP: list[tuple[Any, list[Any]]] = [
    (m.Ready(1), [20, 1]),
    (m.Progress(7, 1, 2, 3.5), [21, 7, 1, 2, 3.5]),
    (m.Reply(7, FILES), [22, 7, [200, "hf:a/b", "/root", {"label": "x"}, 10, 9, 1.5, "/lock"]]),
    (m.Reply(8, m.ModelList(())), [22, 8, [201, []]]),
    (m.Reply(9, m.ModelRemoved(5)), [22, 9, [202, 5]]),
    (
        m.Reply(10, m.InputsFetched((LocalFile("/run/a", 3, "ab", "image/png"),))),
        [22, 10, [210, [["/run/a", 3, "ab", "image/png"]], None, 0]],
    ),
    (
        m.Reply(10, m.InputsFetched((), Failure("auth", "no"), 1)),
        [22, 10, [210, [], ["auth", "no", "", False], 1]],
    ),
    (m.Reply(11, m.InputsRemoved()), [22, 11, [211]]),
    (m.Reply(12, m.OutputStored(LocalFile("", 3, "ab", "a/b"))), [22, 12, [212, ["", 3, "ab", "a/b"]]]),
    (m.Failed(7, Failure("auth", "no", "detail", True)), [23, 7, ["auth", "no", "detail", True]]),
    (m.ModelsRemoved(("hf:a/b",)), [24, ["hf:a/b"]]),
]


@pytest.mark.parametrize(("message", "shape"), DOWN + UP, ids=lambda value: type(value).__name__)
def test_the_encoded_shape_is_pinned(message: Any, shape: list[Any]) -> None:
    encoded = m.encode(message)
    assert msgspec.msgpack.decode(encoded) == shape
    decode = m.decode_downward if isinstance(message, get_args(m.Downward)) else m.decode_upward
    assert decode(encoded) == message


def test_every_message_is_pinned() -> None:
    assert {type(message) for message, _ in DOWN} == set(get_args(m.Downward))
    assert {type(message) for message, _ in UP} == set(get_args(m.Upward))
    requests = [message for message, _ in DOWN if isinstance(message, m.Request)]
    assert {type(request.body) for request in requests} == set(get_args(m.RequestBody))
    replies = [message for message, _ in UP if isinstance(message, m.Reply)]
    assert {type(reply.body) for reply in replies} == set(get_args(m.ReplyBody))
    assert all(isinstance(body.repeatable, bool) for body in get_args(m.RequestBody))


@pytest.mark.parametrize("body", [b"", b"\x91\x63", b"\xff", m.encode(m.Request(1, m.ListModels()))[:-1]])
def test_what_is_no_message_is_refused(body: bytes) -> None:
    for decode in (m.decode_downward, m.decode_upward):
        with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):
            decode(body)


def test_tokens_are_not_shown() -> None:
    assert "secret" not in repr(m.Start(1, SETTINGS))
    assert "secret" not in repr(m.RemoveInputs("x")) + repr(m.FetchInputs("d", 1, (), m.FileAccess("b", "secret")))
