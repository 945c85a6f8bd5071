"""The first copy of the environment, in a process of its own: overwriting this one's would help nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SHOW = """
import ctypes, os, subprocess, sys
from pathlib import Path
from supervisor.environ_block import overwrite_values
overwrite_values(sys.argv[1:])
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
sys.stdout.buffer.write(Path("/proc/self/environ").read_bytes())
assert libc.getenv(b"KEPT") == b"kept=with=signs", libc.getenv(b"KEPT")
assert os.environ["KEPT"] == "kept=with=signs"
"""

FORGET = """
import os, subprocess
from supervisor.config import forget_secrets, load_settings, process_environment
environ = process_environment()
forget_secrets(environ, load_settings(environ))
assert environ["AUTH_TOKEN"] == "the-secret-value", "the settings' own copy stays"
print(sorted(name for name in os.environ if name != "LC_CTYPE"))
print(subprocess.run(["cat", "/proc/%d/environ" % os.getpid()], stdout=subprocess.PIPE).stdout)
print(subprocess.run(["env"], stdout=subprocess.PIPE).stdout)
"""


def run(script: str, env: Mapping[str, str], *arguments: str) -> bytes:
    root = str(Path(__file__).resolve().parents[2])
    everything = {"PYTHONPATH": root, "PATH": os.environ["PATH"], **env}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=everything, stdout=subprocess.PIPE, check=True).stdout


def test_values_are_gone_and_all_else_stays() -> None:
    env = {
        "BEFORE": "b",
        "SECRET": "s3cret",
        "KEPT": "kept=with=signs",
        "SECRET_TOO": "sec=ret",
        "EMPTY": "",
        "SECRETLY": "x",
    }
    block = run(SHOW, env, "SECRET", "SECRET_TOO", "EMPTY", "ABSENT")
    assert b"s3cret" not in block
    assert b"sec=ret" not in block
    entries = block.split(b"\0")
    for entry in (b"BEFORE=b", b"KEPT=kept=with=signs", b"SECRET=", b"SECRET_TOO=", b"EMPTY=", b"SECRETLY=x"):
        assert entry in entries
    before = sum(len(name) + len(value) + 2 for name, value in env.items())
    assert len(block) >= before, "the block keeps its size"


def test_a_name_that_is_there_twice_is_overwritten_twice() -> None:
    """A shell can't do it, but exec can: getenv gives the first, /proc shows both."""
    root = str(Path(__file__).resolve().parents[2])
    child = (
        "from supervisor.environ_block import overwrite_values; overwrite_values(['SECRET']);"
        "print(open('/proc/self/environ').read())"
    )
    script = f"""
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
def strings(*items): return (ctypes.c_char_p * (len(items) + 1))(*[item.encode() for item in items], None)
libc.execve({sys.executable!r}.encode(), strings({sys.executable!r}, "-c", {child!r}),
            strings("SECRET=first", "PYTHONPATH={root}", "SECRET=second"))
"""
    shown = run(script, {})
    assert b"PYTHONPATH" in shown
    assert b"first" not in shown
    assert b"second" not in shown


def test_forget_secrets_takes_them_from_this_process_and_from_what_it_starts() -> None:
    env = {
        "AUTH_TOKEN": "the-secret-value",
        "AUTH_TOKEN_FILE": "/run/secrets/token",
        "COPY": "x the-secret-value x",
        "HARMLESS": "yes",
    }
    shown = run(FORGET, env).decode()
    assert "the-secret-value" not in shown
    assert "/run/secrets/token" not in shown
    assert shown.splitlines()[0] == "['HARMLESS', 'PATH', 'PYTHONPATH']"
    assert shown.count("HARMLESS=yes") == 2
