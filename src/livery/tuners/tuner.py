"""What a tuner is: something that attaches to a backbone, can learn, and detaches bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, Self

from torch import Tensor
from torch.nn import Parameter

from livery import plugins
from livery.models.backbone import Backbone
from livery.nouns import LiveryError, TunerSpec

Part = Literal["denoiser", "towers"]


class Attached(Protocol):
    """A tuner at work inside a backbone."""

    @property
    def params(self) -> Mapping[str, Parameter]:
        """What learns, by the same names as in `state`."""
        ...

    def state(self) -> dict[str, Tensor]:
        """A copy of what was learnt: float32, on the CPU, by part and module: "denoiser.x.lora_A.weight"."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave. LiveryError when names or shapes are others; then nothing changed."""
        ...

    def scale(self, strength: float) -> None:
        """How strongly the change acts: 0 is the base, 1 (at the start) is what was learnt."""
        ...

    def rate(self, name: str) -> float | None:
        """The learning rate of its own that a parameter has; none = the recipe's."""
        ...

    def after_step(self) -> None:
        """Called after each optimiser step, to keep what must hold (the length of a word's vector)."""
        ...

    def undo(self) -> None:
        """Detach: the backbone is again what it was, bit for bit. A second call does nothing."""
        ...


class Tuner(Protocol):
    """One way to change a base model."""

    touches: ClassVar[frozenset[Part]]
    """What it changes: prompt encodings may be cached only while no tuner touches the towers."""

    @classmethod
    def build(cls, spec: Any) -> Self:
        """From the recipe's settings."""
        ...

    def aimed_at(self, state: Mapping[str, Tensor]) -> Self:
        """The same tuner, for exactly the modules that this state names, whatever the default is today."""
        ...

    def attach(self, backbone: Backbone, seed: int = 0) -> Attached:
        """Start: the output does not change, bit for bit. Equal seeds start equal; no global seed moves."""
        ...


def build(spec: TunerSpec) -> Tuner:
    """The tuner that a recipe asks for. Raises LiveryError for a kind nobody registered."""
    return plugins.tuners()[spec.kind].build(spec)


def attach_all(tuners: Sequence[Tuner], backbone: Backbone, seed: int = 0) -> Attached:
    """Attach a recipe's tuners and return them as one.

    One is what there is today; tuners that act together (tokens with LoRA) will be joined here. Raises
    LiveryError for none or several.
    """
    if len(tuners) != 1:
        raise LiveryError(f"recipe: tuners: {len(tuners)} are named, a run takes exactly one")
    return tuners[0].attach(backbone, seed)


def check_state(params: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raises LiveryError when a state does not fit these parameters, naming the first that does not."""
    if missing := sorted(params.keys() - state.keys()):
        raise LiveryError(
            f"the adapter lacks {len(missing)} tensors, first {missing[0]}: it is of other targets"
        )
    if strange := sorted(state.keys() - params.keys()):
        raise LiveryError(f"the adapter has {len(strange)} tensors with no place here, first {strange[0]}")
    for name, param in params.items():
        if param.shape != state[name].shape:
            raise LiveryError(
                f"the adapter's {name} is {list(state[name].shape)}, here it is {list(param.shape)}: it is "
                "of another rank or another base model"
            )
