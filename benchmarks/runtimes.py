"""Which runtimes run which files, and how far from float64: `python benchmarks/runtimes.py openvino tract`.

Writes benchmarks/results/runtimes.json, a row for each runtime, model and file, native and unrolled, keeps the rows of
other runtimes, and with `--models` those of other models, and draws the tables of docs/runtimes.md. With `--python`,
the runtime is that of another environment, which needs NumPy and onnx beside it.
"""

from __future__ import annotations

import argparse
import json
import pickle
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.runtimes_table import RESULTS, ROOT, draw
from tests.runtimes.runners import RUNTIMES
from tests.runtimes.runners.runtime import Runtime, difference

if TYPE_CHECKING:
    from tests.runtimes.models import Model

FOLDER = ROOT / "build" / "runtimes"
NATIVE = "native"
RECURRENT = ("lstm", "gru", "rnn")
HERE = [name for name, runtime in RUNTIMES.items() if not runtime.apart or runtime.distribution == "onnxruntime-web"]
"""Runtimes that need no Python of their own"""
LIMIT = 300
"""Seconds that a runtime may take for one file"""

Row = dict[str, Any]


def write(model: Model, path: Path) -> None:
    """Write a model, its inputs and results, by the plan that the file is called by, unless they are there already."""
    if _given(path).exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        found: Any = model.feeds(model.export(path, path.stem))
    except Exception as error:
        found = _words(error)
    _given(path).write_bytes(pickle.dumps(found))


def _given(path: Path) -> Path:
    return path.with_name(f"{path.name}.pickle")


def measure(runtime: Runtime, path: Path) -> Row:
    """Run one file; the row tells the largest difference of its runs, or what was raised, and at which stage."""
    feeds = pickle.loads(_given(path).read_bytes())
    if isinstance(feeds, str):
        return {"stage": "export", "error": feeds}
    row: Row = {"stage": "convert"}
    try:
        converted = runtime.convert(path, [inputs for inputs, _ in feeds])
        row["stage"] = "load"
        if runtime.count:
            counted = runtime.count(converted)
            row["operators"] = sum(counted.values())
            row["recurrent"] = sum(number for kind, number in counted.items() if kind.lower() in RECURRENT)
            row |= runtime.products(counted) if runtime.products else {}
        if runtime.load:
            run = runtime.load(converted)
            row["stage"] = "run"
            row["difference"] = max(difference(run(inputs), expected) for inputs, expected in feeds)
        del row["stage"]
    except Exception as error:
        row["error"] = _words(error)
    return row


def _words(error: Exception) -> str:
    text = getattr(error, "stderr", b"") or b""
    lines = [
        line for line in (text.decode(errors="replace") or f"{type(error).__name__}: {error}").splitlines() if line
    ]
    return lines[-1 if text else 0][:200].replace(str(ROOT), "").replace(f"{sys.prefix}/", "")


def work(name: str, files: list[str]) -> None:
    """Measure these files, a line of JSON each."""
    for file in files:
        print("ROW", json.dumps(measure(RUNTIMES[name], FOLDER / file)), flush=True)


def rows(name: str, files: list[str], python: str) -> Iterator[Row]:
    """Measure in a process of its own, and in another one from where a file ended it."""
    while files:
        command = [python, __file__, "--work", name, *files]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
        assert process.stdout is not None
        while files:
            timer = threading.Timer(LIMIT, process.kill)
            timer.start()
            line = next((line for line in process.stdout if line.startswith("ROW ")), None)
            late = not timer.is_alive()
            timer.cancel()
            if line is None:
                break
            yield {"file": files.pop(0)} | json.loads(line[4:])
        code = process.wait()
        if files:
            why = f"took more than {LIMIT} s" if late else f"the process ended with {code}"
            yield {"file": files.pop(0), "stage": "run", "error": why}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=HERE)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--models", nargs="+", metavar="NAME")
    parser.add_argument("--work", metavar="NAME")
    options = parser.parse_args()
    if options.work:
        return work(options.work, options.names)
    from tests.runtimes.models import MODELS

    saved = json.loads(RESULTS.read_text())
    saved["machine"] = f"{platform.machine()}, Python {platform.python_version()}, files by torch {version('torch')}"
    models = [model for model in MODELS if not options.models or model.name in options.models]
    for name in options.names:
        began = time.perf_counter()
        runtime = RUNTIMES[name]
        plans = (NATIVE, runtime.preset, *runtime.plans)
        for model, plan in product(models, plans):
            write(model, FOLDER / model.name / f"{plan}{runtime.suffix}")
        anew = [model.name for model in models]
        saved["rows"] = [row for row in saved["rows"] if row["runtime"] != name or row["model"] not in anew]
        files = [f"{model}/{plan}{runtime.suffix}" for model in anew for plan in plans]
        for row in rows(name, files, options.python):
            model, file = row.pop("file").removesuffix(runtime.suffix).split("/")
            saved["rows"].append({"runtime": name, "model": model, "file": file} | row)
            print(saved["rows"][-1], flush=True)
        command = (
            f"from tests.runtimes.runners import RUNTIMES; r = RUNTIMES[{name!r}]; print(r.installed(r.distribution))"
        )
        saved["versions"][name] = subprocess.check_output([options.python, "-c", command], text=True, cwd=ROOT).strip()
        if not options.models:
            saved.setdefault("seconds", {})[name] = round(time.perf_counter() - began)
        order = [(runtime, model.name) for runtime in RUNTIMES for model in MODELS]
        saved["rows"].sort(key=lambda row: order.index((row["runtime"], row["model"])))
        RESULTS.write_text(json.dumps(saved, indent=1) + "\n")
    draw()


if __name__ == "__main__":
    main()
