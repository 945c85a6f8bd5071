"""Weights from disk to the device: several threads read, and what one has read is copied while it reads on.

Owns: how the bytes of safetensors files become tensors. What is done with those is the libraries' affair
(weight_seams.py).

1. The data of a file is cut into pieces of at most PIECE bytes, in the file's order. A piece may have parts of many
   tensors; a large tensor has many pieces.
2. Each reader takes the next piece. For the CPU it reads straight into the tensors.
3. For a GPU it reads into one of its two page-locked buffers, has the parts copied from there on a stream of its own,
   and goes on with the other buffer. A buffer is read into again when its copies are done. So host memory is bounded by
   the buffers, whatever the size of the model.

Each tensor has an allocation of its own, as the libraries give it: a file's offsets are not aligned as kernels like it,
and what is dropped gives its memory back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import math
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, Self

from gen_worker.weights import StoredTensor, WeightsError, stored_tensors

log = logging.getLogger(__name__)

PIECE: Final = 4 * 2**20
"""Bytes. A copy of so many takes ten times what it takes to ask for it; larger buffers leave the CPU's cache."""
READERS: Final = 4
"""At most. Some cores reading from the page cache saturate a bus; more take time from the runs that go on."""
_PARTS: Final = 512
"""Of one piece: less than what the system reads into with one call (IOV_MAX, 1024)."""

_DTYPES: Final = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
"""safetensors' names -> torch's. What is packed into less than bytes is left to the library."""


class CopyStream(Protocol):
    """Copies to a device, in order, while the caller goes on."""

    def buffer(self, size: int) -> Any:
        """Host memory of so many bytes that the device copies from."""

    def begin(self) -> None:
        """What is copied from here on comes after what the device was asked for: that may still use the memory."""

    def copy(self, target: Any, source: Any) -> None: ...

    def mark(self) -> Callable[[], None]:
        """What waits until all copies so far are done."""


class CudaStream:
    """A CopyStream of a GPU."""

    def __init__(self, device: str) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._device = device
        self._stream = self._torch.cuda.Stream(device)

    def buffer(self, size: int) -> Any:
        plain = {"dtype": self._torch.uint8, "device": "cpu"}  # tenants may have set another default
        try:
            return self._torch.empty(size, **plain, pin_memory=True)
        except RuntimeError as error:
            log.warning("host memory can't be page-locked, so models load slower: %s", error)
            return self._torch.empty(size, **plain)

    def begin(self) -> None:
        self._stream.wait_stream(self._torch.cuda.current_stream(self._device))

    def copy(self, target: Any, source: Any) -> None:
        with self._torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Callable[[], None]:
        event = self._torch.cuda.Event()
        event.record(self._stream)
        wait: Callable[[], None] = event.synchronize
        return wait


@dataclass(slots=True)
class _Piece:
    """A range of a file, and the parts of tensors that it fills, as flat bytes."""

    start: int
    size: int = 0
    parts: list[Any] = field(default_factory=list)


class WeightsFile:
    """An open file of weights. Raises OSError, WeightsError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: Mapping[str, StoredTensor] = stored_tensors(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, start: int, views: list[memoryview]) -> None:
        """Fill the views with what follows `start`."""
        while views:
            got = os.preadv(self._fd, views, start)
            if got == 0:
                end = os.fstat(self._fd).st_size
                raise WeightsError(f"{self.path} ends at byte {end}: it was cut while it was read")
            start += got
            while views and got >= len(views[0]):
                got -= len(views.pop(0))
            if got:
                views[0] = views[0][got:]

    def close(self) -> None:
        """Twice is once."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Lane(Protocol):
    """What one reader uses at a time."""

    def begin(self) -> None: ...
    def read(self, file: WeightsFile, piece: _Piece) -> None: ...
    def end(self) -> None:
        """All that was read is in its tensors when this returns."""


class _Straight:
    """To the CPU: from the page cache into the tensors."""

    def begin(self) -> None:
        pass

    def read(self, file: WeightsFile, piece: _Piece) -> None:
        file.read(piece.start, [_memory(part) for part in piece.parts])

    def end(self) -> None:
        pass


class _Buffered:
    """To a device, by two buffers in turns."""

    def __init__(self, stream: CopyStream) -> None:
        self._stream = stream
        self._buffers: list[Any] = []
        self._marks: list[Callable[[], None] | None] = [None, None]
        self._turn = 0

    def begin(self) -> None:
        if not self._buffers:
            self._buffers = [self._stream.buffer(PIECE) for _ in self._marks]
        self._stream.begin()

    def read(self, file: WeightsFile, piece: _Piece) -> None:
        turn, self._turn = self._turn, 1 - self._turn
        self._wait(turn)
        buffer, at = self._buffers[turn], 0
        file.read(piece.start, [_memory(buffer[: piece.size])])
        try:
            for part in piece.parts:
                self._stream.copy(part, buffer[at : at + part.nbytes])
                at += part.nbytes
        finally:
            self._marks[turn] = self._stream.mark()

    def end(self) -> None:
        for turn in range(len(self._marks)):
            self._wait(turn)

    def _wait(self, turn: int) -> None:
        mark, self._marks[turn] = self._marks[turn], None
        if mark is not None:
            mark()


