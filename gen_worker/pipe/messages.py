"""Every message that crosses the pipe between the supervisor and an executor.

Each is a frozen, tagged msgspec Struct, encoded as a MessagePack array `[tag, field, ...]`: no pickle
ever crosses. Fields are only ever appended, with a default; tests/unit/test_messages.py pins each encoded shape.

Runs are named by `key`, an integer that the supervisor never uses twice, so that a late message of
one run can't be taken for another that reuses its `run_id`.

    supervisor -> executor              executor -> supervisor
    Init        once, first             Ready       once, when it can take runs
    Take        to a spare              Parked      of a spare: Take may come
    Run, Cancel, Credit                 Event, Deltas, Result
    SocketOpen                          Event, Result
    SocketFrame, SocketClose            SocketFrame, SocketClose
    SocketCredit                        SocketCredit
    LoadModel, UnloadModel              ModelLoaded, ModelUnloaded
    FileReply                           FetchFile, StoreFile
                                        Memory      before each of these two
    Free        a blob was read         Free
    Shutdown                            Fatal       why it is about to leave
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

PIPE_PROTOCOL: Final = 1
"""Raised when a change breaks the other end; both ends compare it at start."""

EVENT_OVERHEAD_BYTES: Final = 256
"""What an event takes of its run's window beyond its payload: both ends count `len(payload)` and this.

It is what a tiny one costs the supervisor while it waits: the wire's message around it and the objects that hold that.
A frame of a realtime session counts the same.
"""

DELTAS_BYTES: Final = 16 * 1024
"""What deltas that go together weigh at most, by the same count."""

ErrorType = Literal["validation", "retryable", "resource", "canceled", "fatal", "auth", "internal", "timeout"]
"""The error types that the scheduler knows."""

CancelCause = Literal["canceled", "timeout"]

FunctionMode = Literal["sync", "async", "generator", "async_generator", "websocket"]


class Blob(msgspec.Struct, frozen=True, array_like=True):
    """A payload that lies in the sender's shared-memory arena instead of in the frame."""

    offset: int
    size: int


Payload = bytes | Blob


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """Why something failed, in the scheduler's terms; the one shape that every failing message uses.

    `safe_message` is for end users; `detail` (the wire's error_message) is for operators.
    """

    error_type: ErrorType
    safe_message: str
    detail: str = ""
    retryable: bool = False


class InjectionInfo(msgspec.Struct, frozen=True, array_like=True):
    """One injected model parameter. `type_name` is the qualified name of what is injected."""

    param: str
    type_name: str
    source: Literal["deployment", "payload"]
    key: str


class FunctionInfo(msgspec.Struct, frozen=True, array_like=True):
    """What the supervisor needs to know of one tenant function; schemas are compact sorted JSON."""

    name: str
    mode: FunctionMode
    input_schema: bytes = b""
    output_schema: bytes = b""
    delta_schema: bytes = b""
    injections: tuple[InjectionInfo, ...] = ()
    max_concurrency: int = 0
    """At once on one executor; 0: not limited by the function itself."""


# -- supervisor -> executor -----------------------------------------------------------------------


class Init(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Everything an executor is told before it imports tenant code."""

    protocol: int
    slot: int
    device: str
    """A torch device string: `cuda:0` (its one pinned GPU) or `cpu`."""
    modules: tuple[str, ...]
    """Modules to import; empty: the tenant's modules are looked for under project_root."""
    project_root: str
    run_dir: str
    threads: int
    cancel_grace_s: float
    max_output_bytes: int
    max_delta_bytes: int
    """0: no limit, as for the two around it."""
    max_delta_events: int
    runtime_loaders: dict[str, str]
    file_socket: str = ""
    """The abstract Unix socket that takes open files to be stored; empty: nothing can be stored."""
    max_upload_bytes: int = 0
    """Of one saved file; 0: no limit."""
    spare: bool = False
    """It has no slot yet: it imports, says Parked, and is Ready after Take, whose slot and device count then."""


class Run(msgspec.Struct, frozen=True, array_like=True, tag=2):
    key: int
    run_id: str
    function: str
    payload: Payload
    models: dict[str, str]
    """Injected parameter -> model id; each was loaded by a LoadModel before."""
    timeout_ms: int
    deadline: float
    """Epoch seconds; 0.0: none."""
    tenant_id: str
    user_id: str
    window: int
    """Event bytes that may be under way before a Credit gives more."""


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=3):
    key: int
    cause: CancelCause


