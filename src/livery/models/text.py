"""Text towers: tokenizers from a folder, prompts to ids, and what to know of CLIP and T5 encoders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from livery.nouns import LiveryError, sha256_of

CLIP_TARGETS = r"(text_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
"""Attention and feed-forward layers of a CLIP encoder, with and without a projection head around it."""
T5_TARGETS = r"encoder\.block\.\d+\.layer\.(0\.SelfAttention\.[qkvo]|1\.DenseReluDense\.w[io](_[01])?)"
T5_LENGTH = 256

VOCABULARIES: Mapping[str, tuple[frozenset[str], ...]] = {
    "CLIPTokenizer": (frozenset({"tokenizer.json"}), frozenset({"vocab.json", "merges.txt"})),
    "T5Tokenizer": (frozenset({"tokenizer.json"}),),
}
"""Class -> sets of files of which one must be there: without, the library makes one that knows no word."""


def read_tokenizer(kind: Any, folder: Path) -> Any:
    """A tokenizer of a class of transformers. Raises LiveryError when its words are missing or broken."""
    names = {path.name for path in folder.iterdir()}
    ways = VOCABULARIES[kind.__name__]
    if not any(way <= names for way in ways):
        wanted = " and ".join(sorted(ways[-1], reverse=True))
        verb = "are" if len(ways[-1]) > 1 else "is"
        raise LiveryError(f"{folder.parent}: {folder.name}/{wanted} {verb} missing; give a whole folder")
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LiveryError(f"{folder}: cannot be read as {kind.__name__}: {error}") from None


def check_words(tokenizer: Any, tower: nn.Module, name: str, where: str) -> None:
    """Raises LiveryError when the tokenizer knows more words than its encoder, which names both numbers."""
    words, known = len(tokenizer), cast(Any, tower).config.vocab_size
    if words > known:
        raise LiveryError(
            f"{where}: the tokenizer has {words} words but {name} knows {known}; they are of different models"
        )


def vocabulary_hash(tokenizer: Any) -> str:
    return sha256_of(tokenizer.get_vocab())


def length(tokenizer: Any, tower: nn.Module) -> int:
    """Ids per prompt. Some tokenizers state no limit (a huge number): the encoder's own positions are one.

    T5 has relative positions, and no end of them: there, as many as diffusers' SD3 pipeline takes.
    """
    config = cast(Any, tower).config
    return min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", T5_LENGTH))


def pool_at_first_end(tower: nn.Module, tokenizer: Any) -> None:
    """Make a CLIP tower pool where the prompt ends, whatever words are added to its tokenizer.

    With the configurations of old (eos_token_id 2) transformers pools at the largest id: right until an
    added word has a larger one than the end has. The weights and the configuration stay as they are.
    """
    inner = getattr(tower, "text_model", tower)
    inner.eos_token_id = tokenizer.eos_token_id


def replaced(prompts: Sequence[str], placeholders: Mapping[str, str]) -> list[str]:
    """The prompts with each placeholder replaced, in one pass: what was put in is not replaced again."""
    if not placeholders:
        return list(prompts)
    longest_first = sorted(placeholders, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    return [pattern.sub(lambda found: placeholders[found[0]], prompt) for prompt in prompts]


def tokenize(tokenizer: Any, texts: list[str], length: int) -> Any:
    """-> "input_ids" and "attention_mask", each [B, length], padded and cut as diffusers' pipelines do."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
