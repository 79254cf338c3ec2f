"""Photos and datasets."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from livery.nouns.base import Noun, Sha256, Split


class Photo(Noun):
    """One image by content hash (of the stored PNG), with what is known of it."""

    sha256: Sha256
    width: PositiveInt
    height: PositiveInt
    captions: tuple[str, ...] = ()
    split: Split = "train"
    attributes: dict[str, str] = Field(default={})
    source: str = Field(default="", description="file name it came from")
    licence: str = Field(default="", description="SPDX id where there is one")
    attribution: str = ""
    consent: str = ""
    weight: PositiveFloat = Field(default=1.0, description="of its rows in the loss")
    repeats: PositiveInt = Field(default=1, description="times it is shown in each epoch")
    mask: Sha256 | None = Field(default=None, description="blob of a grey PNG: white = learn this")
    prior: bool = Field(default=False, description="shows the class, not the subject: DreamBooth")

    @property
    def caption(self) -> str:
        """The first caption, or the empty string."""
        return self.captions[0] if self.captions else ""


class Dataset(Noun):
    """An immutable manifest of photos; each photo carries its split."""

    name: str
    photos: tuple[Photo, ...]
    background: str = Field(default="#ffffff", description="colour that transparency was laid on")
    notes: tuple[str, ...] = ()
    parent: Sha256 | None = None

    def split(self, name: Split) -> tuple[Photo, ...]:
        """The photos of one split, in the manifest's order."""
        return tuple(photo for photo in self.photos if photo.split == name)
