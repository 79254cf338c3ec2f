"""The 49,408 words of CLIP, which every Stable Diffusion reads, built from the merges that ship here.

Radford et al. 2021 (arXiv:2103.00020), section 2.4. A diffusers folder carries its own tokenizer files; a
single-file checkpoint carries none, and needs these. Where they come from: `configs/clip_merges.LICENSE`.
"""

from __future__ import annotations

import gzip
import importlib.resources
import json
from functools import cache
from typing import Any

from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(pad_token: str = END, model_max_length: int = 77) -> CLIPTokenizer:
    """CLIP's tokenizer. OpenCLIP's encoders (SD 2.x, the second of SDXL and SD3) pad with "!", id 0."""
    vocabulary, merges = _words()
    pairs: Any = list(merges)  # annotated as strings, taken as pairs
    return CLIPTokenizer(
        vocab=dict(vocabulary), merges=pairs, pad_token=pad_token, model_max_length=model_max_length
    )


def is_clip_vocabulary(tokenizer: CLIPTokenizer) -> bool:
    """Whether it splits and numbers text as `clip_tokenizer` does, so that its files need not be kept."""
    theirs = json.loads(tokenizer.backend_tokenizer.to_str())
    ours = json.loads(clip_tokenizer().backend_tokenizer.to_str())
    return all(theirs[key] == ours[key] for key in ("model", "normalizer", "pre_tokenizer"))


@cache
def _words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Word -> id, and the merges in order: every byte, every byte at a word's end, each merge, two marks."""
    packed = importlib.resources.files("livery.models") / "configs" / "clip_merges.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().splitlines()
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters = _letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    return {word: index for index, word in enumerate(words)}, merges


def _letters() -> list[str]:
    """One printable character for each byte: itself where it has one, else one past Latin-1 (as GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
