"""Runs the command: `lcm-compile`, and `python -m lcm_compile`."""

import os
from typing import NoReturn

from lcm_compile import cli


def main() -> NoReturn:
    """Runs the command and ends the process at once.

    Freeing engines one by one takes time that the system does not need, and Python would wait for those that
    still load after an error.
    """
    code: object = 0
    try:
        cli.main()
    except SystemExit as end:  # `cli.main` has printed everything
        code = end.code
    os._exit(code if isinstance(code, int) else code is not None)


if __name__ == "__main__":
    main()
