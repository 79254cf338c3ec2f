"""The command line: light to start, honest exit codes, JSON for scripts."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from livery import cli

LIVERY = [sys.executable, "-m", "livery"]


def livery(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LIVERY, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "black.png")
    (folder / "black.txt").write_text("a black square")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    return folder


def test_help_tells_the_defaults_that_are_no_values() -> None:
    """In brackets, which rich would take for markup and swallow."""
    shown = (
        CliRunner()
        .invoke(cli.app, ["train", "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
        .stdout
    )
    assert "[default: a LoRA on the starter]" in shown
    assert "[default: LIVERY_HOME or .livery]" in shown


def test_help_is_instant_and_never_loads_torch() -> None:
    """Under half a second of processor time; the best of three, for a machine that is busy."""
    code = (
        "import resource, sys\n"
        "from livery.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(*sorted(heavy), used.ru_utime + used.ru_stime)"
    )
    ends = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(3)
    ]
    loaded, seconds = {tuple(end[-2:-1]) for end in ends}, min(float(end[-1]) for end in ends)
    assert all(name not in str(loaded) for name in ("torch", "diffusers", "numpy", "PIL"))
    assert seconds < 0.5


def test_ingest_and_show_as_json(photos: Path, tmp_path: Path) -> None:
    done = livery("ingest", str(photos), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    refused = [event for event in events if event["kind"] == "refused"]
    assert [event["file"] for event in refused] == ["broken.png"]
    assert events[-1]["kind"] == "ingested"
    assert events[-1]["dataset"]["photos"][0]["captions"] == ["a black square"]
    shown = livery("list", "Dataset", "--json", cwd=tmp_path)
    told = json.loads(shown.stdout)
    assert told["name"] == "photos"
    again = livery("show", told["id"][:6], cwd=tmp_path)
    assert told["id"][:12] in again.stdout
    assert "1 train" in again.stdout


def test_errors_are_one_line_and_exit_with_1(tmp_path: Path) -> None:
    done = livery("show", "nobody", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("livery: ")
    assert "nobody" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_wrong_usage_exits_with_2(tmp_path: Path) -> None:
    assert livery("ingest", cwd=tmp_path).returncode == 2
    assert livery("train", cwd=tmp_path).returncode == 2


def test_doctor_says_what_is_here(tmp_path: Path) -> None:
    done = livery("doctor", "--json", cwd=tmp_path)
    findings = {row["what"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert {"Python", "torch", "device", "memory", "disk", "starter"} <= set(findings)
    assert findings["Python"]["found"] == sys.version.split()[0]
    assert all(row["means"] for row in findings.values())
    problems = any(row["level"] == "problem" for row in findings.values())
    assert done.returncode == (1 if problems else 0)


def test_the_cache_is_shown_bounded_and_emptied(tmp_path: Path) -> None:
    entries = tmp_path / ".livery" / "cache" / "latents" / "ab"
    entries.mkdir(parents=True)
    for number in range(4):
        (entries / f"{number}.safetensors").write_bytes(bytes(1024))

    def told(*arguments: str) -> tuple[int, int, int]:
        done = livery("cache", *arguments, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        state = json.loads(done.stdout)
        return sum(share["count"] for share in state["shares"]), state["limit"], state["freed"]

    assert told() == (4, 50 << 30, 0)
    assert told("--limit", "3k") == (3, 3072, 1024)
    assert told("--clear") == (0, 3072, 3072)
    assert "limit" in livery("cache", cwd=tmp_path).stdout
    assert "'much' is no size" in livery("cache", "--limit", "much", cwd=tmp_path).stderr


def test_several_processes_run_the_same_command_through_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def become(program: str, arguments: list[str]) -> None:
        asked.append(arguments)
        raise SystemExit

    monkeypatch.setattr("os.execv", become)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["livery", "train", "--data", "x", "--processes", "2"])
    with pytest.raises(SystemExit):
        cli.app(["train", "--data", "x", "--processes", "2"])
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "livery"]
    assert asked == [[sys.executable, *starter, "train", "--data", "x", "--processes", "2"]]
