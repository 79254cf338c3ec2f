"""Judges: what turns pictures and texts into unit vectors that can be compared.

CLIP is Radford et al. 2021, arXiv:2103.00020; label texts are ranked as in its section 3.1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field, NonNegativeFloat
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import normalize

from livery.models.checkpoint import quiet
from livery.nouns import LiveryError, Noun

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BATCH = 64  # pictures or texts at a time: bounds memory


class JudgeCard(Noun):
    """What a judge's folder says of itself in `livery.json`: its label texts and how far to trust it."""

    name: str = ""
    concept_template: str = Field(default="a {concept}", description="label text of one concept")
    style_template: str = Field(default="{style} style", description="label text of one style")
    reliability: dict[str, NonNegativeFloat] = Field(
        default={},
        description="shares right on held-out pictures: concept_top5, style; their number: held_out",
    )

    def concept_texts(self, concepts: Sequence[str]) -> list[str]:
        return [self.concept_template.replace("{concept}", concept) for concept in concepts]

    def style_texts(self, styles: Sequence[str]) -> list[str]:
        return [self.style_template.replace("{style}", style) for style in styles]


class Embedder(Protocol):
    """A judge. Each row depends on its own input only (but for rounding)."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str:
        """Hash of all that its answers depend on."""
        ...

    @property
    def card(self) -> JudgeCard: ...
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """N pictures of any size -> float32 [N, D], each row of length 1."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """M texts -> float32 [M, D], each row of length 1."""
        ...


@dataclass(frozen=True)
class Preprocessing:
    """What a CLIP image processor does, without torchvision: resize, centre crop, normalise."""

    resize: tuple[int, int] | int  # (height, width), or the shorter side
    crop: tuple[int, int]  # (height, width)
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resample: Image.Resampling = Image.Resampling.BICUBIC

    @classmethod
    def read(cls, folder: Path, image_size: int) -> Self:
        """From `preprocessor_config.json` where there is one, else CLIP's own at `image_size` pixels."""
        path = folder / "preprocessor_config.json"
        values: dict[str, Any] = _read_json(path) if path.exists() else {}
        size = values.get("size", image_size)
        resize = size if isinstance(size, int) else size.get("shortest_edge") or _height_width(size)
        crop = values.get("crop_size", image_size) if values.get("do_center_crop", True) else resize
        return cls(
            resize,
            _height_width(crop),
            tuple(values.get("image_mean", CLIP_MEAN)),
            tuple(values.get("image_std", CLIP_STD)),
            Image.Resampling(values.get("resample", Image.Resampling.BICUBIC)),
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """A picture -> float32 [3, height, width], normalised."""
        small = _on_white(image).resize(self._size(image), self.resample)
        height, width = self.crop
        left, top = (small.width - width) // 2, (small.height - height) // 2
        cut = small.crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.asarray(cut, dtype=np.float32) / 255).permute(2, 0, 1)
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (pixels - mean[:, None, None]) / std[:, None, None]

    def _size(self, image: Image.Image) -> tuple[int, int]:
        """(width, height) after the resize."""
        if not isinstance(self.resize, int):
            return self.resize[1], self.resize[0]
        short, long = sorted(image.size)
        longer = int(self.resize * long / short)
        return (self.resize, longer) if image.width <= image.height else (longer, self.resize)


class ClipEmbedder:
    """Any CLIP folder of the transformers library: safetensors weights, a tokenizer, offline."""

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        preprocessing: Preprocessing,
        *,
        name: str,
        sha256: str,
        card: JudgeCard,
    ) -> None:
        self.name, self.sha256, self.card = name, sha256, card
        self._model, self._tokenizer, self._preprocessing = model, tokenizer, preprocessing
        self._facts: Any = model.config

    @classmethod
    def load(cls, folder: Path, *, name: str = "", device: str = "cpu") -> Self:
        """Read a folder; `name`: else the card's, else the folder's. Raises LiveryError on a missing part."""
        from transformers import CLIPModel, CLIPTokenizer

        for part in ("config.json", "*.safetensors", "vocab.json|tokenizer.json"):
            if not any(list(folder.glob(pattern)) for pattern in part.split("|")):
                raise LiveryError(
                    f"{folder}: no {part.replace('|', ' or ')}; give a folder with a CLIP model."
                )
        try:
            with quiet():
                loaded: Any = CLIPModel.from_pretrained(
                    folder,
                    local_files_only=True,
                    use_safetensors=True,
                    output_loading_info=True,
                    dtype=torch.float32,  # weights may rest in half precision; processors are slow at that
                )
                model, told = loaded
                tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise LiveryError(f"{folder}: not a CLIP model that can be read: {error}") from error
        if told["missing_keys"]:  # transformers would fill them with random numbers
            raise LiveryError(f"{folder}: its weights lack {min(told['missing_keys'])}; save it again whole.")
        facts: Any = model.config
        preprocessing = Preprocessing.read(folder, facts.vision_config.image_size)
        card = JudgeCard.parse(_read_json(folder / "livery.json", {}), str(folder / "livery.json"))
        model.eval().requires_grad_(False)
        torch.nn.Module.to(model, device)
        sha256 = folder_sha256(folder)
        return cls(
            model, tokenizer, preprocessing, name=name or card.name or folder.name, sha256=sha256, card=card
        )

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """N pictures of any size -> float32 [N, D] on the CPU, each row of length 1."""
        rows = [torch.empty(0, self._facts.projection_dim)]
        for start in range(0, len(images), BATCH):
            pixels = torch.stack([self._preprocessing(image) for image in images[start : start + BATCH]])
            pooled = self._model.vision_model(pixel_values=pixels.to(self._model.device)).pooler_output
            rows.append(normalize(self._model.visual_projection(pooled).float(), dim=-1).cpu())
        return torch.cat(rows)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """M texts, cut at the model's own length -> float32 [M, D] on the CPU, each row of length 1."""
        rows = [torch.empty(0, self._facts.projection_dim)]
        length = self._facts.text_config.max_position_embeddings
        for start in range(0, len(texts), BATCH):
            # Always padded to the full length, so that a text's vector does not hang on its neighbours.
            tokens = self._tokenizer(
                list(texts[start : start + BATCH]),
                padding="max_length",
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).to(self._model.device)
            pooled = self._model.text_model(**tokens).pooler_output
            rows.append(normalize(self._model.text_projection(pooled).float(), dim=-1).cpu())
        return torch.cat(rows)


def load_embedder(source: str | Path = "starter", *, device: str = "cpu") -> ClipEmbedder:
    """The judge that ships inside ("starter"), or a folder with a CLIP model. Raises LiveryError."""
    if source == "starter":
        inside = Path(str(files("livery") / "starter" / "judge"))
        return ClipEmbedder.load(inside, device=device)
    return ClipEmbedder.load(Path(source), device=device)


def folder_sha256(folder: Path) -> str:
    """Hash over names and contents of the files that a judge's answers depend on."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in {".json", ".safetensors", ".txt"}:
            with path.open("rb") as file:
                total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _read_json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    if missing is not None and not path.exists():
        return missing
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise LiveryError(f"{path}: not JSON: {error}; mend or remove it.") from None


def _height_width(size: int | dict[str, int] | tuple[int, int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return (size["height"], size["width"]) if isinstance(size, dict) else size


def _on_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white instead of whatever colour lies hidden under it."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
