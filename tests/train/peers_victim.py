"""One of several processes that train together. Run by test_parallel.py, through torchrun.

Usage: torchrun --nproc-per-node N peers_victim.py FOLDER. Prints the first process's events, a line each.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

from livery.models.sd1 import SD1
from livery.nouns import Dataset, LowRankSpec, Photo, Recipe
from livery.train.loop import train
from livery.train.parallel import peers

RECIPE = Recipe.model_validate(
    {
        "tuners": [LowRankSpec(rank=2)],
        "steps": 6,
        "batch_size": 3,
        "accumulate": 2,
        "learning_rate": 1e-2,
        "precision": "fp32",
        "validate_every": 2,
        "checkpoint_every": 3,
        "optimizer": {"warmup_steps": 1},
        "stop": {"patience": 50},
    }
)
DATASET = Dataset(
    name="greys",
    photos=tuple(
        Photo(
            sha256=f"{i:064x}",
            width=32,
            height=32,
            captions=(f"grey {i}",),
            weight=1 + i / 2,
            split="train" if i < 5 else "validation",
        )
        for i in range(6)
    ),
)


def paint(photo: Photo) -> Image.Image:
    return Image.new("RGB", (32, 32), (40 * int(photo.sha256, 16), 90, 30))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with peers(torch.device("cpu")) as group:
        for event in train(RECIPE, SD1.tiny(), DATASET, pixels=paint, folder=Path(sys.argv[1]), peers=group):
            if group.leads:
                print(event.model_dump_json(), flush=True)
            elif event.kind in ("validation", "saved", "trained", "sample"):
                raise AssertionError(f"process {group.rank} told {event.kind}")
