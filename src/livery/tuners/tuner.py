"""What a tuner is: something that attaches to a backbone, can learn, and detaches bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, Self

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
        """A copy of what was learnt: float32, on the CPU, by part and module: "denoiser.x.lora_A.weight".

        At any strength: `scale` does not change it.
        """
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave. LiveryError when names or shapes are others; then nothing changed."""
        ...

    def train(self, mode: bool = True) -> None:
        """Let dropout act, or not. Attached it does not: call with True around steps, with False to look.

        Dropout draws from torch's own generator: seed that for each step (inside `torch.random.fork_rng`)
        and a resumed run repeats it. Nothing of the base changes its mode.
        """
        ...

    def scale(self, strength: float) -> None:
        """How strongly the change acts: 0 is the base, bit for bit; 1 (at the start) is what was learnt.

        Between and beyond, the changed weights W' count as W + strength (W' - W). For drawing: a tuner trains
        at strength 1.
        """
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

    @property
    def touches(self) -> frozenset[Part]:
        """What it changes: prompt encodings may be cached only while no tuner touches the towers."""
        ...

    @classmethod
    def build(cls, spec: Any) -> Self:
        """From the recipe's settings."""
        ...

    def aimed_at(self, state: Mapping[str, Tensor]) -> Self:
        """The same tuner, for exactly what this state names, whatever the default is today.

        Of a state that several tuners wrote, each takes the names that are of its sort.
        """
        ...

    def attach(self, backbone: Backbone, seed: int = 0) -> Attached:
        """Start: the output does not change, bit for bit. Equal seeds start equal; no global seed moves."""
        ...


def build(spec: TunerSpec) -> Tuner:
    """The tuner that a recipe asks for. Raises LiveryError for a kind nobody registered."""
    return plugins.tuners()[spec.kind].build(spec)


def touched(tuners: Iterable[Tuner]) -> frozenset[Part]:
    """What these tuners change together."""
    return frozenset(part for tuner in tuners for part in tuner.touches)


def attach_all(tuners: Sequence[Tuner], backbone: Backbone, seed: int = 0) -> Attached:
    """Attach a recipe's tuners, in its order, and return them as one: (tokens, lora) is pivotal tuning.

    Raises LiveryError for none, and when two of them learn the same thing; then nothing is attached.
    """
    if not tuners:
        raise LiveryError("recipe: tuners: none is named; name at least one, such as {kind = 'lora'}")
    parts: list[Attached] = []
    try:
        for number, tuner in enumerate(tuners):
            parts.append(tuner.attach(backbone, seed + number))
            _refuse_sharing(parts)
    except LiveryError:
        for part in reversed(parts):
            part.undo()
        raise
    return parts[0] if len(parts) == 1 else Joined(parts)


class Joined:
    """Several attached tuners that act, learn, are saved and leave as one."""

    def __init__(self, parts: Sequence[Attached]) -> None:
        self._parts = list(parts)

    @property
    def params(self) -> Mapping[str, Parameter]:
        return {name: param for part in self._parts for name, param in part.params.items()}

    def state(self) -> dict[str, Tensor]:
        return {name: tensor for part in self._parts for name, tensor in part.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        check_state(self.params, state)
        for part in self._parts:
            part.load({name: state[name] for name in part.params})

    def train(self, mode: bool = True) -> None:
        for part in self._parts:
            part.train(mode)

    def scale(self, strength: float) -> None:
        for part in self._parts:
            part.scale(strength)

    def rate(self, name: str) -> float | None:
        return next((part.rate(name) for part in self._parts if name in part.params), None)

    def after_step(self) -> None:
        for part in self._parts:
            part.after_step()

    def undo(self) -> None:
        for part in reversed(self._parts):
            part.undo()
        self._parts = []


def _refuse_sharing(parts: Sequence[Attached]) -> None:
    """Raises LiveryError when the last one learns under a name, or a parameter, that another has."""
    *before, last = parts
    names = {name for part in before for name in part.params}
    owners = {id(param) for part in before for param in part.params.values()}
    for name, param in last.params.items():
        if name in names or id(param) in owners:
            raise LiveryError(
                f"recipe: tuners: two of them learn {name}: give each its own targets, or keep one of them"
            )


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
