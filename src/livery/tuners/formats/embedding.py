"""Textual Inversion files: one new word each, with the vectors of every text encoder that knows it.

A1111 and ComfyUI take the word from the file's name; SD 1.x and 2.x have the one tensor `emb_params`, SDXL
`clip_l` and `clip_g`, SD3 also `t5xxl`. diffusers' own `learned_embeds.safetensors` has the word as its key,
and one file for each encoder.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from livery.nouns import LiveryError
from livery.tuners.formats.content import Content
from livery.tuners.formats.names import EMBEDDING_KEYS, part_names

READ = {"emp_params": "emb_params", "t5": "t5xxl", "*": "emb_params"}
"""Keys of OneTrainer, and of A1111's pickles once converted (`*`) -> the usual ones. Read, never written."""
KEYS = ("emb_params", "clip_l", "clip_g", "t5xxl", *READ)
BUNDLE, BUNDLED_ONE = "bundle_emb.", ".string_to_param.*"


def to_embedding(vectors: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """One word's vectors by tower -> the file's tensors. LiveryError unless every encoder's are there."""
    keys = part_names(EMBEDDING_KEYS, family)
    if family == "sdxl" and (missing := sorted(keys.keys() - vectors.keys())):
        raise LiveryError(
            f"A1111 and ComfyUI want the word in both text encoders of SDXL, {missing[0]} did not learn it: "
            "train it there too, or take the format learned_embeds"
        )
    return {keys[tower]: tensor for tower, tensor in vectors.items()}


def from_embedding(
    tensors: Mapping[str, Tensor], family: str, widths: Mapping[str, int], word: str
) -> Content:
    """Vectors of one word for the towers of this base, told by key, or by width where the key is the word.

    `widths` is tower -> length of its vectors. Raises LiveryError when none fits.
    """
    towers = {key: tower for tower, key in part_names(EMBEDDING_KEYS, family).items()}
    words: dict[tuple[str, str], Tensor] = {}
    unmatched: list[str] = []
    for key, tensor in tensors.items():
        rows = tensor[None] if tensor.ndim == 1 else tensor
        known = READ.get(key, key)
        tower = towers.get(known) or (None if known in KEYS else _by_width(rows, widths))
        if tower is None or tower not in widths or rows.ndim != 2 or rows.shape[1] != widths[tower]:
            unmatched.append(key)
            continue
        words[tower, word if known in KEYS else key] = rows
    if not words:
        sizes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in tensors.items())
        raise LiveryError(
            f"no vectors for this base: the file has {sizes}, its encoders take "
            f"{', '.join(f'{width} ({tower})' for tower, width in widths.items())}; name the right base"
        )
    return Content(words=words, matched=len(words), unmatched=tuple(unmatched))


def bundled(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[tuple[str, str], Tensor], dict[str, Tensor], int]:
    """Words that a LoRA file brings along ("bundle_emb.WORD.clip_l"), the other tensors, and their count."""
    towers = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
    words: dict[tuple[str, str], Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(BUNDLE)
        word, _, key = inner.rpartition(".")
        if not name.startswith(BUNDLE):
            rest[name] = tensor
        elif inner.endswith(BUNDLED_ONE):
            words["text_encoder", inner.removesuffix(BUNDLED_ONE)] = tensor
        elif READ.get(key, key) in towers:
            words[towers[READ.get(key, key)], word] = tensor
        else:
            rest[name] = tensor
    return words, rest, len(words)


def _by_width(rows: Tensor, widths: Mapping[str, int]) -> str | None:
    """The one tower whose vectors are this long; none when several are."""
    fitting = [tower for tower, width in widths.items() if rows.ndim == 2 and rows.shape[1] == width]
    return fitting[0] if len(fitting) == 1 else None
