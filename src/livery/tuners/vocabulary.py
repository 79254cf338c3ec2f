"""A text encoder's words while new ones are added: its input embedding, and a tokenizer that knows them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn import Parameter

from livery.models.backbone import Backbone


class Vocabulary(nn.Module):
    """Stands in for the input embedding: known ids [B, T] -> the base's rows, new ones -> new vectors.

    One per text encoder, shared by all who add words; it leaves with the last word. Then the encoder and
    `backbone.tokenizers` hold the very objects again that they held before.
    """

    def __init__(self, backbone: Backbone, tower: str) -> None:
        super().__init__()
        encoder: Any = backbone.towers[tower]
        self.base_layer: nn.Module = encoder.get_input_embeddings()
        self.tokenizer: Any = backbone.tokenizers[tower]
        self.vectors = nn.ParameterList()
        self._backbone, self._tower = backbone, tower
        self._words: dict[str, tuple[list[str], Parameter]] = {}
        self._known = 0

    @classmethod
    def of(cls, backbone: Backbone, tower: str) -> Vocabulary:
        """The one at work in this text encoder, or one that enters it with its first word."""
        encoder: Any = backbone.towers[tower]
        there = encoder.get_input_embeddings()
        return there if isinstance(there, cls) else cls(backbone, tower)

    @classmethod
    def pieces_in(cls, backbone: Backbone, tower: str) -> list[str]:
        """Tokens that were added to this text encoder so far."""
        return [piece for pieces, _ in cls.of(backbone, tower)._words.values() for piece in pieces]

    def forward(self, ids: Tensor) -> Tensor:
        new = ids >= self._known
        rows = self.base_layer(ids.masked_fill(new, 0))
        table = torch.cat(list(self.vectors)).to(rows.dtype)
        added = table[(ids - self._known).clamp(min=0, max=len(table) - 1)]
        return torch.where(new[..., None], added, rows)

    def rows(self, ids: Sequence[int]) -> Tensor:
        """The base's own vectors of these ids: float32 [len(ids), width]."""
        base: Any = self.base_layer
        return base.weight.detach()[list(ids)].float()

    def add(self, word: str, pieces: list[str], vectors: Tensor, learns: bool) -> Parameter:
        """A word whose pieces are tokens with these first vectors [len(pieces), width]."""
        param = Parameter(vectors.clone(), requires_grad=learns)
        self._words[word] = (pieces, param)
        self._install()
        return param

    def remove(self, word: str) -> None:
        del self._words[word]
        self._install()

    def _install(self) -> None:
        """Make encoder and tokenizer agree with the words there are."""
        backbone = self._backbone
        encoder: Any = backbone.towers[self._tower]
        self.vectors = nn.ParameterList(param for _, param in self._words.values())
        if not self._words:
            encoder.set_input_embeddings(self.base_layer)
            backbone.tokenizers[self._tower] = self.tokenizer
            return
        pieces = [piece for words, _ in self._words.values() for piece in words]
        tokenizer = copy.deepcopy(self.tokenizer)
        # Found in the raw text, before it is put into lower case; with the space before it, of which T5 would
        # make a token of its own.
        tokenizer.add_tokens([AddedToken(piece, lstrip=True, normalized=False) for piece in pieces])
        self._known = tokenizer.convert_tokens_to_ids(pieces[0])
        backbone.tokenizers[self._tower] = tokenizer
        encoder.set_input_embeddings(self)


def known_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text's tokens that the tokenizer knows, without the marks of beginning and end."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [number for number in ids if number != tokenizer.unk_token_id]


def is_one_token(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer knows the text as a whole."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id
