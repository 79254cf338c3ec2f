"""One optimiser step: what is trainable, its gradients and their update. No events, no files."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from livery.models.backbone import Backbone, Conditioning
from livery.models.device import autocast, resolve, send
from livery.models.noise import for_recipe
from livery.nouns import LiveryError, MemorySpec, Recipe
from livery.train.batches import Plan, Row, batches_of_step, random_of
from livery.train.cache import Encodings
from livery.train.ema import Ema
from livery.train.loss import row_errors, share_of_step
from livery.train.memory import FusedBackward
from livery.train.noises import draw_noise, perturbed
from livery.train.optimizer import build, read_state, schedule, set_rates, write_state
from livery.train.parallel import ALONE, Peers
from livery.tuners.tuner import Attached


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs, on the device: B rows of one size."""

    rows: Sequence[Row]
    clean: Tensor
    t: Tensor
    noise: Tensor
    mixed: Tensor
    """The noise that is mixed in: `noise`, unless the input is perturbed."""
    weights: Tensor
    mask: Tensor | None
    prompts: Conditioning | None
    """None where the towers train: such prompts are encoded within the step."""


@dataclass(frozen=True)
class Outcome:
    """What one step was like: the loss of its rows, the length of its gradient, its learning rate."""

    loss: float
    gradient: float
    rate: float


