"""Builds an image as its Dockerfile says, without a container engine: each step runs in a chroot.

Owns: which instructions there are and what they do. Run it by root in a mount namespace of its own, whose end undoes
all: `unshare --mount python image.py`. It is told what to do by JSON on stdin:

    {"images": {NAME: {"dockerfile": PATH, "context": PATH, "args": {NAME: VALUE}}, ...},
     "runs": [{"image": NAME, "command": [WORD, ...], "env": {NAME: VALUE}}, ...],
     "python": PATH, "scratch": PATH, "network": {NAME: VALUE}}

`FROM python:...` is this machine's own system with that Python first on its path; what a step writes goes to memory,
over it. RUN steps have the variables of `network`. At the end each of `runs` is run in an image as its USER, with its
ENV, in its WORKDIR, with a loopback of its own; {entrypoint} and {health} in it are the image's.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONTINUED = re.compile(r"\\\n\s*(?:#[^\n]*\n\s*)*")
SHARED = ("dev", "proc", "sys")
LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
os.execv(sys.argv[1], sys.argv[1:])
"""


@dataclass
class Stage:
    """A file system with what its instructions said of it."""

    root: Path
    env: dict[str, str]
    workdir: str = "/"
    user: str = "0"
    entrypoint: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)


class Builder:
    def __init__(self, python: Path, scratch: Path, network: dict[str, str]) -> None:
        self._memory = scratch
        mount("-t", "tmpfs", "tmpfs", self._memory)
        self._python = python
        self._network = network
        self.images: dict[str, Stage] = {}
        self._count = 0

    def build(self, name: str, dockerfile: Path, context: Path, given: dict[str, str]) -> None:
        stages: dict[str, Stage] = {}
        general: dict[str, str] = {}
        stage: Stage | None = None
        args: dict[str, str] = {}
        for word, rest in instructions(dockerfile.read_text()):
            if word == "FROM":
                source, _, alias = expand(rest, general).partition(" AS ")
                stage = self._from(source)
                args = {}
                stages[alias or name] = stage
            elif word == "ARG":
                key, _, default = rest.partition("=")
                args[key] = given.get(key, expand(default, args))
                if stage is None:
                    general = args
            else:
                assert stage is not None, "an instruction before FROM"
                self._step(stage, word, rest, args, stages, context)
        assert stage is not None
        self.images[name] = stage

    def _from(self, source: str) -> Stage:
        base = self.images.get(source)
        if base is None and not source.startswith("python:"):
            raise ValueError(f"FROM {source}: not built here, and no Python's")
        self._count += 1
        upper, work, root = (self._memory / f"{self._count}-{name}" for name in ("upper", "work", "root"))
        for path in (upper, work, root):
            path.mkdir()
        lower = base.root if base else Path("/")
        mount("-t", "overlay", "overlay", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}", root)
        for each in SHARED:
            mount("--rbind", f"/{each}", root / each)
        mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", root / "tmp")  # not what this machine has there
        if base:
            return Stage(root, dict(base.env), base.workdir, base.user, base.entrypoint, base.health)
        for parent in self._python.parents:  # others than root may run it, as in the image
            (root / parent.relative_to("/")).chmod(0o755)
        programs = f"{self._python.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return Stage(root, {"PATH": programs, "LANG": "C.UTF-8"})

    def _step(
        self, stage: Stage, word: str, rest: str, args: dict[str, str], stages: dict[str, Stage], context: Path
    ) -> None:  # fmt: skip
        known = {**stage.env, **args}
        if word == "RUN":
            run(stage, ["/bin/sh", "-c", rest], {**self._network, **stage.env, **args})
        elif word == "ENV":
            stage.env |= dict(pair.split("=", 1) for pair in shlex.split(expand(rest, known)))
        elif word == "WORKDIR":
            stage.workdir = expand(rest, known)
            (stage.root / stage.workdir.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            self._copy(stage, expand(rest, known), stages, context)
        elif word == "USER":
            stage.user = rest
        elif word == "ENTRYPOINT":
            stage.entrypoint = json.loads(rest)
        elif word == "HEALTHCHECK":
            stage.health = json.loads(rest[rest.index(" CMD ") + 5 :])
        elif word != "EXPOSE":
            raise ValueError(f"{word} is not known here")

    @staticmethod
    def _copy(stage: Stage, rest: str, stages: dict[str, Stage], context: Path) -> None:
        *sources, target = rest.split()
        origin = context
        if sources[0].startswith("--from="):
            origin = stages[sources.pop(0).removeprefix("--from=")].root
        into = stage.root / os.path.normpath(Path(stage.workdir, target)).lstrip("/")
        for path in (origin / each.lstrip("/") for each in sources):
            if path.is_dir():  # what is in it, as Docker does
                shutil.copytree(path, into, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copy2(path, into)


def instructions(text: str) -> list[tuple[str, str]]:
    joined = CONTINUED.sub("", text)
    lines = [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def expand(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda found: values.get(found[1], ""), text)


def mount(*words: str | Path) -> None:
    subprocess.run(["mount", *words], check=True)


def run(stage: Stage, command: list[str], env: dict[str, str], before: Sequence[str] = ()) -> None:
    """Raises CalledProcessError."""
    chroot = ["/usr/sbin/chroot", f"--userspec={stage.user}:{stage.user}", str(stage.root)]
    home = {"HOME": "/root" if stage.user == "0" else "/home/worker"}
    there = ["/usr/bin/env", "-C", stage.workdir, *command]
    subprocess.run([*before, *chroot, *there], env={**home, **env}, check=True)


def main() -> None:
    order: dict[str, Any] = json.load(sys.stdin)
    builder = Builder(Path(order["python"]), Path(order["scratch"]), order["network"])
    for name, image in order["images"].items():
        print(f"==> {name}", flush=True)
        builder.build(name, Path(image["dockerfile"]), Path(image["context"]), image["args"])
    for each in order["runs"]:
        print(f"==> a container of {each['image']}", flush=True)
        stage = builder.images[each["image"]]
        words = {"{entrypoint}": stage.entrypoint, "{health}": stage.health}
        command = [part for word in each["command"] for part in words.get(word, [word])]
        alone = ["/usr/bin/unshare", "--net", sys.executable, "-c", LOOPBACK_UP]
        run(stage, command, {**stage.env, **each["env"]}, alone)


if __name__ == "__main__":
    main()
