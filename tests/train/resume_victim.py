"""Kill a training at random moments until it is done, and tell what came out. Run by test_resume.py.

Usage: python resume_victim.py FOLDER KILLS... Does one run per number of kills, in FOLDER/0, /1, ..., and
prints a JSON list. It is a process of its own, so that each victim is a cheap fork of a parent that has
computed nothing yet and so has no threads.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from livery.models.sd1 import SD1
from livery.nouns import Dataset, LowRankSpec, Photo, Recipe
from livery.train.loop import train

RECIPE = Recipe(
    tuners=(LowRankSpec(rank=2),),
    steps=20,
    batch_size=2,
    accumulate=2,
    warmup_steps=3,
    learning_rate=1e-2,
    precision="fp32",
    validate_every=5,
    checkpoint_every=2,
)
DATASET = Dataset(
    name="greys",
    photos=tuple(
        Photo(
            sha256=f"{i:064x}",
            width=32,
            height=32,
            captions=(f"grey {i}", f"shade {i}"),
            split="train" if i < 5 else "validation",
        )
        for i in range(6)
    ),
)


def paint(photo: Photo) -> Image.Image:
    return Image.new("RGB", (32, 32), (40 * int(photo.sha256, 16), 90, 30))


def run(folder: Path, pipe: int) -> None:
    """Train in this process, telling each event down the pipe as it happens."""
    torch.set_num_threads(1)
    for event in train(RECIPE, SD1.tiny(), DATASET, pixels=paint, folder=folder):
        os.write(pipe, event.model_dump_json().encode() + b"\n")


def fork(folder: Path) -> tuple[int, int]:
    """A victim at work: its process id and the pipe it speaks into."""
    ear, mouth = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ear)
        run(folder, mouth)
        os._exit(0)
    os.close(mouth)
    return child, ear


def listen(ear: int, child: int, steps: int | None, delay: float) -> list[dict[str, Any]]:
    """The victim's events; `delay` seconds after its step number `steps` of this life it is killed."""
    heard: list[dict[str, Any]] = []
    with os.fdopen(ear) as lines:
        for line in lines:
            if line.endswith("\n"):
                heard.append(json.loads(line))
            if steps is not None and sum(event["kind"] == "step" for event in heard) == steps:
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
                steps = None
    return heard


def life(folder: Path, steps: int | None, delay: float) -> tuple[list[dict[str, Any]], int]:
    """Start or resume the run; its events and the signal it died of (0 = it ended by itself)."""
    child, ear = fork(folder)
    heard = listen(ear, child, steps, delay)
    _, status = os.waitpid(child, 0)
    return heard, os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def outcome(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """One run, killed up to `kills` times: what each life died of and told."""
    chance = random.Random(seed)
    lives = [life(folder, chance.randint(1, 4), chance.uniform(0, 0.03)) for _ in range(kills)]
    lives.append(life(folder, None, 0))
    return {"deaths": [death for _, death in lives], "events": [heard for heard, _ in lives]}


if __name__ == "__main__":
    place, numbers = Path(sys.argv[1]), [int(word) for word in sys.argv[2:]]
    print(json.dumps([outcome(place / str(n), kills, seed=n) for n, kills in enumerate(numbers)]))
