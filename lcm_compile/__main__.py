"""Runs the command as `python -m lcm_compile`."""

from lcm_compile.cli import main

main()