class WeightReader:
    """See the module. A context: what it opened is closed with it. `device` is a torch device string."""

    def __init__(self, device: str, *, stream: Callable[[], CopyStream] | None = None) -> None:
        """`stream` makes the copy streams of a device that is not the CPU."""
        self._torch: Any = importlib.import_module("torch")
        self.device = device
        self.read_bytes = 0
        """So far."""
        if stream is None and device.startswith("cuda"):
            stream = functools.partial(CudaStream, device)
        self._readers = min(READERS, len(os.sched_getaffinity(0)))
        self._lanes = _lanes(self._readers, stream)
        self._cpu_lanes = _lanes(self._readers, None)
        self._files: list[WeightsFile] = []
        self._counting = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for file in self._files:
            file.close()

    def open(self, path: Path) -> WeightsFile:
        """Raises OSError, WeightsError."""
        file = WeightsFile(path)
        self._files.append(file)
        return file

    def can_read(self, stored: StoredTensor) -> bool:
        """False for what the installed torch has no dtype for, or that is packed."""
        return self.dtype(stored) is not None

    def dtype(self, stored: StoredTensor) -> Any:
        """The torch dtype; None where there is none."""
        return getattr(self._torch, _DTYPES.get(stored.dtype, ""), None)

    def load(self, file: WeightsFile, name: str, *, to_cpu: bool = False) -> Any:
        """One tensor, read by this thread; several may call this at once, and READERS of them read at a time.

        Raises OSError, WeightsError, RuntimeError.
        """
        (tensor,), pieces = self._plan(file, [name], "cpu" if to_cpu else self.device)
        self._work(file, iter(pieces), self._cpu_lanes if to_cpu else self._lanes)
        return tensor

    def load_all(self, file: WeightsFile, names: Sequence[str], *, to_cpu: bool = False) -> dict[str, Any]:
        """Many tensors, read by several threads. Raises OSError, WeightsError, RuntimeError."""
        device, lanes = ("cpu", self._cpu_lanes) if to_cpu else (self.device, self._lanes)
        self._warm_up(sum(file.tensors[name].size for name in names), device)
        tensors, pieces = self._plan(file, names, device)
        work = _Shared(pieces)
        with ThreadPoolExecutor(self._readers, thread_name_prefix="weights") as pool:
            working = [pool.submit(self._work, file, work, lanes) for _ in pieces[: self._readers]]
            try:
                wait(working, return_when=FIRST_EXCEPTION)
            finally:
                work.stop()  # after an error the others need not go on
            for each in working:
                each.result()
        return dict(zip(names, tensors, strict=True))

    # -- inside -------------------------------------------------------------------------------

    def _plan(self, file: WeightsFile, names: Sequence[str], device: str) -> tuple[list[Any], list[_Piece]]:
        """The tensors, still empty, and the pieces that fill them."""
        tensors = [self._empty(file, name, device) for name in names]
        stored = sorted(
            ((file.tensors[name], tensor) for name, tensor in zip(names, tensors, strict=True) if tensor.nbytes),
            key=lambda each: each[0].start,
        )
        return tensors, _pieces((found.start, tensor.reshape(-1).view(self._torch.uint8)) for found, tensor in stored)

    def _empty(self, file: WeightsFile, name: str, device: str) -> Any:
        stored = file.tensors[name]
        dtype = self.dtype(stored)
        if dtype is None or math.prod(stored.shape) * dtype.itemsize != stored.size:
            what = f"{stored.dtype} of {list(stored.shape)} in {stored.size} bytes"
            raise WeightsError(f"{file.path} is not a safetensors file that can be read: {name!r} is {what}")
        return self._torch.empty(stored.shape, dtype=dtype, device=device)

    def _warm_up(self, size: int, device: str) -> None:
        """Take the memory from the device at once, for torch's allocator to give out: one call, and not hundreds."""
        if device.startswith("cuda"):
            with contextlib.suppress(self._torch.cuda.OutOfMemoryError):  # in parts it may still be had
                self._torch.empty(size, dtype=self._torch.uint8, device=device)

    def _work(self, file: WeightsFile, pieces: Iterator[_Piece], lanes: queue.LifoQueue[_Lane]) -> None:
        lane, size = lanes.get(), 0
        try:
            lane.begin()
            try:
                for piece in pieces:
                    lane.read(file, piece)
                    size += piece.size
            finally:
                lane.end()
        finally:
            lanes.put(lane)
        with self._counting:
            self.read_bytes += size


class _Shared:
    """Pieces that several readers take from."""

    def __init__(self, pieces: Iterable[_Piece]) -> None:
        self._pieces = deque(pieces)

    def __iter__(self) -> Iterator[_Piece]:
        return self

    def __next__(self) -> _Piece:
        try:
            return self._pieces.popleft()  # atomic
        except IndexError:
            raise StopIteration from None

    def stop(self) -> None:
        self._pieces.clear()


def _lanes(count: int, stream: Callable[[], CopyStream] | None) -> queue.LifoQueue[_Lane]:
    """The last used comes first: what needs one has one pair of buffers."""
    lanes: queue.LifoQueue[_Lane] = queue.LifoQueue()
    for _ in range(count):
        lanes.put(_Straight() if stream is None else _Buffered(stream()))
    return lanes


def _pieces(tensors: Iterable[tuple[int, Any]]) -> list[_Piece]:
    """Of flat tensors of bytes, each with where it starts, in that order."""
    pieces: list[_Piece] = []
    for start, flat in tensors:
        done = 0
        while done < flat.nbytes:
            last = pieces[-1] if pieces else None
            follows = last is not None and last.start + last.size == start + done and len(last.parts) < _PARTS
            if last is None or not follows or last.size == PIECE:
                pieces.append(last := _Piece(start + done))
            size = min(PIECE - last.size, flat.nbytes - done)
            last.parts.append(flat[done : done + size])
            last.size += size
            done += size
    return pieces


def _memory(flat: Any) -> memoryview:
    """Of a tensor of bytes on the CPU."""
    return memoryview(flat.numpy())
