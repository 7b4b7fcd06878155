"""The Range header of a download (RFC 9110, section 14).  Pure."""

from __future__ import annotations

import re

from starlette.exceptions import HTTPException

RANGES = re.compile(r"[Bb][Yy][Tt][Ee][Ss]=([0-9,\- \t]{1,4096})")
RANGE = re.compile(r"([0-9]{0,18})-([0-9]{0,18})")


def satisfiable(header: str, size: int, *, conditional: bool) -> str | None:
    """The header without the ranges that begin behind the end; None where it is none, and is to be ignored.

    conditional: it comes with If-Range, and means nothing where that does not hold.
    Raises HTTPException 416 when all of its ranges begin there, unless they are conditional: those are ignored too.
    """
    whole = RANGES.fullmatch(header.strip())
    if whole is None:
        return None
    kept, seen = [], 0
    for part in whole[1].split(","):
        if not part.strip():
            continue
        found = RANGE.fullmatch(part.strip())
        if found is None or not any(found.groups()):
            return None
        first, last = found.groups()
        if first and last and int(first) > int(last):
            return None
        seen += 1
        if int(first) < size if first else size and int(last):
            kept.append(f"{first}-{last}")
    if not seen or (conditional and not kept):
        return None
    if not kept:
        raise HTTPException(
            416,
            f"the file has {size} bytes, and the Range header asks for none of them",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return f"bytes={','.join(kept)}"
