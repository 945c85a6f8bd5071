"""The words in which lanes, commands and residency speak of models on executors.

Owns: nothing.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Protocol

from gen_worker.pipe.messages import Failure
from supervisor.executor_handle import ExecutorHandle

ModelKey = tuple[str, str]
"""(model id, qualified type name)."""


class Residence(Enum):
    LOADING = "loading"
    HOT = "hot"
    UNLOADING = "unloading"


class Room(IntEnum):
    """What a load would find, the best first."""

    FREE = 0
    EVICT = 1
    """There is room when idle models leave."""
    BUSY = 2
    """What would have to leave is in use, or something is under way."""
    NONE = 3


class Outcome(Enum):
    """Of what an executor answered to a load."""

    LOADED = "loaded"
    FAILED = "failed"
    NOTHING = "nothing"
    """It is tried again, or was not asked for."""


class ModelMoves(Protocol):
    """Who is told of what the executors' models do by themselves.

    Never called from within a call to residency, but for `load_started`.
    """

    def load_started(self, handle: ExecutorHandle, model_id: str) -> None:
        """It was told to; nothing is to be asked of residency in return."""

    def load_refused(self, handle: ExecutorHandle, key: ModelKey, failure: Failure) -> None:
        """The load was not even tried."""

    def models_moved(self) -> None:
        """Something is possible that was not."""
