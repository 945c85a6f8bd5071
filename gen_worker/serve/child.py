"""`python -m gen_worker.serve.child PARENT_PID`: the supervisor, told to stop when its parent is gone.

Owns: that tie. A development server that was killed can't stop its worker any more, so the kernel does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

from gen_worker.entrypoint import main as supervise

_PR_SET_PDEATHSIG: Final = 1
"""linux/prctl.h"""


def main() -> int:
    """The supervisor's exit code, or 0 when the parent died before this process could be told of it."""
    parent_pid = int(sys.argv.pop())
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    return 0 if os.getppid() != parent_pid else supervise()


if __name__ == "__main__":
    sys.exit(main())
