"""From a model's local files to the object that is injected.

Owns: the order of ways (the files themselves, a registered loader, from_pretrained) and the check of what came out.
pretrained.py knows what each library's from_pretrained takes, weight_seams.py how it reads.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from executor.pretrained import arguments, is_factory
from executor.weight_seams import reading_straight
from gen_worker.context import ActionContext
from gen_worker.errors import FatalError, WorkerError
from gen_worker.injection import ModelArtifacts, find_runtime_loader, qualified_name
from gen_worker.types import Asset

log = logging.getLogger(__name__)


class LoadingHost:
    """RunHost of a loader's context: a load belongs to no run, so what it emits goes to the log."""

    def emit(self, event_type: str, payload_json: bytes) -> None:
        log.info("%s %s", event_type, payload_json.decode())

    def store(self, ref: str, source: bytes | Path, *, create: bool) -> Asset:  # noqa: ARG002  # the protocol's
        raise WorkerError(f"{ref!r} can't be stored while a model is loaded: files belong to a run")


def load_object(type_: type, artifacts: ModelArtifacts, device: str) -> object:
    """The object that parameters of `type_` get. Raises FatalError, and whatever the loader raises."""
    if type_ is ModelArtifacts:
        return artifacts
    if not artifacts.root_dir.is_dir():
        raise FatalError(f"there is no directory {artifacts.root_dir}")
    loader = find_runtime_loader(type_)
    if loader is not None:
        context = ActionContext(run_id="", host=LoadingHost(), device=device)
        loaded = loader(context, artifacts)
    elif hasattr(type_, "from_pretrained"):
        loaded = _from_pretrained(type_, artifacts.root_dir, device)
    else:
        raise FatalError(
            f"{qualified_name(type_)} has neither a registered loader nor from_pretrained: register one with "
            "register_runtime_loader or name one in WORKER_RUNTIME_LOADERS_JSON"
        )
    if not is_factory(type_) and not isinstance(loaded, type_):
        raise FatalError(f"loading made a {qualified_name(type(loaded))}, the parameter is a {qualified_name(type_)}")
    return loaded


def _from_pretrained(type_: Any, root: Path, device: str) -> Any:
    found = arguments(type_, root, device)
    dtype = found.get("dtype", found.get("torch_dtype"))
    with contextlib.ExitStack() as stack:
        if "device_map" in found:  # else the library puts the weights on the CPU, and they are moved below
            stack.enter_context(reading_straight(root, device, dtype))
        loaded = type_.from_pretrained(str(root), **found)
    if callable(getattr(loaded, "to", None)):
        moved = loaded.to(device)  # nothing is left to move where the library has put it there itself
        loaded = loaded if moved is None else moved
    if callable(getattr(loaded, "eval", None)):
        loaded.eval()
    return loaded
