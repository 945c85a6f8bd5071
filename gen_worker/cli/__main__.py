"""`python -m gen_worker.cli` is the command `gen-worker`."""

from gen_worker.cli import main

main()