class Credit(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """`size` bytes of this run's events went to the scheduler: as many more may follow."""

    key: int
    size: int


class LoadModel(msgspec.Struct, frozen=True, array_like=True, tag=5):
    model_id: str
    type_name: str
    root_dir: str
    files: dict[str, str]
    metadata: dict[str, str]


class UnloadModel(msgspec.Struct, frozen=True, array_like=True, tag=6):
    model_id: str
    to_host: bool = False
    """Keep it in host memory, for a later LoadModel; false: drop it, such a copy included."""


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Leave at once with exit code 0; sent only when no run is left."""


class Free(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """Both ways: the blob at `offset` of the receiver's arena was read and may be reused."""

    offset: int


class Take(msgspec.Struct, frozen=True, array_like=True, tag=17):
    """To a spare: the slot and device that it serves from now on."""

    slot: int
    device: str
    """As in Init."""
    visible: str
    """CUDA_VISIBLE_DEVICES."""


class LocalFile(msgspec.Struct, frozen=True, array_like=True):
    """A file of a run: an input that was fetched, or an output that was stored (its path is empty)."""

    path: str
    size_bytes: int
    sha256: str
    mime_type: str


class FileReply(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """What became of the FetchFile or StoreFile with this number."""

    key: int
    number: int
    files: tuple[LocalFile, ...] = ()
    """In the order of the request; empty after a failure."""
    failure: Failure | None = None
    failed: int = 0
    """Index of the file that `failure` is about."""


# -- realtime sessions ----------------------------------------------------------------------------


class SocketOpen(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """Start the handler of one session. Its frames may follow at once; Cancel and Result are those of runs."""

    key: int
    session_id: str
    function: str
    models: dict[str, str]
    """Injected parameter -> model id; each was loaded by a LoadModel before."""
    timeout_ms: int
    deadline: float
    """Epoch seconds; 0.0: none."""
    tenant_id: str
    user_id: str
    window: int
    """Bytes of frames and events that may be under way in either direction before a SocketCredit gives more."""
    max_frame_bytes: int


class SocketFrame(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """Both ways: one frame, in order."""

    key: int
    data: Payload
    is_text: bool = False


class SocketClose(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """Both ways: no frame follows from the sender.

    Down: the session is over for the scheduler, and `reason` says why. Up: the reason that the scheduler is to be
    told; a Result follows when the handler itself has ended.
    """

    key: int
    reason: str


class SocketCredit(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """Both ways: `size` bytes of what the receiver sent have left: the handler or the scheduler took them."""

    key: int
    size: int


# -- executor -> supervisor -----------------------------------------------------------------------


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=20):
    protocol: int
    functions: tuple[FunctionInfo, ...]
    versions: dict[str, str]
    """Of torch, cuda, tensorrt, onnxruntime and python, as far as they are there."""


CudaUse = Literal["", "driver", "context"]
"""What a process has made of CUDA: nothing; its driver, which keeps to the devices visible then; memory of a device."""


class Parked(msgspec.Struct, frozen=True, array_like=True, tag=31):
    """A spare has imported what an executor imports, and waits for its Take."""

    protocol: int
    cuda: CudaUse = ""
    """What importing the tenant's modules made of CUDA."""


class Event(msgspec.Struct, frozen=True, array_like=True, tag=21, rename={"type": "event_type"}):
    key: int
    type: str
    payload: bytes
    """UTF-8 JSON, as the scheduler gets it."""


class Deltas(msgspec.Struct, frozen=True, array_like=True, tag=30):
    """Several `output.delta` events of a run, one right behind the other; a single one goes as an Event."""

    key: int
    payloads: Annotated[tuple[bytes, ...], msgspec.Meta(min_length=1, max_length=DELTAS_BYTES // EVENT_OVERHEAD_BYTES)]
    """Each as in Event."""


class Result(msgspec.Struct, frozen=True, array_like=True, tag=22):
    """The end of a run, or of a session's handler (without output)."""

    key: int
    output: Payload = b""
    failure: Failure | None = None
    poisoned: bool = False
    """This run cost the executor its device context: it takes no other and leaves."""
    tiny: bool = False
    """The last runs of its function took next to nothing: not worth waking another executor for."""


class ModelLoaded(msgspec.Struct, frozen=True, array_like=True, tag=23):
    model_id: str
    type_name: str
    device_bytes: int
    """By which the load raised what is held on the device (see Memory)."""
    seconds: float
    failure: Failure | None = None
    poisoned: bool = False
    """As in Result: the load cost the executor its device context."""


class ModelUnloaded(msgspec.Struct, frozen=True, array_like=True, tag=24):
    model_id: str
    device_bytes: int
    """By which the unload lowered what is held on the device."""
    failure: Failure | None = None
    host_bytes: int = 0
    """What its copy in host memory takes; 0: there is none."""
    poisoned: bool = False


class Fatal(msgspec.Struct, frozen=True, array_like=True, tag=25):
    """The executor can't serve (any more) and leaves right after this."""

    reason: Literal["import", "signature", "no_functions", "protocol", "device", "poisoned", "internal"]
    message: str
    """One line for the log."""
    detail: str = ""


class FetchFile(msgspec.Struct, frozen=True, array_like=True, tag=26):
    """A run needs these inputs before its function can be called; until the reply it uses no thread."""

    key: int
    number: int
    """Names the request within its run."""
    refs: tuple[str, ...]


class StoreFile(msgspec.Struct, frozen=True, array_like=True, tag=27):
    """A run stores a file; the file itself goes to Init.file_socket, with the ticket."""

    key: int
    number: int
    ref: str
    """Whole."""
    create: bool
    ticket: bytes


class Memory(msgspec.Struct, frozen=True, array_like=True, tag=28):
    """What the executor holds, by its own count."""

    device_bytes: int
    """On a GPU what torch's allocator has given out; else the tensors of the models that are loaded or were leaked."""
    reserved_bytes: int
    """What torch's allocator keeps of the GPU, given out or not; 0 without a GPU."""
    host_bytes: int
    """Copies of models in host memory."""


Downward = (
    Init | Take | Run | Cancel | Credit | LoadModel | UnloadModel | Shutdown | Free | FileReply
    | SocketOpen | SocketFrame | SocketClose | SocketCredit
)  # fmt: skip
Upward = (
    Ready | Parked | Event | Deltas | Result | ModelLoaded | ModelUnloaded | Fatal | Free | FetchFile | StoreFile
    | Memory | SocketFrame | SocketClose | SocketCredit
)  # fmt: skip

encode = msgspec.msgpack.Encoder().encode
decode_downward = msgspec.msgpack.Decoder(Downward).decode
decode_upward = msgspec.msgpack.Decoder(Upward).decode
