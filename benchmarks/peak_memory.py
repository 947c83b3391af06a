# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.peak_memory SUBJECT SAMPLES K ENGINE``: peak resident MB of one engine, in its own process.

Counted are building and two calls, over what the process holds with network, data and directions in place. Linux only.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident_mb(key: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return float(line.split()[1]) / 1024


def of_engine(subject: str, samples: int, k: int, engine: str) -> float:
    """Peak MB of ``engine`` for ``k`` vectors, measured in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", subject, str(samples), str(k), engine]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Measure what the command line names and print it."""
    import torch

    from benchmarks import bench_hvp
    from benchmarks.curvature_models import make_setup

    subject, samples, k, engine = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    setup = make_setup(subject, samples)
    rows = bench_hvp.directions(setup, k)
    bench_hvp.warm_up(engine)  # imports and library start-up are not the engine's memory
    before = _resident_mb("VmRSS")
    _RESET.write_text("5")
    call, _ = bench_hvp.hessian_builders(setup)[engine](setup, rows)
    call()
    call()
    print(_resident_mb("VmHWM") - before)


if __name__ == "__main__":
    main()
