"""What is known of torch without importing it.

Owns: nothing. An executor whose functions need no torch never pays for its import.
"""

from __future__ import annotations

import sys
from typing import Any


def initialized_cuda() -> Any | None:
    """torch.cuda, once something has made a CUDA context with it; else None."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)  # torch lacks it while it is being imported
    is_initialized = getattr(cuda, "is_initialized", None)
    return cuda if is_initialized is not None and is_initialized() else None
