"""What is known of torch without importing it.

Owns: nothing. An executor whose functions need no torch never pays for its import.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any


def initialized_cuda() -> Any | None:
    """torch.cuda, once something has made a CUDA context with it; else None."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)  # torch lacks it while it is being imported
    is_initialized = getattr(cuda, "is_initialized", None)
    return cuda if is_initialized is not None and is_initialized() else None


def cuda_version() -> str | None:
    """The CUDA version that the installed torch was built for, from the text of its version.py; None: built without."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("version.py")
    if not path.is_file():
        return None
    for statement in ast.parse(path.read_text()).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        value = getattr(statement, "value", None)
        if "cuda" in names and isinstance(value, ast.Constant) and isinstance(value.value, str):
            return value.value
    return None
