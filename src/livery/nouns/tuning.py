"""What a run may change: one value per sort of tuner, told apart by `kind`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, model_validator

from livery.nouns.base import Noun, Share, unknown_key

LowRankKind = Literal["lora", "loha", "lokr", "oft"]
LOW_RANK: tuple[LowRankKind, ...] = ("lora", "loha", "lokr", "oft")
KINDS = (*LOW_RANK, "full", "tokens")
"""The kinds that ship with livery; plug-ins add theirs."""


class _Tuner(Noun):
    """One entry of [[tuners]]: an unknown key is looked for in the other sorts too."""

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        for key in map(str, cast(Mapping[Any, Any], data)):
            if key not in cls.model_fields:
                raise ValueError(cls._unknown(key, cast(Mapping[str, Any], data)))
        return cast(Any, data)

    @classmethod
    def _unknown(cls, key: str, data: Mapping[str, Any]) -> str:
        owners = [str(sort.model_fields["kind"].default) for sort in SORTS if key in sort.model_fields]
        if not owners:
            return unknown_key(key, list(cls.model_fields))
        given = f"this one is '{data['kind']}'" if "kind" in data else "and no kind is given"
        return f"key '{key}' belongs to kind '{owners[0]}', {given}"


class LowRankSpec(_Tuner):
    """A small update of chosen layers, through peft: LoRA, LoHa, LoKr or OFT."""

    kind: LowRankKind = Field(default="lora", description="'lora', or products of more and smaller factors")
    rank: PositiveInt = Field(default=16, description="OFT: the size of its blocks")
    alpha: PositiveFloat | None = Field(default=None, description="scale is alpha / rank; default rank")
    targets: str | None = Field(
        default=None, description="regular expression over whole names of the denoiser's layers"
    )
    ranks: dict[str, PositiveInt] = Field(
        default={}, description="regular expression over layer names -> rank there"
    )
    alphas: dict[str, PositiveFloat] = Field(
        default={}, description="regular expression over layer names -> alpha there"
    )
    towers: dict[str, PositiveFloat] = Field(
        default={}, description="text encoders to adapt too -> their learning rate: {text_encoder = 1e-5}"
    )
    learning_rate: PositiveFloat | None = Field(
        default=None, description="of the denoiser's part; default the recipe's"
    )
    dropout: Share = Field(default=0.0, description="LoRA: of inputs; LoHa, LoKr: of ranks; OFT: of blocks")
    rslora: bool = Field(default=False, description="LoRA: scale is alpha / sqrt(rank)")
    dora: bool = Field(default=False, description="LoRA: direction and length of each weight learn apart")
    factor: PositiveInt | None = Field(
        default=None, description="LoKr: size of the small factor; default the most even split"
    )

    @model_validator(mode="after")
    def _name_contradictions(self) -> Self:
        only: dict[str, tuple[bool, LowRankKind]] = {
            "rslora": (self.rslora, "lora"),
            "dora": (self.dora, "lora"),
            "factor": (self.factor is not None, "lokr"),
        }
        for key, (used, kind) in only.items():
            if used and self.kind != kind:
                raise ValueError(f"{key} belongs to kind '{kind}', this one is '{self.kind}': leave it out")
        if self.kind == "oft" and (self.alpha is not None or self.alphas):
            raise ValueError("kind 'oft' turns weights and has no alpha: leave alpha and alphas out")
        return self

    @property
    def summary(self) -> str:
        """For people: "lora, rank 16, alpha 8, on attn1.*"."""
        parts = [self.kind, f"rank {self.rank}"]
        if self.kind != "oft":
            parts.append(f"alpha {self.alpha or self.rank:g}")
        parts += [name for name in ("rslora", "dora") if getattr(self, name)]
        parts += [f"on {self.targets}"] if self.targets else []
        return ", ".join([*parts, *self.towers])


class FullSpec(_Tuner):
    """The weights themselves: full fine-tuning."""

    kind: Literal["full"] = Field(default="full", description="tells this sort")
    targets: str | None = Field(
        default=None, description="regular expression over whole parameter names of the denoiser; default all"
    )
    towers: dict[str, PositiveFloat] = Field(
        default={}, description="text encoders to train too -> their learning rate"
    )
    learning_rate: PositiveFloat | None = Field(default=None, description="default the recipe's")

    @property
    def summary(self) -> str:
        """For people."""
        return ", ".join(["full", *([f"on {self.targets}"] if self.targets else []), *self.towers])


class TokensSpec(_Tuner):
    """New words for the text encoders: Textual Inversion, Gal et al. 2022 (arXiv:2208.01618)."""

    kind: Literal["tokens"] = Field(default="tokens", description="tells this sort")
    tokens: dict[str, str] = Field(description='new word -> words it starts from: {"<acme>" = "red sneaker"}')
    vectors: PositiveInt = Field(default=1, description="per new word")
    towers: tuple[str, ...] = Field(default=(), description="text encoders that learn it; default all")
    learning_rate: PositiveFloat | None = Field(default=None, description="default the recipe's")
    keep_norm: bool = Field(
        default=True, description="after each step, rescale vectors to the mean length of the known ones"
    )

    @model_validator(mode="after")
    def _need_tokens(self) -> Self:
        if not self.tokens:
            raise ValueError('tokens is empty: name a new word and what it starts from, {"<acme>" = "shoe"}')
        return self

    @property
    def summary(self) -> str:
        """For people: "tokens <acme> of 4 vectors"."""
        return f"tokens {' '.join(self.tokens)} of {self.vectors} vectors"


class PluginSpec(_Tuner):
    """A tuner that an installed plug-in registers under `kind`, with its own settings."""

    kind: str = Field(description="as the plug-in registers it")
    settings: dict[str, str | float | bool] = Field(default={}, description="what the plug-in reads")
    learning_rate: PositiveFloat | None = Field(default=None, description="default the recipe's")

    @classmethod
    def _unknown(cls, key: str, data: Mapping[str, Any]) -> str:
        """Most likely the kind is misspelt: a plug-in's own keys stand in `settings`."""
        near = difflib.get_close_matches(str(data["kind"]), KINDS, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        return (
            f"unknown kind '{data['kind']}': {hint}Known are {', '.join(KINDS)}; a plug-in's kind takes "
            f"'{key}' inside settings"
        )

    @property
    def summary(self) -> str:
        """For people."""
        return self.kind


SORTS: tuple[type[Noun], ...] = (LowRankSpec, FullSpec, TokensSpec)


def _sort(value: Any) -> str:
    kind: Any = (
        cast(Mapping[str, Any], value).get("kind", "lora")
        if isinstance(value, Mapping)
        else getattr(value, "kind", "lora")
    )
    if kind in LOW_RANK:
        return "low-rank"
    return {"full": "full-weights", "tokens": "new-words"}.get(str(kind), "plug-in")


TunerSpec = Annotated[
    Annotated[LowRankSpec, Tag("low-rank")]
    | Annotated[FullSpec, Tag("full-weights")]
    | Annotated[TokensSpec, Tag("new-words")]
    | Annotated[PluginSpec, Tag("plug-in")],
    Discriminator(_sort),
]
