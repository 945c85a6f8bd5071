"""What holds for the whole suite: Hypothesis's settings, and `--transport`.

How long one example takes says nothing on a machine that does other things too, so Hypothesis sets no deadline.

`--transport` is what the workers of the process tests use to speak to their scheduler.

Tests of the transports themselves and of the session always try both. A test that starts a worker uses grpcio's, or
both when it is marked `both_transports`; the option decides for all of them.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("suite", parent=settings.default, deadline=None)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--transport",
        choices=("grpcio", "h2", "both"),
        help="what all workers use to speak to their scheduler; else grpcio, and both in tests that are marked so",
    )
