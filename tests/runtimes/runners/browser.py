"""onnxruntime-web in Chromium without a screen, by `browser.mjs`; WebGPU on a software adapter.

The environment's `UNROLL_NODE_MODULES` names the folder of onnxruntime-web and playwright-core.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.runtimes.runners.runtime import Inputs, Run, Runtime

MODULES = Path(os.environ.get("UNROLL_NODE_MODULES", "build/node_modules"))


def version(distribution: str) -> str:
    """Return the version of a package, and that of Chromium."""
    package = json.loads((MODULES / distribution / "package.json").read_text())["version"]
    return f"{package}, Chromium {_started('ort.wasm.min.mjs', 'wasm')[1]}"


@cache
def _started(build: str, provider: str) -> tuple[subprocess.Popen[str], str]:
    command = ["node", str(Path(__file__).with_suffix(".mjs")), str(MODULES), build, provider]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())["version"]


def _ask(build: str, provider: str, request: dict[str, Any]) -> dict[str, Any]:
    process, _ = _started(build, provider)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    answer = json.loads(process.stdout.readline())
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer


def _load(build: str, provider: str, path: Path) -> Run:
    ask = partial(_ask, build, provider)
    ask({"load": str(path.resolve())})

    def run(inputs: Inputs) -> list[np.ndarray]:
        given = {n: [str(v.dtype), v.shape, base64.b64encode(v.tobytes()).decode()] for n, v in inputs.items()}
        found = ask({"run": given})["results"]
        return [np.frombuffer(base64.b64decode(data), kind).reshape(shape) for kind, shape, data in found]

    return run


def _runtime(name: str, build: str, provider: str, **options: Any) -> Runtime:
    load = partial(_load, build, provider)
    return Runtime(f"onnxruntime-web, {name}", "", "onnxruntime-web", load, installed=version, apart=True, **options)


WASM = _runtime("wasm", "ort.wasm.min.mjs", "wasm")
WEBGPU = _runtime(
    "WebGPU",
    "ort.webgpu.min.mjs",
    "webgpu",
    preset="webgpu",
    plans=("default",),
    others={"default": "a shader has eight buffers, and a `Split` or `Concat` of all steps wants more"},
)
JSEP = _runtime(
    "WebGPU by JSEP",
    "ort.all.min.mjs",
    "webgpu",
    preset="webgpu",
    plans=("default",),
    others={
        "native": "a second `LSTM` is wrong",
        "default": "such a `Split` or `Concat` is wrong without a word; of an open size, the `Gemm` after it fails",
    },
)
