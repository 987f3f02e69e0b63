"""The store: the folder of the bundles, and when each bundle was last used.

Everything is in one folder: LCM_COMPILE_HOME, or the user's cache folder. Only the kernels that a GPU
compiles for a bundle lie next to that bundle, wherever it is.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

from lcm_compile.bundles.sizes import first_of
from lcm_compile.engines.kernel_files import is_bundle
from lcm_compile.system.cache import home, lock
from lcm_compile.system.dataclass_json import from_json
from lcm_compile.system.files import write_atomically

RECENT_LIMIT = 200  # bundles whose last use is stored


def bundles_folder() -> Path:
    """Returns the folder of the store's bundles. It may not exist yet."""
    return home() / "bundles"


def remember(bundle: Path) -> None:
    """Stores that a bundle is used now, or that of a size. Does nothing if that can't be written."""
    bundle = first_of(bundle)
    with contextlib.suppress(OSError), lock(home() / ".recent.lock"):
        used = {**last_uses(), bundle.resolve(): time.time()}
        newest = sorted(used, key=lambda path: -used[path])[:RECENT_LIMIT]
        times = {str(path): used[path] for path in newest}
        write_atomically(home() / "recent.json", json.dumps(times, indent=1))


def last_uses() -> dict[Path, float]:
    """Returns when each bundle was last built, hit or run, in seconds since 1970.

    Bundles that do not exist any more are left out.
    """
    try:
        data = json.loads((home() / "recent.json").read_text(encoding="utf-8"))
        times = from_json(Mapping[str, float], data)
    except (OSError, ValueError, RecursionError):
        return {}
    now = time.time()
    return {Path(name): min(max(used, 0), now) for name, used in times.items() if is_bundle(Path(name))}


def recent() -> list[Path]:
    """Returns the bundles of `last_uses`. The last used comes first."""
    used = last_uses()
    return sorted(used, key=lambda path: -used[path])
