"""Several processes on one host that train as one: each takes its rows of every batch.

`torchrun` starts them and tells each its number through the environment. Gradients are summed, and as
each row's loss is already divided by the rows of the whole step, the sum is what one process would
have: the same recipe gives the same curve whatever the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed
from torch.nn import Parameter

T = TypeVar("T")
PATIENCE = timedelta(hours=24)
"""How long the others wait while the first encodes, validates or draws; if one fails, torchrun ends all."""


@dataclass(frozen=True)
class Peers:
    """This process among those that train together; alone, nothing here costs anything."""

    rank: int = 0
    count: int = 1
    device: torch.device | None = None

    @property
    def leads(self) -> bool:
        """Whether this one validates, draws and writes files for all."""
        return self.rank == 0

    def part(self, rows: Sequence[T]) -> Sequence[T]:
        """This process's rows of a batch, neighbours all; may be none.

        So every process has as many rows of a class as of subjects, which stand in turn.
        """
        first, end = (len(rows) * rank // self.count for rank in (self.rank, self.rank + 1))
        return rows[first:end]

    def sum_gradients(self, params: Iterable[Parameter]) -> None:
        """Every process gets the sum of all gradients, through one buffer; a missing one counts as zero."""
        if self.count == 1:
            return
        whole = [param for param in params if param.requires_grad]
        for param in whole:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        grads = [param.grad for param in whole if param.grad is not None]
        flat = torch.cat([grad.float().flatten() for grad in grads])
        distributed.all_reduce(flat)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def sum(self, value: Tensor) -> Tensor:
        """The sum of everybody's value, at everybody."""
        if self.count > 1:
            distributed.all_reduce(value)
        return value

    def agree(self, value: bool) -> bool:
        """What the first process says."""
        if self.count == 1:
            return value
        said = torch.tensor(value, dtype=torch.uint8, device=self.device)
        distributed.broadcast(said, src=0)
        return bool(said)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            distributed.barrier()


ALONE = Peers()


def local_rank() -> int | None:
    """This process's number on its host where `torchrun` started it: the number of its card; else none."""
    return int(os.environ["LOCAL_RANK"]) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


@contextmanager
def peers(device: torch.device) -> Generator[Peers]:
    """Meet the processes that `torchrun` started; alone where it did not."""
    if local_rank() is None:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a barrier of NCCL waits on the current card
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Peers(distributed.get_rank(), distributed.get_world_size(), device)
    finally:
        distributed.destroy_process_group()
