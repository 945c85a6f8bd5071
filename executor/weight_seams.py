"""Where the libraries read weights while one of their models is loaded to a GPU: there our reader takes over.

Owns: which functions of transformers and diffusers stand aside, and for what. All else (which class, which files,
renamed, converted and tied weights, buffers that no file has) stays the libraries' work, so what comes out is what
from_pretrained makes, to the bit.

- transformers opens each file with `safe_open` and asks for each tensor as a whole slice, on some threads.
- diffusers reads each file by its own `load_state_dict`.

Both then move what they got to the device, where ours is already. Tensors of another dtype than the model is loaded in
come on the CPU, where the library would convert them, too: on the device both would need room.

The names are exchanged for the length of one load, and answer as ever to every other thread. A version of a library
that is not known to read in this way, and a quantized model, are left to the library alone. So is a load to the CPU:
there the libraries map the files and copy nothing, which no reader beats.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Self

import msgspec

from executor.weight_reader import CopyStream, WeightReader, WeightsFile
from gen_worker.weights import StoredTensor

log = logging.getLogger(__name__)

_KNOWN: Final = {"transformers": "5", "diffusers": "0"}
"""The major version that reads as said above."""
_FLOATS: Final = ("F64", "F32", "F16", "BF16")


@contextlib.contextmanager
def reading_straight(
    root: Path, device: str, dtype: Any, *, stream: Callable[[], CopyStream] | None = None
) -> Iterator[WeightReader | None]:
    """While a model in `root` is loaded to `device` in `dtype` by this thread; None when nothing is exchanged.

    `stream` is for a device that is not a GPU.
    """
    if stream is None and not device.startswith("cuda"):
        yield None
        return
    if dtype is None or _is_quantized(root):
        log.debug("%s is left to the library to read: its weights are quantized, or of no dtype that is known", root)
        yield None
        return
    started = time.perf_counter()
    with WeightReader(device, stream=stream) as reader, contextlib.ExitStack() as stack:
        seam = _Seam(reader, dtype)
        names = [name for name, exchange in _EXCHANGES.items() if _exchanged(name, exchange, seam, stack)]
        yield reader
    seconds = time.perf_counter() - started
    log.debug("%s: %d bytes of %s read in %.3f s", root, reader.read_bytes, " and ".join(names), seconds)


class _Seam:
    """One load: its reader, its thread, and what goes straight to the device."""

    def __init__(self, reader: WeightReader, dtype: Any) -> None:
        self.reader = reader
        self._dtype = dtype
        self._thread = threading.get_ident()

    @property
    def is_ours(self) -> bool:
        return threading.get_ident() == self._thread

    def to_cpu(self, stored: StoredTensor) -> bool:
        return stored.dtype in _FLOATS and self.reader.dtype(stored) is not self._dtype


# -- transformers ---------------------------------------------------------------------------------


class _OpenFile:
    """What safe_open gives, but for whole slices."""

    def __init__(self, opened: Any, file: WeightsFile, seam: _Seam) -> None:
        self._opened = opened
        self._file = file
        self._seam = seam

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def __enter__(self) -> Self:
        self._opened.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.__exit__(*exception)

    def get_slice(self, name: str) -> Any:
        found = self._opened.get_slice(name)
        readable = self._seam.reader.can_read(self._file.tensors[name])
        return _Slice(found, name, self._file, self._seam) if readable else found


class _Slice:
    def __init__(self, found: Any, name: str, file: WeightsFile, seam: _Seam) -> None:
        self._found = found
        self._name = name
        self._file = file
        self._seam = seam

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found, name)

    def __getitem__(self, index: Any) -> Any:
        if index is not Ellipsis:
            return self._found[index]
        to_cpu = self._seam.to_cpu(self._file.tensors[self._name])
        return self._seam.reader.load(self._file, self._name, to_cpu=to_cpu)


def _exchange_safe_open(seam: _Seam, stack: contextlib.ExitStack) -> bool:
    modeling = importlib.import_module("transformers.modeling_utils")
    original: Any = getattr(modeling, "safe_open", None)
    if original is None:
        return False

    def safe_open(filename: Any, *arguments: Any, **options: Any) -> Any:
        if not seam.is_ours or options.get("device", "cpu") != "cpu":
            return original(filename, *arguments, **options)
        file = seam.reader.open(Path(filename))  # first: its errors name the file
        return _OpenFile(original(filename, *arguments, **options), file, seam)

    _exchange(modeling, "safe_open", safe_open, stack)
    return True


# -- diffusers ------------------------------------------------------------------------------------


def _exchange_load_state_dict(seam: _Seam, stack: contextlib.ExitStack) -> bool:
    places = [importlib.import_module(f"diffusers.models.{name}") for name in ("model_loading_utils", "modeling_utils")]
    found = {getattr(place, "load_state_dict", None) for place in places}
    original: Any = found.pop()
    if found or original is None:
        return False

    def load_state_dict(checkpoint_file: Any, *arguments: Any, **options: Any) -> Any:
        is_plain = not arguments and not any(options.values()) and str(checkpoint_file).endswith(".safetensors")
        if not seam.is_ours or not is_plain:
            return original(checkpoint_file, *arguments, **options)
        file = seam.reader.open(Path(checkpoint_file))
        if not all(map(seam.reader.can_read, file.tensors.values())):
            return original(checkpoint_file, *arguments, **options)
        return _state_dict(file, seam)

    for place in places:
        _exchange(place, "load_state_dict", load_state_dict, stack)
    return True


def _state_dict(file: WeightsFile, seam: _Seam) -> dict[str, Any]:
    """All tensors of a file, in the order of its header."""
    to_cpu = {name: seam.to_cpu(stored) for name, stored in file.tensors.items()}
    found: dict[str, Any] = {}
    for where in set(to_cpu.values()):
        found |= seam.reader.load_all(file, [name for name in to_cpu if to_cpu[name] is where], to_cpu=where)
    return {name: found[name] for name in file.tensors}


# -- both -----------------------------------------------------------------------------------------

_EXCHANGES: Final[dict[str, Callable[[_Seam, contextlib.ExitStack], bool]]] = {
    "transformers": _exchange_safe_open,
    "diffusers": _exchange_load_state_dict,
}


def _exchange(place: ModuleType, name: str, value: Any, stack: contextlib.ExitStack) -> None:
    stack.callback(setattr, place, name, getattr(place, name))
    setattr(place, name, value)


def _exchanged(
    library: str, exchange: Callable[[_Seam, contextlib.ExitStack], bool], seam: _Seam, stack: contextlib.ExitStack
) -> bool:
    try:
        return _is_known(library) and exchange(seam, stack)
    except Exception as error:  # noqa: BLE001  # importing it may raise anything, and the model may not need it
        log.warning("%s reads its weights itself: %r", library, error)
        return False


def _is_known(library: str) -> bool:
    """Whether it is installed in a version that reads as we think; no other is touched."""
    if importlib.util.find_spec(library) is None:
        return False
    version = str(importlib.import_module(library).__version__)
    if version.partition(".")[0] == _KNOWN[library]:
        return True
    log.debug("%s %s is not known: it reads its weights itself", library, version)
    return False


def _is_quantized(root: Path) -> bool:
    """Whether the config of the model, or of a component, says so."""
    return any(_has_quantization(path) for path in (root / "config.json", *root.glob("*/config.json")))


def _has_quantization(path: Path) -> bool:
    try:
        return "quantization_config" in msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return False  # the library will say what is wrong with it
