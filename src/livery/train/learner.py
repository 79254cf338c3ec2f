"""One optimiser step: what is trainable, its gradients and their update. No events, no files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from livery.models.backbone import Backbone
from livery.models.device import autocast
from livery.models.noise import for_recipe
from livery.nouns import LiveryError, Recipe
from livery.train.batches import Plan, Row, batches_of_step
from livery.train.cache import Encodings
from livery.train.loss import noise_weights, row_errors, share_of_step
from livery.train.optimizer import adamw, learning_rate, read_state, set_rate, write_state
from livery.tuners.tuner import Attached


class Learner:
    """A backbone with something attached, an optimiser over what they train, and where the rows come from."""

    def __init__(
        self,
        recipe: Recipe,
        backbone: Backbone,
        attached: Attached,
        plan: Plan,
        encodings: Encodings,
    ) -> None:
        self._recipe, self._backbone, self._attached = recipe, backbone, attached
        self._plan, self._encodings = plan, encodings
        self._law = for_recipe(backbone.noise, recipe).to(backbone.device)
        self._params = dict(attached.params)
        self._optimizer = adamw(self._params.values(), recipe)

    def gradients(self, step: int) -> float:
        """Put the clipped gradient of step 0, 1, ... on the parameters; the loss of its rows.

        Raises LiveryError when the loss or the gradient is not a finite number.
        """
        self._optimizer.zero_grad(set_to_none=True)
        shares = [self._share(rows) for rows in batches_of_step(self._plan, step)]
        loss = float(torch.stack(shares).sum())
        norm = nn.utils.clip_grad_norm_(self._params.values(), self._recipe.optimizer.clip_norm)
        self._require_finite(loss, "loss", step)
        self._require_finite(float(norm), "gradient", step)
        return loss

    def update(self, step: int) -> float:
        """Move the parameters along the gradient; the learning rate that was used."""
        rate = learning_rate(self._recipe, step)
        set_rate(self._optimizer, rate)
        self._optimizer.step()
        return rate

    def adapter(self) -> dict[str, Tensor]:
        """What was learnt, by name: what the adapter file holds."""
        return self._attached.state()

    def state(self) -> dict[str, Tensor]:
        """Everything that training goes on from."""
        moments = read_state(self._optimizer, list(self._params))
        return _under("tuner", self._attached.state()) | _under("optimizer", moments)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        self._attached.load(_below("tuner", state))
        write_state(self._optimizer, list(self._params), _below("optimizer", state))

    def _share(self, rows: Sequence[Row]) -> Tensor:
        """Add the gradient of one batch; its share of the step's loss."""
        clean = self._encodings.latents(rows)
        law, device = self._law, clean.device
        t = torch.cat([law.sample_timesteps(1, row.random) for row in rows]).to(device)
        noise = torch.stack([torch.randn(clean[0].shape, generator=row.random) for row in rows]).to(device)
        with autocast(device, self._recipe.precision, clean[0, 0].numel()):
            prompts = self._encodings.prompts(rows)
            prediction = self._backbone.predict(law.mix(clean, noise, t), t, prompts)
        errors = row_errors(prediction, law.target(clean, noise, t))
        weights = noise_weights(law.weight(t, self._recipe.loss), [row.weight for row in rows])
        share = share_of_step(errors, weights, self._recipe.batch_size * self._recipe.accumulate)
        share.backward()
        return share.detach()

    def _require_finite(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            raise LiveryError(
                f"the {what} became {value} at step {step + 1}: lower learning_rate (now "
                f"{self._recipe.learning_rate:g}), raise optimizer.warmup_steps, or set precision to 'fp32'."
            )


def _under(room: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{room}/{name}": tensor for name, tensor in tensors.items()}


def _below(room: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{room}/"
    return {name.removeprefix(start): part for name, part in tensors.items() if name.startswith(start)}
