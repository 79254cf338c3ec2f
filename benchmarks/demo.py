"""Times `livery demo` from installed to report, stage by stage, in a workspace of its own.

    python benchmarks/demo.py [--quick] [--out FOLDER]

Prints seconds per stage, the whole, and the peak memory of the process (its maximum resident set).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STARTS = {"1 of 3": "ingest", "2 of 3": "train", "3 of 3": "evaluate and report"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--out", type=Path, default=None)
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as workspace:
        out = chosen.out or Path(workspace) / "demo"
        options = ["--workspace", workspace, "--out", str(out), "--json", *(["--quick"] * chosen.quick)]
        measure([sys.executable, "-m", "livery", "demo", *options])


def measure(command: list[str]) -> None:
    began = time.monotonic()
    stages: dict[str, float] = {"start": began}
    report: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            stage = STARTS.get(event.get("text", "")[:6])
            if stage:
                stages[stage] = time.monotonic()
            report = event.get("report", report)
    if process.returncode:
        raise SystemExit(f"the demo failed with exit code {process.returncode}")
    ended = time.monotonic()
    edges = [*stages.values(), ended]
    for name, first, last in zip(stages, edges[:-1], edges[1:], strict=True):
        print(f"{name:20} {last - first:7.1f} s")
    print(f"{'in all':20} {ended - began:7.1f} s")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"{'peak memory':20} {peak:7.2f} GB")
    for sentence in report.get("verdict", ()):
        print(f"  {sentence}")


if __name__ == "__main__":
    main()
