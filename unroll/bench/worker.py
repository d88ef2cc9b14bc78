"""A process that builds one contender and runs it when it is asked to: `python -m unroll.bench.worker`.

Requests and replies are lines of JSON on the standard input and output, after a first `{}` that says that it is ready.
What others print goes to the standard error.

    {"do": "build", ...}    {"first_call": seconds, "nodes": ..., "size": bytes} or {"failed": reason}
    {"do": "run", ...}      {"times": [seconds, ...]}
    {"do": "results", ...}  {"memory": bytes}, when the results are in a file
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unroll.bench.contenders import CONTENDERS, Built, first_line
from unroll.bench.subjects import Subject, Task
from unroll.core.errors import UnrollError
from unroll.core.plan import Plan

WARM_UP = 0.2
"""Time of the warm-up, as a share of the run that follows: caches are cold after other processes"""


class Worker:
    """Answers requests, one with each public method."""

    def build(
        self, subject: dict[str, Any], contender: str, plan: dict[str, Any], saved: str, folder: str
    ) -> dict[str, Any]:
        """Build a contender and call it once, both within the time that is told; imports come before."""
        self.subject, self.contender = Subject(**subject), CONTENDERS[contender]
        torch.set_num_threads(self.subject.threads)
        torch.set_grad_enabled(self.subject.backward)
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32, as it is for other products
        for name in self.contender.needs:
            importlib.import_module(name)
        task = Task.load(self.subject, saved)
        # On a GPU a call returns before its kernels have ended.
        self.wait: Callable[[], None] = (
            torch.cuda.synchronize if torch.device(self.subject.device).type == "cuda" else lambda: None
        )
        begin = time.perf_counter()
        self.built: Built = self.contender.build(task, Plan(**plan), Path(folder))
        self._call()
        taken = time.perf_counter() - begin
        sizes = [file.stat().st_size for file in self.built.files if file.exists()]
        nodes = None if self.built.graphs is None else sum(self.built.graphs)
        return {"first_call": taken, "nodes": nodes, "size": sum(sizes) if sizes else None}

    def run(self, seconds: float, least: int = 1) -> dict[str, Any]:
        """Call it again and again, at least `least` times, and tell the seconds of each call after a warm-up."""
        self._repeat(WARM_UP * seconds, least)
        return {"times": self._repeat(seconds, least)}

    def results(self, path: str) -> dict[str, Any]:
        """Write what a call gives to a file, and tell the largest memory since the start."""
        on_gpu = torch.device(self.subject.device).type == "cuda"
        # read before the results are copied, which takes memory of its own
        memory = (
            largest_memory() if not on_gpu else torch.cuda.max_memory_allocated() if self.contender.in_torch else None
        )
        results = self.built.results(self._call())
        torch.save([result.detach().cpu().clone() for result in results], path)
        return {"memory": memory, "kernels": written_kernels()} | (self._profile() if on_gpu else {})

    def _profile(self) -> dict[str, Any]:
        """Return the launches of a call and the seconds that its kernels take."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            self._call()
        kernels = [event for event in seen.events() or () if event.device_type == DeviceType.CUDA]
        return {"launches": len(kernels), "busy": sum(event.device_time for event in kernels) * 1e-6}

    def _call(self) -> Any:
        result = self.built.run()
        self.wait()
        return result

    def _repeat(self, seconds: float, least: int) -> list[float]:
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < least or time.perf_counter() < end:
            begin = time.perf_counter()
            self._call()
            times.append(time.perf_counter() - begin)
        return times


def written_kernels() -> int | None:
    """Return the number of kernels that Inductor wrote in this process; None where it is not loaded."""
    metrics = sys.modules.get("torch._inductor.metrics")
    return metrics and metrics.generated_kernel_count


def largest_memory() -> int:
    """Return the most bytes that this process has held at a time.

    The system's own record tells, where there is one: `getrusage` counts what the process was forked from as well.
    """
    record = Path("/proc/self/status")
    if record.exists():
        line = next(line for line in record.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    # bytes on macOS, elsewhere kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Answer until the input ends."""
    # Replies go to the standard output as it was; all that is printed from here on, to the standard error.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    worker = Worker()
    replies.write("{}\n")  # ready
    replies.flush()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(worker, request.pop("do"))(**request)
        except UnrollError as error:
            reply = {"failed": f"{error.problems[0].place} {error.problems[0].finding}"}
        except Exception as error:
            reply = {"failed": first_line(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
