"""Finding and importing a tenant's modules.

Owns: where a project keeps its code, and how an import failure reads. Both layouts are looked at: modules and
packages in the project's root, and in its `src` folder. Only files whose text names one of the decorators are
imported, so scripts and tests that lie beside are not run by looking for functions.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Final

from gen_worker.errors import ProjectError

_DECORATORS: Final = (b"worker_function", b"worker_websocket")
_SKIPPED_FOLDERS: Final = frozenset(
    {"tests", "test", "docs", "examples", "benchmarks", "build", "dist", "node_modules", "site-packages", "venv"}
)
_SKIPPED_FILES: Final = frozenset({"setup.py", "conftest.py", "noxfile.py"})


def import_roots(project_root: str | Path) -> tuple[Path, ...]:
    """The folders that must be on sys.path for the project's modules: `src` where there is one, and the root."""
    root = Path(project_root).resolve()
    source = root / "src"
    return (source, root) if source.is_dir() and not (source / "__init__.py").exists() else (root,)


def find_modules(project_root: str | Path) -> tuple[str, ...]:
    """The dotted names of the modules that mention a decorator, sorted, `src` first. Imports nothing."""
    roots = import_roots(project_root)
    names: dict[str, None] = {}
    for root in roots:
        nested = {other for other in roots if other != root}
        for path in sorted(_python_files(root, nested)):
            if any(word in path.read_bytes() for word in _DECORATORS):
                names.setdefault(_module_name(path.relative_to(root)))
    return tuple(names)


def import_modules(names: Iterable[str]) -> tuple[ModuleType, ...]:
    """Import by name, in order. Raises ProjectError in one line: module, error, and the file and line that raised."""
    modules = []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except (Exception, SystemExit) as error:
            raise ProjectError(f"module {name!r} does not import: {_describe(error)}") from error
    return tuple(modules)


@contextlib.contextmanager
def importable(project_root: str | Path, names: Sequence[str]) -> Iterator[None]:
    """Within it the project's modules import as in a fresh process; after it sys.path and sys.modules are as before.

    Modules of other projects that have the same top-level names are set aside meanwhile. What the project imported
    from elsewhere stays: libraries such as torch can't be imported twice. Not for use by two threads at once.
    """
    roots = import_roots(project_root)
    top_level = {name.partition(".")[0] for name in names}
    if shadowed := sorted(top_level & sys.stdlib_module_names):
        raise ProjectError(f"module {shadowed[0]!r} has the name of a standard module: rename it")
    aside = {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] in top_level and not _lies_in(module, roots)
    }
    before, path = set(sys.modules) - set(aside), list(sys.path)
    for name in aside:
        del sys.modules[name]
    sys.path[:0] = map(str, roots)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in top_level or _lies_in(sys.modules[name], roots):
                del sys.modules[name]
        sys.modules.update(aside)
        sys.path[:] = path


def _python_files(root: Path, nested: set[Path]) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = [name for name in folders if _is_searched(here / name) and here / name not in nested]
        for name in files:
            stem, _, extension = name.partition(".")
            is_test = name in _SKIPPED_FILES or stem.startswith("test_") or stem.endswith("_test")
            if extension == "py" and stem.isidentifier() and not is_test:
                yield here / name


def _is_searched(folder: Path) -> bool:
    is_other_project = (folder / "pyvenv.cfg").exists() or (folder / "pyproject.toml").exists()
    return folder.name.isidentifier() and folder.name not in _SKIPPED_FOLDERS and not is_other_project


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _lies_in(module: ModuleType, roots: tuple[Path, ...]) -> bool:
    """Whether a module's file is the project's own; what is installed in a venv inside of it is not."""
    file = getattr(module, "__file__", None)
    if file is None:
        return False
    return any(Path(file).is_relative_to(root) for root in roots) and "site-packages" not in Path(file).parts


def _describe(error: BaseException) -> str:
    """`Type: message (file:line)`, the place being the last one that is not the import system's."""
    message = " ".join(str(error).split())
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if isinstance(error, SyntaxError):
        return text  # its message ends with the place
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    place = frames[-1] if len(frames) > 1 else None  # the first is our own
    return f"{text} ({place.filename}:{place.lineno})" if place else text
