"""What makes an executor slow to start: with bench_functions, a tenant that imports torch."""

from __future__ import annotations

import importlib

importlib.import_module("torch")
