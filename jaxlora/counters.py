"""The numbers that versions of an adapter have had: one small file a name, on disk before a number is used."""

from __future__ import annotations

import json
from pathlib import Path

from jaxlora.durable import replace_file
from jaxlora.errors import StorageFailed

COUNTER_FORMAT = 1


class Counters:
    """(last minted, last deleted) version of every name, in ROOT/TENANT/NAME.json.  The caller keeps calls apart."""

    def __init__(self, root: Path):
        self._root = root
        self._known: dict[tuple[str, str], tuple[int, int]] = {}  # as on disk, for names touched

    def known(self, tenant: str, name: str) -> bool:
        """Whether a number of this name was ever written here."""
        return (tenant, name) in self._known or self._path(tenant, name).exists()

    def read(self, tenant: str, name: str, at_least: int) -> tuple[int, int]:
        """Both numbers; what was minted is never below `at_least`, should the file be lost.  Zeros where there is nothing.

        Raises StorageFailed for a damaged file.
        """
        if (tenant, name) not in self._known:
            minted, deleted = self._read(self._path(tenant, name), f"{tenant}/{name}")
            self._known[tenant, name] = max(minted, at_least), deleted
        return self._known[tenant, name]

    def write(self, tenant: str, name: str, minted: int, deleted: int) -> None:
        """On disk when this returns.  Raises OSError."""
        data = {"format": COUNTER_FORMAT, "minted": minted, "deleted": deleted}
        replace_file(self._path(tenant, name), json.dumps(data).encode())
        self._known[tenant, name] = minted, deleted

    def _path(self, tenant: str, name: str) -> Path:
        return self._root / tenant / f"{name}.json"

    def _read(self, path: Path, whose: str) -> tuple[int, int]:
        if not path.exists():
            return 0, 0
        try:
            data = json.loads(path.read_bytes())
            found, minted, deleted = data["format"], int(data["minted"]), int(data["deleted"])
        except (ValueError, KeyError, TypeError) as e:
            raise StorageFailed(f"the version counter of {whose} is damaged: {e}") from e
        if found != COUNTER_FORMAT:
            raise StorageFailed(
                f"the version counter of {whose} has format {found!r}; this build reads {COUNTER_FORMAT}"
            )
        return minted, deleted