class Learner:
    """A backbone with something attached, an optimiser over what they train, and where the rows come from.

    Between steps dropout acts; `looking` is for everything else.
    """

    def __init__(
        self,
        recipe: Recipe,
        backbone: Backbone,
        attached: Attached,
        plan: Plan,
        encodings: Encodings,
        peers: Peers = ALONE,
        share: Callable[[int], float] | None = None,
        memory: MemorySpec | None = None,
    ) -> None:
        """`share` is the share of the full rate in step 0, 1, ...; default the recipe's schedule. `memory`
        is the plan that the recipe's stands for.

        Raises LiveryError for what the optimiser, the base's noise or the device does not have.
        """
        self.recipe, self.backbone, self.attached = recipe, backbone, attached
        self.plan, self.encodings, self._peers = plan, encodings, peers
        self._share_of_rate = share or (lambda step: schedule(recipe, step))
        self.law = for_recipe(backbone.noise, recipe).to(backbone.device)
        self.params: Mapping[str, Parameter] = dict(attached.params)
        self._fused = _fused(attached, recipe, memory or recipe.memory)
        self._optimizers = (
            list(self._fused.optimizers.values())
            if self._fused
            else [build(self.params, attached.rate, recipe)]
        )
        half = resolve(recipe.precision, backbone.device) == "fp16"
        if half and self._fused:
            raise LiveryError("memory.fused_backward cannot scale losses for fp16: set precision to 'bf16'")
        if self._fused and peers.count > 1:
            raise LiveryError("memory.fused_backward is for one process: leave it out, or train with one")
        self._scaler = torch.amp.GradScaler(backbone.device.type, enabled=half)
        self._ema = Ema(self.params, recipe.optimizer.ema) if recipe.optimizer.ema else None
        self._ahead: tuple[int, list[Batch]] | None = None
        attached.train(True)

    def step(self, step: int) -> Outcome:
        """Optimiser step 0, 1, ...: the device is waited for once, at the end.

        By then the parameters have moved, whatever the outcome's numbers are: judge them before saving.
        """
        batches = self._ahead[1] if self._ahead and self._ahead[0] == step else self._prepare(step)
        share = self._share_of_rate(step)
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
            set_rates(optimizer, share)
        with self._randomness(step):
            losses = [self._backward(batch) for batch in batches]
        gradient = self._update(step)
        loss = self._peers.sum(torch.stack(losses).sum() if losses else torch.zeros((), device=self._device))
        # While the device works off what it was given.
        self._ahead = (step + 1, self._prepare(step + 1)) if step + 1 < self.recipe.steps else None
        found, length = torch.stack([loss, gradient]).tolist()
        return Outcome(found, length, self._rate())

    @contextmanager
    def looking(self) -> Generator[None]:
        """No dropout, and the running mean where the recipe keeps one: what would be saved now."""
        self.attached.train(False)
        try:
            if self._ema is None:
                yield
            else:
                with self._ema.in_place():
                    yield
        finally:
            self.attached.train(True)

    def adapter(self) -> dict[str, Tensor]:
        """What was learnt, by name: what the adapter file holds."""
        with self.looking():
            return self.attached.state()

    def state(self) -> dict[str, Tensor]:
        """Everything that training goes on from."""
        found = _under("tuner", self.attached.state())
        found |= _under("optimizer", read_state(self._optimizers, self.params))
        found |= _under("ema", self._ema.state()) if self._ema else {}
        scaler = {name: torch.tensor(value) for name, value in self._scaler.state_dict().items()}
        return found | _under("scaler", scaler)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        self.attached.load(_below("tuner", state))
        write_state(self._optimizers, self.params, _below("optimizer", state))
        if self._ema:
            self._ema.load(_below("ema", state))
        if self._scaler.is_enabled():
            self._scaler.load_state_dict({k: v.item() for k, v in _below("scaler", state).items()})

    @property
    def _device(self) -> torch.device:
        return self.backbone.device

    def _prepare(self, step: int) -> list[Batch]:
        """This process's rows of a step, read and drawn."""
        parts = (self._peers.part(rows) for rows in batches_of_step(self.plan, step))
        return [self._batch(rows) for rows in parts if rows]

    def _batch(self, rows: Sequence[Row]) -> Batch:
        clean, device, spec = self.encodings.latents(rows), self._device, self.recipe.noise
        t = torch.cat([self.law.sample_timesteps(1, row.random) for row in rows])
        noise = [draw_noise(clean.shape[1:], row.random, spec) for row in rows]
        mixed = [perturbed(one, row.random, spec) for one, row in zip(noise, rows, strict=True)]
        on_device = send(torch.stack(noise), device)
        return Batch(
            rows=rows,
            clean=clean,
            t=send(t, device),
            noise=on_device,
            mixed=send(torch.stack(mixed), device) if spec.input_perturbation else on_device,
            weights=send(torch.tensor([row.weight for row in rows]), device),
            mask=self.encodings.masks(rows),
            prompts=None if self.encodings.towers_train else self.encodings.prompts(rows),
        )

    def _backward(self, batch: Batch) -> Tensor:
        """Add the gradient of one batch; its share of the step's loss."""
        law, loss = self.law, self.recipe.loss
        noisy = law.mix(batch.clean, batch.mixed, batch.t)
        target = self._target(batch, noisy)
        prediction = self._predict(noisy, batch.t, batch.rows, batch.prompts)
        errors = row_errors(prediction, target, loss, batch.mask)
        rows = self.recipe.batch_size * self.recipe.accumulate
        share = share_of_step(errors, law.weight(batch.t, loss) * batch.weights, rows)
        self._scaler.scale(share).backward()
        return share.detach()

    def _target(self, batch: Batch, noisy: Tensor) -> Tensor:
        """What the noise law asks for; in rows that keep the base, what the base answers."""
        target = self.law.target(batch.clean, batch.noise, batch.t)
        kept = [place for place, row in enumerate(batch.rows) if row.keeps_base]
        if not kept:
            return target
        self.attached.scale(0)
        try:
            with torch.no_grad():
                rows = [batch.rows[place] for place in kept]
                target[kept] = self._predict(noisy[kept], batch.t[kept], rows, None).float()
        finally:
            self.attached.scale(1)
        return target

    def _predict(self, noisy: Tensor, t: Tensor, rows: Sequence[Row], prompts: Conditioning | None) -> Tensor:
        with autocast(self._device, self.recipe.precision, noisy[0, 0].numel()):
            return self.backbone.predict(noisy, t, prompts or self.encodings.prompts(rows))

    def _update(self, step: int) -> Tensor:
        """Move the parameters along the clipped gradient; its length before that, a scalar on the device."""
        if self._fused:
            length = torch.where(self._fused.broken, float("inf"), 0.0)
        else:
            optimizer = self._optimizers[0]
            self._peers.sum_gradients(self.params.values())
            self._scaler.unscale_(optimizer) if self._scaler.is_enabled() else None
            length = nn.utils.clip_grad_norm_(list(self.params.values()), self.recipe.optimizer.clip_norm)
            self._scaler.step(optimizer)
            self._scaler.update()
            if self._scaler.is_enabled():  # it skips a step that overflows, and scales less from then on
                length = length.nan_to_num(0.0, 0.0, 0.0)
        self.attached.after_step()
        if self._ema:
            self._ema.follow(step + 1)
        return length.float()

    def _rate(self) -> float:
        """The learning rate in use; where the optimiser finds one itself, times that."""
        group = self._optimizers[0].param_groups[0]
        return float(group["lr"] * group.get("d", 1.0))

    @contextmanager
    def _randomness(self, step: int) -> Generator[None]:
        """Dropout of this step hangs on (seed, step, process) alone, and nobody else's numbers move."""
        cards = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=cards):
            torch.manual_seed(random_of(self.recipe.seed, "step", step, self._peers.rank).initial_seed())
            yield


def _fused(attached: Attached, recipe: Recipe, memory: MemorySpec) -> FusedBackward | None:
    if not memory.fused_backward:
        return None
    return FusedBackward(
        attached.params,
        lambda name, param: build({name: param}, attached.rate, recipe),
        recipe.optimizer.clip_norm,
    )


def _under(room: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{room}/{name}": tensor for name, tensor in tensors.items()}


def _below(room: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{room}/"
    return {name.removeprefix(start): part for name, part in tensors.items() if name.startswith(start)}
