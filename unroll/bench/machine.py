"""The origin of figures: the machine and the versions."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("onnx", "onnxruntime", "onnxruntime-gpu", "onnxscript", "onnx-ir", "tensorrt", "torchao", "triton")


def machine() -> dict[str, Any]:
    """Return the processor, the GPU and its driver where there is one, and the versions of everything that takes part.

    Example:
        >>> sorted(machine())[:3]
        ['cores', 'cpu', 'gpu']
    """
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}  # which tells the build too
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.system(), "gpu": _gpu(), "versions": versions}


def command() -> str:
    """Return the command that runs, without the places where its files lie.

    Example:
        >>> from unittest.mock import patch
        >>> with patch("sys.argv", ["/somewhere/unroll/__main__.py", "bench", "--kind", "gru"]):
        ...     command()
        'python -m unroll bench --kind gru'
    """
    script, given = Path(sys.argv[0]), shlex.join(sys.argv[1:])
    if script.name == "__main__.py":
        return f"python -m {script.parent.name} {given}".strip()
    if script.suffix == ".py":
        here = script.absolute().is_relative_to(Path.cwd())
        return f"python {script.absolute().relative_to(Path.cwd()) if here else script.name} {given}".strip()
    return f"{script.name} {given}".strip()


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor() or platform.machine()


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "memory": found.total_memory,
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.splitlines() or [None])[0]
