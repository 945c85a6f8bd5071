"""Every message that crosses the pipe between the supervisor and the transfer process.

Each is a frozen, tagged msgspec Struct, encoded as a MessagePack array. Fields are only ever appended, with a default;
tests/unit/test_transfer_messages.py pins each encoded shape. Requests are named by an integer that the supervisor never
uses twice.

    supervisor -> transfers             transfers -> supervisor
    Start       once, first             Ready       once, when requests are served
    Request     a body, see below       Progress    any number per request
    Cancel      stop a request          Reply or Failed, one per request that was not canceled
                                        ModelsRemoved   to make room on the disk

A new kind of request is a body here, a member of RequestBody (its answer one of ReplyBody and of ReplyT), and an entry
in the table of handlers (handlers.py).
"""

from __future__ import annotations

from typing import ClassVar, Final, TypeVar

import msgspec

from gen_worker.pipe.messages import Failure, LocalFile

TRANSFER_PROTOCOL: Final = 1
"""Raised when a change breaks the other end; compared at start."""


class RetrySettings(msgspec.Struct, frozen=True, array_like=True):
    """Waits between attempts, in seconds: `first_s`, doubled each time up to `max_s`, each with jitter."""

    attempts: int = 8
    """In a row without a byte of progress."""
    first_s: float = 0.5
    max_s: float = 30.0


class HuggingFaceOptions(msgspec.Struct, frozen=True, array_like=True):
    """What to take of a repo on Hugging Face; the COZY_HF_* settings."""

    components: tuple[str, ...] = ()
    """Exactly these folders; empty: by model_index.json."""
    include_optional: bool = False
    precisions: tuple[str, ...] = ("fp16", "bf16")
    allow_root_json: bool = False
    full_repo: bool = False


class FileSettings(msgspec.Struct, frozen=True, array_like=True):
    """Of runs' files. Sizes in bytes, 0: no limit."""

    cache_dir: str = ""
    run_dir: str = ""
    max_input_bytes: int = 0
    max_upload_bytes: int = 0
    socket: str = ""
    """The abstract Unix socket to take executors' open files from."""
    executor_uid: int = 0
    """Whose."""
    started: float = 0.0
    """Epoch seconds: what is older on disk was left by other workers."""


