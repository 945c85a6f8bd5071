"""The torture test: a real worker against a scheduler that does everything nasty at random, from a seed.

    plan        seed -> what is done when (pure)
    requests    seed -> one request and what may come of it (pure)
    schemas     payloads for a tenant's own functions (pure)
    functions   the tenant functions of the built-in requests; the worker imports them
    scheduler   the scheduler's half: sends the requests, takes what arrives, writes the history
    faults      what goes wrong on streams
    processes   the worker's processes: started, signalled, watched
    history     what was sent, what arrived, when nothing could arrive
    invariants  history -> violations (pure)
    options     what is asked for, the worker's environment, the command to reproduce
    driver      one torture from start to report

This module imports nothing: the worker's executors import the package for `functions`, and stay light.
"""
