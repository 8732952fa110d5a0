"""Where figures come from: machine, date, and the code's commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch


def machine() -> str:
    """Names the machine that figures come from."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    parts = [processor, f"{os.cpu_count()} cores", f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if torch.cuda.is_available():
        parts.insert(0, torch.cuda.get_device_name())
    return ", ".join(parts)


def provenance() -> str:
    """Names machine, day and commit; ``-dirty`` after the commit where files differ from it."""
    today = datetime.datetime.now(datetime.UTC).date()
    return f"{machine()}, {today.isoformat()}, commit {_commit()}"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