class TransferSettings(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """All that the transfer process is told; it reads no environment of its own. Sizes in bytes; "": not set."""

    model_cache_dir: str
    model_cache_max_bytes: int = 0
    """0: until the disk is 95 % full."""
    max_concurrent_downloads: int = 2
    hub_url: str = ""
    hub_token: str = ""
    hf_token: str = ""
    hf_home: str = ""
    hf: HuggingFaceOptions = HuggingFaceOptions()
    gpu_sm: int = 0
    """90 for sm_90; 0: no GPU."""
    retry: RetrySettings = RetrySettings()
    http_timeout_s: float = 30.0
    """Without a byte from the other side."""
    files: FileSettings = FileSettings()

    def __repr__(self) -> str:
        return f"TransferSettings(model_cache_dir={self.model_cache_dir!r}, ...)"  # holds tokens


# -- requests and their answers -------------------------------------------------------------------


class FetchModel(msgspec.Struct, frozen=True, array_like=True, tag=100):
    """Have a model's files whole on disk. Answered by ModelFiles."""

    repeatable: ClassVar[bool] = True
    """Whether it may be sent again when the process died with it."""
    ref: str
    """Canonical."""


class ListModels(msgspec.Struct, frozen=True, array_like=True, tag=101):
    """What is whole on disk. Answered by ModelList."""

    repeatable: ClassVar[bool] = True


class RemoveModel(msgspec.Struct, frozen=True, array_like=True, tag=102):
    """Take a model from the disk. Answered by ModelRemoved; fails while anybody uses it."""

    repeatable: ClassVar[bool] = True
    ref: str


class FileAccess(msgspec.Struct, frozen=True, array_like=True):
    """Where a run's files are, and the run's own token."""

    base_url: str
    token: str = ""
    tenant_id: str = ""

    def __repr__(self) -> str:
        return f"FileAccess(base_url={self.base_url!r}, ...)"


class FetchInputs(msgspec.Struct, frozen=True, array_like=True, tag=110):
    """Fetch inputs of a run into a directory of WORKER_RUN_DIR. Answered by InputsFetched."""

    repeatable: ClassVar[bool] = True
    directory: str
    number: int
    """Different for each request of a run; it keeps its files apart from those of others."""
    refs: tuple[str, ...]
    """Of the file store, or http(s) URLs."""
    access: FileAccess


class RemoveInputs(msgspec.Struct, frozen=True, array_like=True, tag=111):
    """The run has ended. Answered by InputsRemoved."""

    repeatable: ClassVar[bool] = True
    directory: str


class StoreOutput(msgspec.Struct, frozen=True, array_like=True, tag=112):
    """Store the open file that comes with the ticket. Answered by OutputStored."""

    repeatable: ClassVar[bool] = False  # the open file is gone with the process
    ref: str
    ticket: bytes
    create: bool
    access: FileAccess


class ModelFiles(msgspec.Struct, frozen=True, array_like=True, tag=200):
    """A model whose files are whole on disk."""

    ref: str
    root_dir: str
    metadata: dict[str, str]
    size_bytes: int
    weight_bytes: int
    last_used: float
    """Epoch seconds."""
    lock_file: str
    """Whoever has it locked shared (flock) keeps the files from being removed."""


class ModelList(msgspec.Struct, frozen=True, array_like=True, tag=201):
    models: tuple[ModelFiles, ...]


class ModelRemoved(msgspec.Struct, frozen=True, array_like=True, tag=202):
    freed_bytes: int


class InputsFetched(msgspec.Struct, frozen=True, array_like=True, tag=210):
    files: tuple[LocalFile, ...]
    failure: Failure | None = None
    failed: int = 0
    """Index of the ref that `failure` is about."""


class InputsRemoved(msgspec.Struct, frozen=True, array_like=True, tag=211):
    pass


class OutputStored(msgspec.Struct, frozen=True, array_like=True, tag=212):
    file: LocalFile


RequestBody = FetchModel | ListModels | RemoveModel | FetchInputs | RemoveInputs | StoreOutput
ReplyBody = ModelFiles | ModelList | ModelRemoved | InputsFetched | InputsRemoved | OutputStored
ReplyT = TypeVar("ReplyT", ModelFiles, ModelList, ModelRemoved, InputsFetched, InputsRemoved, OutputStored)

# -- supervisor -> transfers ----------------------------------------------------------------------


class Start(msgspec.Struct, frozen=True, array_like=True, tag=1):
    protocol: int
    settings: TransferSettings


class Request(msgspec.Struct, frozen=True, array_like=True, tag=2):
    id: int
    body: RequestBody


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Nobody waits for the request any more; it has no answer."""

    id: int


# -- transfers -> supervisor ----------------------------------------------------------------------


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=20):
    protocol: int


class Progress(msgspec.Struct, frozen=True, array_like=True, tag=21):
    id: int
    done_bytes: int
    total_bytes: int
    """0: not known yet."""
    bytes_per_s: float


class Reply(msgspec.Struct, frozen=True, array_like=True, tag=22):
    id: int
    body: ReplyBody


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=23):
    id: int
    failure: Failure


class ModelsRemoved(msgspec.Struct, frozen=True, array_like=True, tag=24):
    """These are no longer whole on disk."""

    refs: tuple[str, ...]


Downward = Start | Request | Cancel
Upward = Ready | Progress | Reply | Failed | ModelsRemoved

encode = msgspec.msgpack.Encoder().encode
decode_downward = msgspec.msgpack.Decoder(Downward).decode
decode_upward = msgspec.msgpack.Decoder(Upward).decode
