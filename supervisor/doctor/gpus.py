"""The driver, NVML, what CUDA may see, and whether torch goes with it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from supervisor.config import child_environment
from supervisor.devices import CpuProbe, DeviceError, DeviceProbe, SimulatedProbe, open_probe
from supervisor.doctor.findings import Finding, Host

DRIVER_FILE: Final = Path("/proc/driver/nvidia/version")
TORCH_S: Final = 90.0
"""A first import from a cold network disk takes its time."""
LITTLE_FREE: Final = 0.5
DRIVER_CUDA: Final = ((13, 580), (12, 525), (11, 450))
"""CUDA major version -> the oldest driver branch that runs it, from NVIDIA's table of minor version compatibility."""

_TORCH_PROGRAM: Final = """
import json, sys
try:
    import torch
except ImportError as error:
    print(json.dumps({"missing": str(error)}))
    sys.exit()
cuda = torch.version.cuda
found = {"version": torch.__version__, "cuda": cuda, "available": False, "problem": "", "count": 0, "archs": []}
if cuda:
    found["archs"] = torch.cuda.get_arch_list()
    try:
        found["count"] = torch.cuda.device_count()
        torch.cuda.init()
        found["available"] = True
    except (RuntimeError, AssertionError) as error:
        found["problem"] = str(error).strip().splitlines()[0]
print(json.dumps(found))
"""


class Torch(msgspec.Struct, frozen=True):
    """What a Python of its own said about torch."""

    missing: str = ""
    version: str = ""
    cuda: str | None = None
    available: bool = False
    problem: str = ""
    count: int = 0
    archs: list[str] = []


def check_gpus(host: Host) -> list[Finding]:
    """All about GPUs, from the kernel's driver up to torch."""
    findings, probe = _probe(host)
    if probe is None:
        return findings
    findings += _visibility(host, probe)
    for device in probe.devices:
        if device.is_gpu:
            findings.append(_memory(probe, device))
    return [*findings, *check_torch(host, probe)]


def check_torch(host: Host, probe: DeviceProbe, torch: Torch | None = None) -> list[Finding]:
    """Torch against driver and cards. `torch`: what is known of it; None: a process is asked."""
    real = not isinstance(probe, (CpuProbe, SimulatedProbe))
    torch = torch or ask_torch(child_environment(host.environ, host.settings))
    if torch.missing:
        todo = "functions with models need it: pip install torch"
        return [Finding("warning" if real else "note", "torch", f"not here: {torch.missing}", todo)]
    words = f"{torch.version}, {f'built for CUDA {torch.cuda}' if torch.cuda else 'a CPU build'}"
    trouble = _trouble(torch, probe) if real else None
    if torch.problem and not torch.version:
        return [Finding("broken", "torch", torch.problem, "install torch again, of the build for this host")]
    if trouble is not None:
        what, todo = trouble
        return [Finding("broken", "torch", f"{words}: {what}", todo)]
    return [Finding("ok", "torch", f"{words}, sees {torch.count} GPUs" if real else words)]


def _trouble(torch: Torch, probe: DeviceProbe) -> tuple[str, str] | None:
    """Why this torch can't use these GPUs, and what to do."""
    if not torch.cuda:
        return "on a host with GPUs functions would run on the CPU", "install torch's CUDA build"
    if old := _driver_too_old(probe.driver_version, torch.cuda):
        return old, "update the driver, or install torch for an older CUDA"
    if not torch.available:
        return f"can't use the GPUs: {torch.problem}", "look at dmesg for Xid errors, and at nvidia-smi"
    unsupported = sorted({device.sm for device in probe.devices if not _built_for(torch.archs, device.sm)})
    if unsupported:
        return f"not built for sm_{', sm_'.join(unsupported)}", "install a torch that is built for these cards"
    return None


