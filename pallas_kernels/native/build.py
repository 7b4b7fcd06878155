"""How setuptools builds the native bodies: with the headers that jaxlib brings.  Where there is no compiler, they are left out.

It is loaded alone, without the package, in the environment of a build.
"""

from __future__ import annotations

import platform
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


class BuildNative(build_ext):
    """Builds an extension that is no Python module: XLA calls its functions."""

    def build_extension(self, ext: Extension) -> None:
        """Builds it for x86.  Raises CompileError otherwise, which setuptools reports and passes over."""
        jaxlib = find_spec("jaxlib")
        if platform.machine() not in ("x86_64", "AMD64") or jaxlib is None or jaxlib.origin is None:
            raise CompileError("the native bodies are for x86 and need jaxlib's headers: XLA's bodies will run")
        ext.include_dirs.append(str(Path(jaxlib.origin).parent / "include"))
        folder = Path(ext.sources[0]).parent
        source = sha256(
            b"".join(p.read_bytes() for p in sorted([*folder.glob("*.cc"), *folder.glob("*.h")]))
        ).hexdigest()
        ext.define_macros.append(("JAXLORA_SOURCE", f'"{source}"'))
        ext.extra_compile_args += ["-O3", "-g0", "-std=c++17", "-ffp-contract=off"]
        super().build_extension(ext)
