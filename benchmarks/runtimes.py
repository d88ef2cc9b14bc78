"""Which runtimes run which unrolled files, and how far from float64: `python benchmarks/runtimes.py openvino tract`.

Writes benchmarks/results/runtimes.json, a row for each runtime, model and plan, and keeps the rows of other runtimes.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import onnx

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.runtimes.models import MODELS, difference
from tests.runtimes.runners import RUNNERS

RESULTS = Path(__file__).parent / "results" / "runtimes.json"
PLANS = ("default", "npu", "products=linear", "products=sums", "directions=stacked", "layers=wavefront", "webgpu")
PLANS += ("tract", "mnn")
DISTRIBUTIONS = {"reference": "onnx", "opencv": "opencv-python-headless", "mnn": "MNN"}


def measure(runtime: str, folder: Path) -> list[dict[str, str | float]]:
    """Run every model in every plan; a row tells the largest difference of its runs, or what was raised."""
    rows: list[dict[str, str | float]] = []
    for model in MODELS:
        runs = model.runs()
        for plan in PLANS:
            path = folder / f"{model.name}.{plan}.onnx"
            if not path.exists():
                model.export(path, plan)
            names = [value.name for value in onnx.load(path).graph.input]
            row: dict[str, str | float] = {"runtime": runtime, "model": model.name, "plan": plan}
            try:
                feeds = [({n: a.numpy() for n, a in zip(names, args, strict=True)}, right) for args, right in runs]
                row["difference"] = max(difference(RUNNERS[runtime](path, feed), right) for feed, right in feeds)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            rows.append(row)
    return rows


def main() -> None:
    runtimes = sys.argv[1:] or list(RUNNERS)
    saved = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"versions": {}, "rows": []}
    saved["machine"] = f"{platform.machine()}, Python {platform.python_version()}, torch {version('torch')}"
    with tempfile.TemporaryDirectory() as folder:
        for runtime in runtimes:
            rows = [row for row in saved["rows"] if row["runtime"] != runtime]
            saved["rows"] = rows + measure(runtime, Path(folder))
            saved["versions"][runtime] = version(DISTRIBUTIONS.get(runtime, runtime))
    RESULTS.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
