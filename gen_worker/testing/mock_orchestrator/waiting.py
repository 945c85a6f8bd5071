"""Waiting for conditions over what arrives.

Owns: who waits for what. Conditions are plain functions, looked at whenever something happened: no polling.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from .errors import WaitTimeoutError

T = TypeVar("T")


class _Waiter(Generic[T]):
    """Someone who waits for `check` to give something true."""

    def __init__(self, check: Callable[[], T | None]) -> None:
        self.check = check
        self.future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def look(self) -> None:
        if self.future.done():
            return
        try:
            value = self.check()
        except Exception as error:  # noqa: BLE001  (the caller's own check failed: the caller gets it)
            self.future.set_exception(error)
            return
        if value:
            self.future.set_result(value)


class Waiters:
    """Those who wait; false when there are none."""

    def __init__(self) -> None:
        self._waiters: list[_Waiter[Any]] = []

    def __bool__(self) -> bool:
        return bool(self._waiters)

    def look(self) -> None:
        """Something happened."""
        for waiter in self._waiters:
            waiter.look()

    async def wait(self, check: Callable[[], T | None], timeout: float, what: str) -> T:
        """What `check()` gives as soon as that is true. Raises WaitTimeoutError, which names `what`."""
        waiter = _Waiter(check)
        waiter.look()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout):
                return await waiter.future
        except TimeoutError:
            raise WaitTimeoutError(f"{what} did not come within {timeout:g} s") from None
        finally:
            self._waiters.remove(waiter)
