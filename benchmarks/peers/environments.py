"""Environments of the peers: made on demand in a cache folder, at stated versions, with uv and, for C++, cmake."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

INSTALL_S, BUILD_S = 1800, 3600
LLAMA_CPP = "0.3.36"  # of llama-cpp-python, whose source distribution holds llama.cpp
FLAGS = (  # its own defaults for this machine, without what is not measured
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=ON",
)


class Unavailable(Exception):
    """A peer that cannot be had on this machine; the message says why."""


def default_cache() -> Path:
    """Returns the folder that environments are kept in."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "jaxlora-peers"


def run(*command: str | Path, limit_s: float = INSTALL_S, cwd: Path) -> None:
    """Runs a command outside of this project, whose pins are not the peer's.  Raises Unavailable with its last words."""
    name = " ".join(map(str, command[:4]))
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, process_group=0
        )
    except OSError as error:
        raise Unavailable(f"{name} …: {error}") from error
    with process:
        try:
            said, _ = process.communicate(timeout=limit_s)
        except BaseException as error:  # a compiler's children end with it
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise Unavailable(f"{name} …: no end after {limit_s:g} s") from error
    if process.returncode:
        raise Unavailable(f"{name} …: {' '.join(said.split())[-500:]}")


def python_with(
    cache: Path, name: str, requirements: Sequence[str], python: str = sys.executable, *, without: Sequence[str] = ()
) -> Path:
    """Returns the Python of an environment with these requirements.  Raises Unavailable when it cannot be made.

    without: packages that are removed again, as nothing here needs them and they do not load on a machine without CUDA.
    UV_FIND_LINKS, where it is set, may name a folder with wheels for CPUs only, which are much smaller.
    """
    folder = cache / name
    found, wanted = folder / "bin/python", "\n".join([python, *requirements, *(f"without {name}" for name in without)])
    done = folder / "installed"
    if not done.exists() or done.read_text() != wanted:
        cache.mkdir(parents=True, exist_ok=True)
        run("uv", "venv", "--quiet", "--clear", "--python", python, folder, cwd=cache)
        run("uv", "pip", "install", "--quiet", "--python", found, *requirements, cwd=cache)
        if without:
            run("uv", "pip", "uninstall", "--quiet", "--python", found, *without, cwd=cache)
        done.write_text(wanted)
    return found


def llama_cpp(cache: Path) -> Path:
    """Returns the folder with llama-server and llama-quantize, built for this machine.  Raises Unavailable."""
    folder = cache / f"llama-cpp-python-{LLAMA_CPP}"
    programs = folder / "build/bin"
    if (programs / "llama-server").exists() and (programs / "llama-quantize").exists():
        return programs
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        raise Unavailable("building llama.cpp needs cmake and a C++ compiler")
    python = python_with(cache, "llama-cpp-download", ["pip", "scikit-build-core"])
    source = f"llama-cpp-python=={LLAMA_CPP}"
    download = ("download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation")
    folder.mkdir(exist_ok=True)
    run(python, "-m", "pip", *download, "--dest", folder, source, cwd=cache)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    vendored = next(folder.glob("*/vendor/llama.cpp"))
    run("cmake", "-S", vendored, "-B", folder / "build", *FLAGS, cwd=folder)
    targets = ("--target", "llama-server", "llama-quantize")
    jobs = str(os.cpu_count() or 1)
    run("nice", "-n", "19", "cmake", "--build", folder / "build", *targets, "-j", jobs, limit_s=BUILD_S, cwd=folder)
    return programs
