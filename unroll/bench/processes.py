"""Worker processes, and what is asked of them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

START = 300.0
"""Seconds in which a process must have imported torch"""


class Failed(Exception):
    """A contender cannot go on, for the reason given."""


class Late(Failed):
    """A contender took longer than the limit."""


class Process:
    """A worker in a process of its own, with every process that it starts.

    With `alone` its compilers take all cores; without, others are built at the same time.
    """

    def __init__(self, folder: Path, threads: int, *, alone: bool = True) -> None:
        self.closed, self.errors = False, folder / "errors.txt"
        variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        variables |= {} if alone else {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        # The worker imports what this process can. Its cache is its own and empty, so that every build is a cold one.
        paths = {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        }
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "unroll.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | variables | paths,
                start_new_session=True,  # a group of its own, so that `close` ends its compilers too
            )

    def wait(self) -> None:
        """Wait until the process is ready."""
        self._reply(START, "start")

    def ask(self, limit: float, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and return the reply.

        Raises:
            Failed: with the reason; `Late` if there is none within `limit` seconds.
        """
        stdin = self.process.stdin
        assert stdin
        try:
            stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise Failed(self._ended()) from None
        return self._reply(limit, do)

    def _reply(self, limit: float, do: str) -> dict[str, Any]:
        stdout = self.process.stdout
        assert stdout
        # A request has one line of reply, so none is left in the buffer, where select would not see it.
        if not select.select([stdout], [], [], limit)[0]:
            self.close()
            raise Late(f"took more than {limit:g} s to {do}")
        line = stdout.readline()
        if not line:
            raise Failed(self._ended())
        reply = json.loads(line)
        if "failed" in reply:
            raise Failed(reply["failed"])
        return reply

    def close(self) -> None:
        """End the process and all that it started."""
        if self.closed:
            return
        self.closed = True
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                with suppress(BrokenPipeError):
                    stream.close()

    def _ended(self) -> str:
        code = self.process.wait()
        said = self.errors.read_text().strip().splitlines()
        return f"ended with exit code {code}" + (f": {said[-1]}" if said else "")
