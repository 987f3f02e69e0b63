"""Runs the steps of a Dockerfile without an engine for containers: each stage in a root folder of its own.

The base image is this machine's own /usr, /etc and the like, read-only, with the Python that runs the tests;
all else of the root is the stage's. Namespaces (`unshare`) give each step its own view of the disk.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

BASE = ("bin", "etc", "lib", "lib32", "lib64", "opt", "run", "sbin", "usr", "var")
PYTHON = Path(sys._base_executable).resolve()
PREFIX = Path(sys.base_prefix).resolve()
# What a build may know of where packages come from.
KEPT = re.compile(r"(PIP_|SSL_|REQUESTS_|https?_proxy|no_proxy|HTTPS?_PROXY|NO_PROXY).*")


@dataclass
class Stage:
    """A stage that was built: its root folder, and what it says of the process that it is made for."""

    root: Path
    environment: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/base:/usr/bin:/bin:/usr/sbin:/sbin"}
    )
    folder: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def start(self, words, *, writable=False, mounts=None, environment=None, **options):
        """Starts a command in the stage, with folders of this machine mounted read-only at their paths."""
        user, _, group = self.user.partition(":")
        drop = ["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"] if user != "0" else []
        plan = {
            "root": str(self.root),
            "mounts": {str(k): str(v) for k, v in (mounts or {}).items()},
            "writable": writable,
            "folder": self.folder,
            "words": ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", *drop, *words],
            "environment": {**self.environment, **(environment or {})},
        }
        inner = [sys.executable, __file__, json.dumps(plan)]
        return subprocess.Popen(["unshare", "--mount", "--propagation", "private", *inner], **options)


def enter(plan):
    """Runs in the new namespace: makes the root what the plan says, and becomes the plan's command."""
    root = Path(plan["root"])

    def mount(*words):
        subprocess.run(["mount", *map(str, words)], check=True)

    def show(source, place):
        place.mkdir(parents=True, exist_ok=True)
        mount("--rbind", source, place)
        mount("-o", "remount,bind,ro", place)

    mount("--bind", root, root)
    for name in BASE:
        source = Path("/", name)
        if source.is_symlink() and not (root / name).is_symlink():
            (root / name).symlink_to(source.readlink())
        elif source.is_dir() and not source.is_symlink():
            show(source, root / name)
    if not PREFIX.is_relative_to("/usr"):
        show(PREFIX, root / PREFIX.relative_to("/"))
    (root / "base").mkdir(exist_ok=True)
    for name in ("python", "python3"):
        if not (root / "base" / name).is_symlink():
            (root / "base" / name).symlink_to(PYTHON)
    for name in ("proc", "dev"):
        (root / name).mkdir(exist_ok=True)
        mount("--rbind", f"/{name}", root / name)
    (root / "tmp").mkdir(exist_ok=True)
    # Mounted before the tmpfs, in which their sources may lie.
    for source, place in plan["mounts"].items():
        show(source, root / place.lstrip("/"))
    if not plan["writable"]:
        mount("-o", "remount,bind,ro", root)
    mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", root / "tmp")
    os.chroot(root)
    os.chdir(plan["folder"])
    os.execvpe(plan["words"][0], plan["words"], plan["environment"])


def instructions(dockerfile):
    """The instructions of a Dockerfile, each as its word and what follows it."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield word, rest.strip()


def built(dockerfile, context, folder, arguments):
    """The last stage of a Dockerfile, built in a folder. Raises CalledProcessError if a step fails."""
    stages = {}
    stage = None
    given = {}
    for word, rest in instructions(dockerfile):
        if word not in ("RUN", "CMD", "ENTRYPOINT", "HEALTHCHECK"):  # in those the shell does it, or nobody
            known = {**given, **(stage.environment if stage else {})}
            rest = re.sub(r"\$\{?(\w+)\}?", lambda m, known=known: known.get(m[1], ""), rest)
        match word:
            case "FROM":
                root = folder / f"stage-{len(stages)}"
                root.mkdir()
                stage, given = Stage(root), {}
                stages[rest.partition(" AS ")[2] or str(len(stages))] = stage
            case "ARG":
                name, _, default = rest.partition("=")
                given[name] = arguments.get(name, default)
            case "ENV":
                stage.environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
            case "WORKDIR":
                stage.folder = rest
                (stage.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "COPY":
                copy(rest.split(), context, stages, stage)
            case "RUN":
                kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
                environment = {"HOME": os.environ["HOME"], **kept, **given}
                words = ["sh", "-e", "-c", rest]
                done = stage.start(words, writable=True, environment=environment).wait()
                if done:
                    raise subprocess.CalledProcessError(done, words)
            case "USER":
                stage.user = rest
            case "ENTRYPOINT":
                stage.entrypoint = json.loads(rest)
            case "CMD":
                stage.command = json.loads(rest)
            case "HEALTHCHECK":
                stage.health = json.loads(rest.partition("CMD ")[2])
            case "EXPOSE":
                pass
            case _:
                raise ValueError(f"{word} is not known here")
    return stage


def copy(words, context, stages, stage):
    """Does what COPY says: files into a folder, or a folder's content into another."""
    start = context
    if words[0].startswith("--from="):
        start = stages[words.pop(0).removeprefix("--from=")].root
    *sources, target = words
    place = stage.root / os.path.normpath(os.path.join(stage.folder, target)).lstrip("/")  # noqa: PTH118
    for source in sources:
        path = start / source.lstrip("/")
        if path.is_dir():
            shutil.copytree(path, place, symlinks=True, dirs_exist_ok=True)
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)


if __name__ == "__main__":
    enter(json.loads(sys.argv[1]))
