"""New words for the text encoders: Textual Inversion, Gal et al. 2022 (arXiv:2208.01618), section 4.

Each new word is one or several vectors in the input embedding of every text encoder, and the only thing that
learns. The base's own embedding and tokenizer stay untouched: while it is attached, a copy of the tokenizer
knows the new words, and a module before the embedding looks their vectors up. Prompts without a new word read
as they did, bit for bit, at any strength. With one, strength 0 reads the words that it starts from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from livery.models.backbone import Backbone
from livery.nouns import LiveryError, TokensSpec
from livery.tuners.blend import Blend, Blended
from livery.tuners.targets import tower
from livery.tuners.tuner import Part
from livery.tuners.vocabulary import Vocabulary, is_one_token, known_ids

MARK = "tokens"


@dataclass(frozen=True)
class Tokens:
    """The spec's new words; `learnt`, when given, says which have vectors, and how many: name -> count."""

    spec: TokensSpec
    learnt: Mapping[str, int] | None = None

    @property
    def touches(self) -> frozenset[Part]:
        return frozenset({"towers"})

    @classmethod
    def build(cls, spec: TokensSpec) -> Self:
        return cls(spec)

    def aimed_at(self, state: Mapping[str, Tensor]) -> Self:
        words = {
            name: len(vectors)
            for name, vectors in state.items()
            if name.partition(".")[2] in {f"{MARK}.{word}" for word in self.spec.tokens}
        }
        return replace(self, learnt=words)

    def attach(self, backbone: Backbone, seed: int = 0) -> AttachedTokens:
        """Nothing is drawn at random: words start as the mean of the embeddings of the words they start from.

        Or as those themselves, when there are as many as vectors. A text encoder that does not learn a word
        reads it as it starts. Raises LiveryError for a word that is known, or part of another one, or for a
        text encoder that is not there.
        """
        for name in self.spec.towers:
            tower(backbone, name)
        counts = {word: self._count(word) for word in self.spec.tokens}
        _check_words(backbone, counts)
        added: list[tuple[Vocabulary, str]] = []
        params: dict[str, Parameter] = {}
        for name in backbone.towers:
            vocabulary = Vocabulary.of(backbone, name)
            for word, start in self.spec.tokens.items():
                learns = self._learns(name, word)
                vectors = _first_vectors(vocabulary, start, counts[word])
                param = vocabulary.add(word, _pieces(word, counts[word]), vectors, learns)
                added.append((vocabulary, word))
                if learns:
                    params[f"{name}.{MARK}.{word}"] = param
        _set_placeholders(backbone, counts)
        return AttachedTokens(self.spec, backbone, added, params)

    def _count(self, word: str) -> int:
        found = [count for name, count in (self.learnt or {}).items() if name.endswith(f".{MARK}.{word}")]
        return found[0] if found else self.spec.vectors

    def _learns(self, name: str, word: str) -> bool:
        if self.learnt is not None:
            return f"{name}.{MARK}.{word}" in self.learnt
        return not self.spec.towers or name in self.spec.towers


class AttachedTokens(Blended):
    """New words in a backbone's text encoders. Several sets may be attached, and undone in any order.

    At strength 0 they read as the words that they start from; prompts without them as the base reads them.
    """

    def __init__(
        self,
        spec: TokensSpec,
        backbone: Backbone,
        added: Sequence[tuple[Vocabulary, str]],
        params: Mapping[str, Parameter],
    ) -> None:
        self._spec, self._backbone, self._added = spec, backbone, list(added)
        super().__init__(params)
        self._norms = {name: _norm(backbone, name.partition(".")[0]) for name in params}

    def train(self, mode: bool = True) -> None:
        """New words have no dropout."""

    def rate(self, name: str) -> float | None:
        return self._spec.learning_rate

    @torch.no_grad()
    def after_step(self) -> None:
        """Rescale each vector to the mean length of the base's own: a longer one drowns the other words.

        OneTrainer's "preserve embedding norm" does so with the median.
        """
        if self._spec.keep_norm:
            for name, param in self.params.items():
                param.mul_(self._norms[name] / param.norm(dim=-1, keepdim=True).clamp(min=1e-12))

    def undo(self) -> None:
        for vocabulary, word in self._added:
            vocabulary.remove(word)
            self._backbone.placeholders.pop(word, None)
        self._added, self._blend = [], Blend({})


def _pieces(word: str, count: int) -> list[str]:
    """The tokens that a word of several vectors is made of, named as diffusers names them."""
    return [word, *(f"{word}_{number}" for number in range(1, count))]


def _set_placeholders(backbone: Backbone, counts: Mapping[str, int]) -> None:
    for word, count in counts.items():
        if count > 1:
            backbone.placeholders[word] = " ".join(_pieces(word, count))


def _check_words(backbone: Backbone, counts: Mapping[str, int]) -> None:
    there = {piece for name in backbone.towers for piece in Vocabulary.pieces_in(backbone, name)}
    for word, count in counts.items():
        if not word or word != "".join(word.split()):
            raise LiveryError(f"tokens: {word!r} is empty or has spaces: name one word, such as '<acme>'")
        others = there | {
            piece for other in counts if other != word for piece in _pieces(other, counts[other])
        }
        for piece in _pieces(word, count):
            if clash := next((o for o in sorted(others) if o in piece or piece in o), None):
                raise LiveryError(
                    f"tokens: '{piece}' and '{clash}' are part of one another: choose words that are not"
                )
        for name in backbone.towers:
            if is_one_token(backbone.tokenizers[name], word):
                raise LiveryError(
                    f"tokens: '{word}' is a word that {name} knows already: choose a new one, such as "
                    f"'<{word.strip('<>')}-style>'"
                )


def _first_vectors(vocabulary: Vocabulary, start: str, count: int) -> Tensor:
    """[count, width]: the embeddings of the words, one to one when they are as many, else their mean."""
    ids = known_ids(vocabulary.tokenizer, start)
    if not ids:
        raise LiveryError(f"tokens: {start!r} has no word that the base knows: name one to start from")
    known = vocabulary.rows(ids)
    return known if len(ids) == count else known.mean(0, keepdim=True).repeat(count, 1)


def _norm(backbone: Backbone, name: str) -> float:
    """Mean length of the vectors that a text encoder came with."""
    embedding: Any = Vocabulary.of(backbone, name).base_layer
    assert isinstance(embedding, nn.Embedding)
    return float(embedding.weight.detach().float().norm(dim=-1).mean())
