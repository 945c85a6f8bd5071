"""Which errors cost the process, what a failed run keeps alive, and what is known of torch without importing it."""

from __future__ import annotations

import subprocess
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from executor.cuda_faults import is_poisoned
from executor.torch_state import initialized_cuda
from executor.tracebacks import drop_frames


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:  # noqa: BLE001
        return caught


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: device-side assert triggered",
        "CUDA error: unspecified launch failure",
        "CUDA error: uncorrectable ECC error encountered",
    ],
)
def test_sticky_errors_poison(text: str) -> None:
    assert is_poisoned(RuntimeError(text))
    assert is_poisoned(raised(ValueError("drawing failed"), RuntimeError(text)))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: invalid configuration argument"),
        RuntimeError("shapes do not match"),
        ValueError("an illegal memory access was encountered"),
        MemoryError(),
    ],
)
def test_others_do_not(error: BaseException) -> None:
    assert not is_poisoned(error)


class FakeCuda:
    """torch.cuda with a context that answers, or does not."""

    def __init__(self, answer: Exception | None) -> None:
        self._answer = answer

    def is_initialized(self) -> bool:
        return True

    def synchronize(self) -> None:
        if self._answer is not None:
            raise self._answer


@pytest.mark.parametrize(("answer", "expected"), [(None, False), (RuntimeError("CUDA error: whatever"), True)])
def test_the_device_is_asked_about_a_suspicious_error(
    monkeypatch: pytest.MonkeyPatch, answer: Exception | None, expected: bool
) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=FakeCuda(answer)))
    assert is_poisoned(RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx")) is expected


def test_a_message_that_can_not_be_read_is_no_poison(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(RuntimeError):
        def __str__(self) -> str:
            raise KeyError("no")

    assert not is_poisoned(Odd())
    assert "Odd" in caplog.text


def test_half_imported_torch_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    assert initialized_cuda() is None


def test_a_failed_runs_frames_hold_nothing() -> None:
    class Tensor:
        pass

    def work(seen: list[Any]) -> None:
        tensor = Tensor()
        seen.append(weakref.ref(tensor))
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise RuntimeError("outer") from inner

    seen: list[Any] = []
    try:
        work(seen)
    except RuntimeError as error:
        kept = error
    assert seen[0]() is not None
    drop_frames(ExceptionGroup("group", [kept]))
    assert seen[0]() is None


def test_versions_need_no_import_of_torch() -> None:
    torch = pytest.importorskip("torch")
    code = (
        "import sys; from executor.boot import installed_versions; found = installed_versions();"
        "assert 'torch' not in sys.modules; print(found['python'], found.get('torch'), found.get('cuda'))"
    )
    python, torch_version, cuda = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert python == ".".join(map(str, sys.version_info[:3]))
    assert torch_version == torch.__version__
    assert cuda == str(torch.version.cuda)
