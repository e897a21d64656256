"""Two programs timed in turn: A B A B ..., each in its own process on the same core.

A worker is a script that reads 'step' or 'memory' on its standard input and answers with one line of JSON. CPU
seconds of the process are the figure; wall seconds stand beside it and say how quiet the machine was.
"""

import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
MEBIBYTE_IN_KIB = 1024
# What launch/local.sh sets on a CPU, given to both sides: glibc otherwise hands large buffers back to the kernel at
# every step, and both pay for the page faults of getting them again.
KEEP_BUFFERS = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
    "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),
}


def child_environment() -> dict[str, str]:
    """Returns the environment of a process that imports this repository, on the CPU, with nothing compiled before."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    return environment


class Timing(NamedTuple):
    """CPU and wall seconds of single steps, in the order in which they ran."""

    cpu: list[float]
    wall: list[float]


class Worker:
    """A running worker process; use as a context manager."""

    def __init__(self, module: str, *arguments: str, core: int | None = 0):
        environment = child_environment() | {"OMP_NUM_THREADS": "1"} | KEEP_BUFFERS
        # The child inherits the affinity, so that its thread pools are sized by it.
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, before if core is None else {core})
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=ROOT,
            )
        finally:
            os.sched_setaffinity(0, before)
        self.ready = self._answer()

    def ask(self, request: str) -> dict:
        """Sends a request and returns the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"worker {self.process.args} ended with code {self.process.wait()}; its error is above.")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the input, upon which the worker ends."""
        self.process.communicate()


def alternate(workers: Mapping[Any, Worker], rounds: int, warmup: int = 2) -> dict[Any, Timing]:
    """Returns the timings of every worker, one step of each in turn, the order reversed every round."""
    timings = {name: Timing([], []) for name in workers}
    for index in range(-warmup, rounds):
        names = list(workers) if index % 2 == 0 else list(reversed(workers))
        for name in names:
            answer = workers[name].ask("step")
            if index >= 0:
                timings[name].cpu.append(answer["cpu"])
                timings[name].wall.append(answer["wall"])
    return timings


def ratio(ours: list[float], peer: list[float]) -> tuple[float, float, float]:
    """Returns the median of the paired ratios and its quartiles."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def serve(step: Callable[[], float], **ready) -> None:
    """Runs a worker: announces itself with `ready`, then answers requests until its input ends.

    Args:
      step: does one train step, waits for it and returns its loss.
      **ready: facts for the announcement.
    """
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        request = line.strip()
        if request == "step":
            cpu, wall = time.process_time(), time.perf_counter()
            loss = step()
            answer = {"loss": loss, "cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        elif request == "memory":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            answer = {"peak_mib": peak / MEBIBYTE_IN_KIB}
        else:
            raise ValueError(f"request {request!r} is unknown; use step or memory.")
        print(json.dumps(answer), flush=True)
