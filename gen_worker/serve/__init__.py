"""A worker on the developer's own machine: one call (`gen-worker run`) or a server with a page (`gen-worker serve`).

Both are the real thing: the supervisor and its executors as processes, behind a scheduler on loopback in this process.
Only `serve` needs the packages of the extra `serve`; what `run` shares with it does without.
"""
