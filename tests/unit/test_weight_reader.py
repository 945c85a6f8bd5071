"""Reading weights from disk: every kind of tensor, by pieces of every size, straight and through buffers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from executor import weight_reader
from executor.weight_reader import CopyStream, WeightReader
from gen_worker.weights import WeightsError
from tests.support.copy_stream import DeferredStream

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

WAYS = pytest.mark.parametrize("stream", [None, DeferredStream], ids=["straight", "buffered"])
Stream = Callable[[], CopyStream] | None


def bits(tensor: Any) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tensor of every dtype, of lengths that leave the next one unaligned, and the odd ones."""
    path = tmp_path_factory.mktemp("weights") / "all.safetensors"
    torch.manual_seed(0)
    made = {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 7), "flag": torch.tensor(data=True)}
    for number, name in enumerate(sorted(set(weight_reader._DTYPES.values()))):
        dtype = getattr(torch, name)
        raw = torch.randint(0, 2 if name == "bool" else 256, ((number + 3) * 3 * dtype.itemsize,), dtype=torch.uint8)
        made[name] = raw.view(dtype).reshape(number + 3, 3)
    safetensors_torch.save_file(made, path, metadata={"format": "pt"})
    return path


def write(path: Path, header: dict[str, Any], data: bytes = b"") -> Path:
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


@WAYS
@pytest.mark.parametrize("piece", [1, 7, 64, 2**20])
def test_every_dtype_comes_as_the_library_reads_it(
    weights: Path, piece: int, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_reader, "PIECE", piece)
    monkeypatch.setattr(weight_reader, "_PARTS", 3)
    with WeightReader("cpu", stream=stream) as reader:
        file = reader.open(weights)
        found = reader.load_all(file, list(file.tensors))
        alone = {name: reader.load(file, name) for name in file.tensors}
    with safetensors_torch.safe_open(weights, "pt") as opened:
        expected = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    assert list(found) == list(file.tensors)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        for mine in (found[name], alone[name]):
            assert (mine.dtype, mine.shape, mine.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
            assert bits(mine) == bits(tensor), name
            assert mine._base is None, "a tensor of its own, whose memory goes with it"
            assert mine.data_ptr() % 64 == 0, "whatever its offset in the file"
    assert reader.read_bytes == 2 * sum(tensor.nbytes for tensor in expected.values())


def test_host_memory_is_bounded_by_the_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_reader, "PIECE", 1000)
    made: list[DeferredStream] = []

    def stream() -> DeferredStream:
        made.append(DeferredStream())
        return made[-1]

    path = tmp_path / "large.safetensors"
    large = torch.arange(100_000, dtype=torch.int32)
    safetensors_torch.save_file({"large": large}, path)
    with WeightReader("cpu", stream=stream) as reader:
        file = reader.open(path)
        with ThreadPoolExecutor(12) as pool:
            loads = [pool.submit(reader.load, file, "large") for _ in range(12)]
            assert all(torch.equal(load.result(), large) for load in loads)
        assert torch.equal(reader.load_all(file, ["large"])["large"], large)
    assert sum(len(each.buffers) for each in made) <= 2 * weight_reader.READERS
    assert {buffer.nbytes for each in made for buffer in each.buffers} == {1000}


def test_a_file_with_nothing_in_it(tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    safetensors_torch.save_file({}, path)
    with WeightReader("cpu") as reader:
        assert reader.load_all(reader.open(path), []) == {}


def tensor(dtype: str = "F32", shape: tuple[Any, ...] = (2,), offsets: tuple[int, ...] = (0, 8)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (tensor(), b"1234", "is not whole: by its header it has 77 bytes, on disk are 73"),
        (tensor(), b"123456789", "is not whole"),
        (tensor(offsets=(8, 0)), b"", "'a' ends before it starts"),
        (tensor(offsets=(-8, 0)), b"", "is not a safetensors file"),
        (tensor(offsets=(0,)), b"", "is not a safetensors file"),
        (tensor(shape=(-2,)), b"12345678", "is not a safetensors file"),
        (tensor(shape=("2",)), b"12345678", "is not a safetensors file"),
        ({"a": {"dtype": "F32"}}, b"", "is not a safetensors file"),
        ({"a": 5}, b"", "is not a safetensors file"),
    ],
)
def test_a_header_that_is_wrong_names_the_file(tmp_path: Path, header: Any, data: bytes, words: str) -> None:
    path = write(tmp_path / "broken.safetensors", header, data)
    with WeightReader("cpu") as reader, pytest.raises(WeightsError) as caught:
        reader.open(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 8, b"\x10\x00\x00\x00\x00\x00\x00\x00{}", b"\0" * 8])
def test_what_is_no_header_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with WeightReader("cpu") as reader, pytest.raises(WeightsError, match=r"broken\.safetensors is not a safetensors"):
        reader.open(path)


@pytest.mark.parametrize(("dtype", "shape"), [("F32", (3,)), ("F32", ()), ("F99", (2,)), ("F4", (16,))])
def test_what_a_tensor_can_not_be_names_file_and_tensor(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    path = write(tmp_path / "broken.safetensors", tensor(dtype, shape), b"12345678")
    with WeightReader("cpu") as reader:
        file = reader.open(path)
        assert reader.can_read(file.tensors["a"]) is (dtype == "F32")
        for load in (lambda: reader.load(file, "a"), lambda: reader.load_all(file, ["a"])):
            with pytest.raises(WeightsError, match=r"broken\.safetensors .*'a' is F"):
                load()


@WAYS
def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_reader, "PIECE", 100)
    path = tmp_path / "cut.safetensors"
    safetensors_torch.save_file({"a": torch.zeros(1000), "b": torch.zeros(1000)}, path)
    with WeightReader("cpu", stream=stream) as reader:
        file = reader.open(path)
        with path.open("r+b") as opened:
            opened.truncate(5000)
        for _ in range(2):  # the readers are as good as before
            with pytest.raises(WeightsError, match=r"cut\.safetensors ends at byte 5000: it was cut"):
                reader.load_all(file, ["a", "b"])
        assert not reader.load(file, "a").any()


def test_an_error_of_the_device_stops_all_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_reader, "PIECE", 100)
    copies: list[int] = []
    lock = threading.Lock()

    class Failing(DeferredStream):
        def copy(self, target: Any, source: Any) -> None:
            with lock:
                copies.append(1)
                if len(copies) == 5:
                    raise RuntimeError("CUDA error: an illegal memory access was encountered")
            super().copy(target, source)

    path = tmp_path / "large.safetensors"
    safetensors_torch.save_file({"a": torch.zeros(1_000_000)}, path)
    with WeightReader("cpu", stream=Failing) as reader:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            reader.load_all(reader.open(path), ["a"])
        assert len(copies) < 40_000, "what was left is not read"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_descriptors_are_closed_with_the_reader(weights: Path) -> None:
    with WeightReader("cpu") as reader:
        file = reader.open(weights)
    with pytest.raises(OSError, match="Bad file descriptor"):
        reader.load(file, "scalar")
