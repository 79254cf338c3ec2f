"""Kill trainings at random moments until they are done, and tell what came out.

Usage: python resume_victim.py FOLDER KILLS   one long training with each number of the comma-separated KILLS
       python resume_victim.py FOLDER matrix  for every family and tuner a short training whole, and one that
                                              is killed once and has its cache deleted before it goes on

Run by test_resume.py and by the matrix. Prints one JSON list of outcomes, each in FOLDER/NAME. It is a
process of its own, in which each victim is a cheap fork: the parent computes with one thread, so it has no
others that a fork would lose.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lion_pytorch  # noqa: F401, with the next two: once here, not in every fork
import prodigyopt  # noqa: F401
import torch
from PIL import Image, ImageFile  # noqa: F401

from livery import plugins
from livery.models.backbone import Backbone
from livery.nouns import Dataset, LowRankSpec, Photo, Recipe
from livery.train.loop import train

sys.path.append(str(Path(__file__).parents[2]))
from tests.matrix.cells import FAMILIES, TUNERS, WORD

torch.set_num_threads(1)

LONG = Recipe.model_validate(  # with a key of version 1, which cuts pictures to squares and keeps the last
    {
        "tuners": (LowRankSpec(rank=2, dropout=0.2),),
        "steps": 20,
        "batch_size": 2,
        "accumulate": 2,
        "warmup_steps": 3,
        "learning_rate": 1e-2,
        "precision": "fp32",
        "validate_every": 5,
        "checkpoint_every": 2,
    }
)
OPTIMIZERS = ("adamw", "lion", "prodigy", "adafactor")
"""Taken in turn by the cells of the matrix, so that each family and most tuners meet each."""


def dataset(held_out: int) -> Dataset:
    return Dataset(
        name="greys",
        photos=tuple(
            Photo(
                sha256=f"{i:064x}",
                width=32,
                height=32 if i % 2 else 40,
                captions=(f"{WORD} grey {i}", f"shade {i} of {WORD}"),
                split="train" if i < held_out else "validation",
            )
            for i in range(held_out + 1)
        ),
    )


def short(backbone: Backbone, tuner: str, number: int) -> Recipe:
    """A recipe of a cell: odd ones keep a running mean and perturb their noise, every third validates."""
    kind = OPTIMIZERS[number % len(OPTIMIZERS)]
    specs = TUNERS[tuner](backbone)
    if kind == "prodigy":  # it finds one rate for all
        specs = tuple(spec.model_copy(update={"learning_rate": None}) for spec in specs)
        specs = tuple(
            spec.model_copy(update={"towers": dict.fromkeys(spec.towers, 1.0)})
            if isinstance(spec, LowRankSpec)
            else spec
            for spec in specs
        )
    if isinstance(specs[-1], LowRankSpec) and specs[-1].kind == "lora":
        specs = (*specs[:-1], specs[-1].model_copy(update={"dropout": 0.3}))
    return Recipe.model_validate(
        {
            "tuners": specs,
            "steps": 3,
            "batch_size": 4 if number % 3 == 0 else 1,  # the looks at the grid take most of the time
            "learning_rate": 1.0 if kind == "prodigy" else 1e-3,
            "precision": "fp32",
            "validate_every": 3 if number % 3 == 0 else 0,
            "checkpoint_every": 1,
            "optimizer": {"kind": kind, "warmup_steps": 1, "ema": 0.5 if number % 2 else 0.0},
            "noise": {"offset": 0.1, "input_perturbation": 0.1} if number % 2 else {"pyramid": 0.3},
            "pictures": {"flip": 0.5},
            "stop": {"check_effect_at": 50 if number % 3 == 0 else 0},
        }
    )


def paint(photo: Photo) -> Image.Image:
    return Image.new("RGB", (photo.width, photo.height), (40 * int(photo.sha256, 16), 90, 30))


Job = Callable[[Path, int], None]
"""Train in this process, in a folder, telling each event down a pipe as it happens."""


def job(recipe: Recipe, backbone: Backbone, data: Dataset) -> Job:
    def run(folder: Path, pipe: int) -> None:
        for event in train(recipe, backbone, data, pixels=paint, folder=folder):
            os.write(pipe, event.model_dump_json().encode() + b"\n")

    return run


def fork(work: Job, folder: Path) -> tuple[int, int]:
    """A victim at work: its process id and the pipe it speaks into."""
    ear, mouth = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ear)
        work(folder, mouth)
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


def life(work: Job, folder: Path, steps: int | None, delay: float) -> tuple[list[dict[str, Any]], int]:
    """Start or resume the run; its events and the signal it died of (0 = it ended by itself)."""
    child, ear = fork(work, folder)
    heard = listen(ear, child, steps, delay)
    _, status = os.waitpid(child, 0)
    return heard, os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def outcome(work: Job, folder: Path, kills: int, most: int, seed: int) -> dict[str, Any]:
    """One run, killed up to `kills` times at a step up to `most`: what each life died of and told.

    Before the last life the cache is deleted.
    """
    chance = random.Random(seed)
    lives = [life(work, folder, chance.randint(1, most), chance.uniform(0, 0.03)) for _ in range(kills)]
    shutil.rmtree(folder / "cache", ignore_errors=True)
    lives.append(life(work, folder, None, 0))
    deaths, events = [death for _, death in lives], [heard for heard, _ in lives]
    return {"name": folder.name, "deaths": deaths, "events": events}


def long(place: Path, kills: list[int]) -> list[dict[str, Any]]:
    work = job(LONG, plugins.families()["sd1"].tiny(), dataset(5))
    return [outcome(work, place / str(n), count, 4, n) for n, count in enumerate(kills)]


def matrix(place: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for row, family in enumerate(FAMILIES):
        backbone = plugins.families()[family].tiny()
        for column, tuner in enumerate(TUNERS):
            work = job(short(backbone, tuner, row + column), backbone, dataset(2))
            name = f"{family} {tuner}"
            for killed in (0, 1):
                place_of = place / (name + " killed" * killed)
                found.append(outcome(work, place_of, killed, 2, zlib.crc32(name.encode())))
    return found


if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), sys.argv[2]
    told = matrix(folder) if what == "matrix" else long(folder, [int(word) for word in what.split(",")])
    print(json.dumps(told))
