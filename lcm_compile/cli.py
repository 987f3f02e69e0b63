"""The command `lcm-compile`. Results go to stdout, progress and hints to stderr.

Exit codes: 0 success, 1 this machine or these files do not allow it, 2 wrong usage, 3 a parity or performance
gate failed, 130 interrupted. The commands are in lcm_compile/commands. Each is imported when it is asked for,
and imports heavy modules only when it runs, so that `--help` imports little more than click.
"""

from __future__ import annotations

import _thread
import codecs
import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import NoReturn

import click

from lcm_compile.errors import LcmCompileError
from lcm_compile.system.processor import share_quota
from lcm_compile.version import __version__

# The commands, in the order in which people use them. Each has a module of its name.
COMMANDS = (
    *("build", "run", "serve", "verify", "bench", "compare", "inspect", "fuse", "export", "distill"),
    *("train-lora", "bundles", "targets", "doctor"),
)
NO_ROOM = "free some room, or point stdout, --out or LCM_COMPILE_HOME at another disk"
NO_ACCESS = "ls -ld shows who may use it; --out and LCM_COMPILE_HOME choose where files are written"


def main() -> NoReturn:
    """Runs the command, and exits with its code. Every error becomes a message on stderr and an exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    replace_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("path-bytes", path_bytes)
        sys.stdout.reconfigure(errors="path-bytes")
    share_quota()
    try:
        cli.main(prog_name="lcm-compile", standalone_mode=False)
        sys.stdout.flush()  # what can't be printed is told here, and not by Python at exit
    except LcmCompileError as error:
        fail(error.message, error.hint, error.exit_code)
    except click.ClickException as error:
        with contextlib.suppress(OSError):
            error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted; nothing was written", None, 130)
    except BrokenPipeError:  # as after `| head -1`
        sys.exit(0)
    except OSError as error:
        what = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        hint = {
            errno.ENOSPC: NO_ROOM,
            errno.EDQUOT: NO_ROOM,
            errno.EACCES: NO_ACCESS,
            errno.EPERM: NO_ACCESS,
            errno.EROFS: NO_ACCESS,
            errno.ENOTDIR: NO_ACCESS,
            errno.EEXIST: NO_ACCESS,
            errno.ENAMETOOLONG: "give a shorter name",
        }.get(error.errno or 0)
        fail(what, hint, 1)
    except Exception as error:
        # torch and ONNX Runtime have no error class of their own for a lack of memory.
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            fail("out of memory", "use a smaller size or batch, or fewer pictures", 1)
        fail(
            f"internal error: {type(error).__name__}: {error}",
            "LCM_COMPILE_DEBUG=1 shows where; please report it",
            1,
        )
    finally:
        drop_unprinted()
    sys.exit(0)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt for Ctrl-C, but never within the steps of an import: it waits for their end.

    Python would leave its lock of all imports held, and a thread that loads an engine would wait for ever.
    """
    if frame is not None and frame.f_code.co_filename == "<frozen importlib._bootstrap>":
        threading.Timer(0.01, _thread.interrupt_main).start()
    else:
        signal.default_int_handler(number, frame)


def replace_closed_streams() -> None:
    """Opens the null device in place of each standard stream that the caller has closed.

    Otherwise the next file to be opened would get the stream's number, and with it all that libraries print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def path_bytes(error: UnicodeError) -> tuple[bytes, int]:
    """Encodes what the encoding of stdout lacks as in the names of files, so that a printed path names one.

    What these lack too is written as an escape, such as \\u2026.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    try:
        return os.fsencode(text), error.end
    except UnicodeEncodeError:
        return text.encode("ascii", "backslashreplace"), error.end


def drop_unprinted() -> None:
    """Drops what stdout and stderr can't take: Python would try again at exit, and change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(message: str, hint: str | None, code: int) -> NoReturn:
    """Prints an error and its hint to stderr, and exits with `code`.

    If LCM_COMPILE_DEBUG is 1, the traceback is printed before them.
    """
    if os.environ.get("LCM_COMPILE_DEBUG") == "1":
        traceback.print_exc()
    with contextlib.suppress(OSError):
        print(f"error: {message}", file=sys.stderr)
        if hint:
            print(f"  try: {hint}", file=sys.stderr)
    sys.exit(code)


class Commands(click.Group):
    """The commands in the order in which people use them. Each is imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the names of the commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Returns a command, or None if there is none of this name."""
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(importlib.import_module(f"lcm_compile.commands.{name}"), name)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lcm-compile")
def cli() -> None:
    """Fuse an LCM-LoRA into Stable Diffusion, compile it for a given GPU, and draw pictures in 4 steps.

    \b
    lcm-compile build --base demo --gpu cpu
    lcm-compile run "a large red star on a striped pink background"
    """
