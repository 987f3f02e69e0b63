"""Runs a random sample of the tests in ways in which no test may fail: `python tests/check_independence.py`.

Each test of the sample runs alone, in a process of its own. All tests of its files run in random order, those
of each half of the files in one process. Both have an empty home folder and an environment with settings that
a user may have.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What users set that changes how the libraries or this package behave.
SETTINGS = {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "200", "LCM_COMPILE_HOME": "/nonexistent"}


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=6, help="tests in the sample")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="chooses the sample")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, **SETTINGS, "HOME": home}
        listed = run(environment, "--collect-only")
        tests = [line for line in listed.stdout.splitlines() if "::" in line]
        if not tests:
            print(listed.stdout + listed.stderr)
            return 1
        sample = random.Random(options.seed).sample(tests, min(options.count, len(tests)))
        files = sorted({test.partition("::")[0] for test in sample})
        halves = [half for half in (files[::2], files[1::2]) if half]
        order = ("--random-order", f"--random-order-seed={options.seed}")
        runs = [*((*order, *half) for half in halves), *((test,) for test in sample)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(lambda words: run(environment, *words), runs))
    names = [*("in random order: " + " ".join(half) for half in halves), *sample]
    for name, result in zip(names, done, strict=True):
        print("failed" if result.returncode else "passed", name)
        if result.returncode:
            print(result.stdout + result.stderr)
    failed = sum(result.returncode != 0 for result in done)
    print(f"{failed} of {len(done)} runs failed; the seed is {options.seed}")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
