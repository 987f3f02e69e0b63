"""Where bundles live, what was used last, locks, and digests that are computed once.

Everything is under one folder: LCM_COMPILE_HOME, or the user's cache folder. Only what a GPU compiles for a
bundle lies beside that, wherever it is.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

from lcm_compile.engines.kernel_files import is_bundle
from lcm_compile.system.cache import home, lock
from lcm_compile.system.dataclass_json import from_json
from lcm_compile.system.files import write_atomically

RECENT_LIMIT = 200


def bundles_folder() -> Path:
    return home() / "bundles"


def remember(bundle: Path) -> None:
    """Notes that a bundle is used now."""
    with contextlib.suppress(OSError), lock(home() / ".recent.lock"):
        used = {**last_uses(), bundle.resolve(): time.time()}
        newest = sorted(used, key=lambda path: -used[path])[:RECENT_LIMIT]
        times = {str(path): used[path] for path in newest}
        write_atomically(home() / "recent.json", json.dumps(times, indent=1))


def last_uses() -> dict[Path, float]:
    """When bundles were built, hit or run last, in seconds since 1970; those that are gone are left out."""
    try:
        data = json.loads((home() / "recent.json").read_text(encoding="utf-8"))
        times = from_json(Mapping[str, float], data)
    except (OSError, ValueError, RecursionError):
        return {}
    now = time.time()
    return {Path(name): min(max(used, 0), now) for name, used in times.items() if is_bundle(Path(name))}


def recent() -> list[Path]:
    """The bundles of `last_uses`, the one used last first."""
    used = last_uses()
    return sorted(used, key=lambda path: -used[path])
