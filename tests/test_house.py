"""The rules of the house that no single room can check."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_torchvision_is_not_installed() -> None:
    """A build of it that does not match torch breaks diffusers and transformers by its mere presence."""
    assert importlib.util.find_spec("torchvision") is None


def test_imports_go_down_only() -> None:
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run(
        [*lint, "--no-cache"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Contracts: 1 kept, 0 broken" in run.stdout


def test_the_command_line_never_imports_torch() -> None:
    code = "import sys, livery.cli, livery.store, livery.plugins; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
