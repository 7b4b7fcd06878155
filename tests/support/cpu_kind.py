"""The kind of a CPU in one line: which kernels a library chooses depends on it, so a report of a test run says it."""

from __future__ import annotations

import platform
import re
from pathlib import Path

NUMBERS = {"family": "cpu family", "model": "model", "architecture": "CPU architecture", "part": "CPU part"}
X86 = re.compile(r"fma|avx2|avx512\w*|avx_\w+|avx10\w*|amx_\w+")
ARM = re.compile(r"asimd\w*|sve\w*|sme\w*|bf16|i8mm")
CPUINFO = Path("/proc/cpuinfo")


def cpu_kind(cpuinfo: str) -> str:
    """Vendor, family, model, name and vector flags of the first CPU that a text in the form of /proc/cpuinfo lists."""
    pairs = (line.partition(":") for line in cpuinfo.split("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    told = [
        fields.get("vendor_id") or f"implementer {fields.get('CPU implementer', 'unknown')}",
        *(f"{name} {fields[key]}" for name, key in NUMBERS.items() if key in fields),
        *([fields["model name"]] if "model name" in fields else []),
    ]
    flags = [f for f in fields.get("flags", "").split() if X86.fullmatch(f)]
    flags += [f for f in fields.get("Features", "").split() if ARM.fullmatch(f)]
    return f"{', '.join(told)}; {' '.join(flags) or 'no vector flags'}"


def this_cpu() -> str:
    """The kind of the machine's CPU; what the platform calls it where there is no /proc/cpuinfo."""
    if CPUINFO.exists():
        return cpu_kind(CPUINFO.read_text())
    return f"{platform.machine()}, {platform.processor()}"
