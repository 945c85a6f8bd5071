"""What the installed torch was built for, without importing it.

Owns: nothing. Importing torch takes seconds and hundreds of MB, in processes that only report of it.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path


def torch_version() -> str | None:
    """torch.__version__, with the build that it is of (2.9.0+cu128): its package's metadata may leave that out."""
    return _assigned("__version__")


def cuda_version() -> str | None:
    """The CUDA version that the installed torch was built for; None: built without."""
    return _assigned("cuda")


def _assigned(name: str) -> str | None:
    """The text that the installed torch's version.py gives a name; None: no torch, or no text."""
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
        if name in names and isinstance(value, ast.Constant) and isinstance(value.value, str):
            return value.value
    return None
