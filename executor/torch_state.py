"""What is known of torch and of CUDA without importing either.

Owns: nothing. An executor whose functions need no torch never pays for its import.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any, Final

from gen_worker.pipe.messages import CudaUse

_DRIVER: Final = "libcuda.so.1"


def initialized_cuda() -> Any | None:
    """torch.cuda, once something has made a CUDA context with it; else None."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)  # torch lacks it while it is being imported
    is_initialized = getattr(cuda, "is_initialized", None)
    return cuda if is_initialized is not None and is_initialized() else None


def cuda_use() -> CudaUse:
    """What this process has made of CUDA, by whichever library. Nothing is made of it here."""
    if initialized_cuda() is not None:
        return "context"
    try:
        driver = ctypes.CDLL(_DRIVER, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return ""  # nobody has loaded it
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ""  # CUDA_ERROR_NOT_INITIALIZED: it is loaded, and no more
    for ordinal in range(count.value):
        flags, active = ctypes.c_uint(), ctypes.c_int()
        failed = driver.cuDevicePrimaryCtxGetState(ordinal, ctypes.byref(flags), ctypes.byref(active))
        if not failed and active.value:
            return "context"
    return "driver"