def ask_torch(environ: Mapping[str, str], program: str = _TORCH_PROGRAM) -> Torch:
    """Import torch in a process of its own: here it would cost 200 MB and maybe the command."""
    try:
        ended = subprocess.run(  # noqa: S603  (this interpreter, and a program of ours)
            [sys.executable, "-P", "-c", program],
            env=dict(environ), capture_output=True, text=True, timeout=TORCH_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Torch(problem=f"its import did not end within {TORCH_S:g} s")
    lines = ended.stdout.strip().splitlines()
    try:
        return msgspec.json.decode(lines[-1] if lines else "", type=Torch)
    except msgspec.DecodeError:
        last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Torch(problem=f"its import ended with {ended.returncode}: {last[:200]}")


def _probe(host: Host) -> tuple[list[Finding], DeviceProbe | None]:
    settings = host.settings
    try:
        probe = open_probe(
            gpus=settings.gpus,
            visible=host.environ.get("CUDA_VISIBLE_DEVICES"),
            executors=settings.executors,
            fake_count=settings.fake_gpu_count,
            fake_memory_bytes=settings.fake_gpu_memory_bytes,
            fake_name=settings.fake_gpu_name,
            held=lambda _: 0,
        )
    except DeviceError as error:
        return [
            Finding("broken", "GPUs", str(error), "correct WORKER_GPUS or CUDA_VISIBLE_DEVICES, see nvidia-smi")
        ], None
    if isinstance(probe, SimulatedProbe):
        return [
            Finding("note", "driver", "GPUs are simulated: WORKER_FAKE_GPU_COUNT is set", "unset it in production")
        ], probe
    if not isinstance(probe, CpuProbe):
        return [Finding("ok", "driver", f"NVIDIA {probe.driver_version}, NVML answers")], probe
    if DRIVER_FILE.exists():
        finding = Finding(
            "broken", "driver", "the kernel has NVIDIA's driver, but NVML finds no GPU that may be used",
            "in a container: --gpus all and NVIDIA's container toolkit; else reboot after a driver update",
        )  # fmt: skip
        return [finding], probe
    return [Finding("note", "driver", "no NVIDIA driver here: functions run on the CPU")], probe


def _visibility(host: Host, probe: DeviceProbe) -> list[Finding]:
    visible = host.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [device for device in probe.devices if device.is_gpu]
    limits = [
        words
        for words in (
            f"CUDA_VISIBLE_DEVICES={visible}" if visible is not None else "",
            f"WORKER_GPUS={','.join(host.settings.gpus)}" if host.settings.gpus else "",
        )
        if words
    ]
    because = f" ({', '.join(limits)})" if limits else ""
    if gpus:
        names = ", ".join(f"{device.name} {device.uuid}" for device in gpus)
        return [Finding("ok", "CUDA", f"one executor for each of {len(gpus)} GPUs{because}: {names}")]
    if visible is not None and DRIVER_FILE.exists():
        todo = "unset it: the worker gives each executor its own"
        return [Finding("broken", "CUDA", f"CUDA_VISIBLE_DEVICES={visible} hides all GPUs", todo)]
    return [Finding("ok", "CUDA", f"{len(probe.devices)} executors on the CPU")]


def _memory(probe: DeviceProbe, device: Any) -> Finding:
    name = f"memory of {device.uuid}"
    try:
        memory = probe.memory(device)
    except DeviceError as error:
        return Finding("broken", name, str(error), "look at dmesg for Xid errors; the card may need a reset")
    words = f"{memory.free_bytes / 2**30:.1f} of {device.memory_bytes / 2**30:.1f} GiB free"
    if memory.free_bytes < LITTLE_FREE * device.memory_bytes:
        return Finding("warning", name, words, "other processes use it (or a worker that runs): see nvidia-smi")
    return Finding("ok", name, words)


def _driver_too_old(driver: str, cuda: str) -> str:
    """Words, when this driver does not run that CUDA; "" when it does or nobody knows."""
    branch, major = _first_number(driver), _first_number(cuda)
    for needs, oldest in DRIVER_CUDA:
        if major == needs and branch is not None and branch < oldest:
            return f"driver {driver} is older than {oldest}, which CUDA {needs} needs"
    return ""


def _first_number(version: str) -> int | None:
    matched = re.match(r"\d+", version)
    return int(matched.group()) if matched else None


def _built_for(archs: list[str], sm: str) -> bool:
    """Machine code runs within its major version, on the same minor or a later one; PTX on anything later."""
    if not archs:
        return True
    for arch in archs:
        kind, _, number = arch.rstrip("af").partition("_")
        if not number.isdigit():
            continue
        if kind == "compute" and int(number) <= int(sm):
            return True
        if kind == "sm" and number[:-1] == sm[:-1] and int(number) <= int(sm):
            return True
    return False
