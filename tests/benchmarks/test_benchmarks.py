"""The benchmarks run on tiny models for a step or two. Their numbers are not judged, only that they come."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_the_card_benchmark_prints_its_table_on_tiny_models():
    done = run("train_gpu.py", "--tiny", "--steps", "1", "--only", "sd1.5")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| sd1\.5, 32 px \| (\d) \| eager \| (\d\.\d+) ", done.stdout, re.MULTILINE)
    assert [batch for batch, _ in rows] == ["1", "2"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so_in_a_sentence():
    done = run("train_gpu.py")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("this measures CUDA cards and there is none here")


@pytest.mark.slow
def test_the_floor_benchmark_compares_ours_with_the_bare_loop():
    done = run("train_floor.py", "--steps", "2", "--batch", "2")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ratio \d\.\d+ \(quartiles", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_the_cache_benchmark_compares_cached_with_in_the_loop():
    done = run("train_step.py", "--base", "tiny", "--steps", "2", "--batch", "2")
    assert done.returncode == 0, done.stderr
    assert "x faster from the cache" in done.stdout
