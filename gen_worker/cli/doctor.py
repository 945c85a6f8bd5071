"""`gen-worker doctor`: is this host fit to run a worker, and if not, what is to be done?"""

from __future__ import annotations

from typing import Annotated, Final

import typer

_MARKS: Final = {
    "ok": ("ok      ", typer.colors.GREEN),
    "note": ("note    ", typer.colors.BLUE),
    "warning": ("warning ", typer.colors.YELLOW),
    "broken": ("BROKEN  ", typer.colors.RED),
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as a JSON list.")] = False,  # noqa: FBT002
) -> None:
    """Examine this host as a worker here would find it.

    With its settings; exit 1 when something is broken. Looks at packages, driver, GPUs, torch, memory, limits,
    disks, ports, the token and the schedulers. It changes nothing; 64 MiB are written to the model cache and
    removed again, to see how fast it is.
    """
    import msgspec

    from supervisor.config import process_environment
    from supervisor.doctor.checks import examine

    findings = []
    for finding in examine(process_environment()):
        findings.append(finding)
        if not as_json:
            mark, colour = _MARKS[finding.level]
            typer.secho(mark, fg=colour, nl=False, bold=finding.level == "broken")
            typer.echo(f"{finding.check}: {finding.what}")
            if finding.todo:
                typer.echo(f"        -> {finding.todo}")
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(findings)).decode())
    if any(finding.level == "broken" for finding in findings):
        raise typer.Exit(1)
