"""What was measured on this machine once, and is kept in a file of the cache folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from lcm_compile.system.cache import home
from lcm_compile.system.dataclass_json import from_json
from lcm_compile.system.files import write_atomically

Value = TypeVar("Value", str, float)
REMEMBERED = 20  # measurements that a file keeps


class Measured(Generic[Value]):
    """Measurements of one kind: in each, a value for every name, by the circumstances that they depend on.

    A process uses the same values to its end, even if the file changes or can't be written: a build makes its
    plan twice, and both plans must decide the same.
    """

    def __init__(self, file: str, value: type[Value]) -> None:
        self._file = file
        self._form: Any = Mapping[str, Mapping[str, value]]  # type: ignore[valid-type]
        self._taken: dict[tuple[Path, str], Mapping[str, Value]] = {}  # what this process has used

    def stored(self) -> dict[str, Mapping[str, Value]]:
        """Returns the measurements that the file keeps, by their circumstances; none if it can't be read."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            found = json.loads((home() / self._file).read_text(encoding="utf-8"))
            return dict(from_json(self._form, found))
        return {}

    def of(
        self, circumstances: str, names: Collection[str], measure: Callable[[], Mapping[str, Value]]
    ) -> Mapping[str, Value]:
        """Returns the value of each name. They are measured if they are not stored."""
        path = home() / self._file
        taken = path, circumstances
        if taken not in self._taken:
            known: dict[str, Mapping[str, Value]] = self.stored()
            if set(known.get(circumstances, ())) != set(names):
                known[circumstances] = measure()
                with contextlib.suppress(OSError):
                    write_atomically(path, json.dumps(dict([*known.items()][-REMEMBERED:]), indent=1))
            self._taken[taken] = known[circumstances]
        return self._taken[taken]
