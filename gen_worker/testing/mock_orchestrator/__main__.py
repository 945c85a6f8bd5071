"""`python -m gen_worker.testing.mock_orchestrator`."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
