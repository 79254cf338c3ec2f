import csv
import hashlib
import io
import json
import os
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from livery.data import source as source_module
from livery.data.ingest import ingest
from livery.nouns import Dataset, Event, Ingested, LiveryError, Note, Photo, Progress, Refused
from livery.store import Store

RED, BLUE = (200, 30, 40), (20, 40, 210)


def picture(
    colour: tuple[int, ...] = RED, kind: str = "PNG", size: tuple[int, int] = (8, 6), **save: Any
) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(file, kind, **save)
    return file.getvalue()


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


class Taken:
    """What one ingest did."""

    def __init__(self, source: Path, **options: Any) -> None:
        self.blobs: dict[str, bytes] = {}
        self.events: list[Event] = []
        self.error = ""
        try:
            for event in ingest(source, self.put, **options):
                self.events.append(event)
        except LiveryError as error:
            self.error = str(error)

    def put(self, content: bytes) -> str:
        sha = hashlib.sha256(content).hexdigest()
        self.blobs[sha] = content
        return sha

    @property
    def dataset(self) -> Dataset:
        assert not self.error, self.error
        last = self.events[-1]
        assert isinstance(last, Ingested)
        return last.dataset

    @property
    def refused(self) -> dict[str, str]:
        return {event.file: event.reason for event in self.events if isinstance(event, Refused)}

    @property
    def notes(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Note)]

    def photo(self, name: str) -> Photo:
        return next(photo for photo in self.dataset.photos if photo.source == name)

    def pixels(self, name: str) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.blobs[self.photo(name).sha256])))


# What is read


def test_a_folder_with_sidecars(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.png": picture(RED),
            "a.txt": "a red card\n\na card, red\n",
            "deep/b.JPG": picture(BLUE, "JPEG"),
            "deep/b.JPG.txt": "\ufeffa blue card",
            "c.webp": picture((0, 0, 0), "WEBP"),
            "README.pdf": "%PDF",
            ".DS_Store": "x",
        },
    )
    taken = Taken(tmp_path, name="brand", licence="CC-BY-4.0", attribution="Ann")
    assert [photo.source for photo in taken.dataset.photos] == ["a.png", "c.webp", "deep/b.JPG"]
    assert taken.photo("a.png").captions == ("a red card", "a card, red")
    assert taken.photo("deep/b.JPG").caption == "a blue card"
    assert taken.photo("c.webp").caption == ""
    assert taken.dataset.name == "brand"
    assert {(photo.licence, photo.attribution) for photo in taken.dataset.photos} == {("CC-BY-4.0", "Ann")}
    assert taken.refused == {}
    assert taken.notes == ["not pictures, left alone: README.pdf"]
    assert [event.done for event in taken.events if isinstance(event, Progress)] == [1, 2, 3]


def test_what_is_stored_is_a_bare_rgb_png_with_the_same_pixels(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    taken = Taken(tmp_path)
    photo = taken.photo("a.png")
    stored = Image.open(io.BytesIO(taken.blobs[photo.sha256]))
    assert (stored.format, stored.mode, stored.size) == ("PNG", "RGB", (photo.width, photo.height))
    assert np.array_equal(np.asarray(stored), noise)
    assert stored.info == {}


def test_it_goes_into_a_store(tmp_path: Path) -> None:
    write(tmp_path / "photos", {"a.png": picture()})
    store = Store(tmp_path / "workspace")
    last = list(ingest(tmp_path / "photos", store.put_blob))[-1]
    assert isinstance(last, Ingested)
    assert last.dataset.name == "photos"
    assert store.get(Dataset, store.put(last.dataset)) == last.dataset


def test_the_same_folder_gives_the_same_dataset(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {f"{number}.png": picture((number, 0, 0)) for number in range(9)}
    one, two = (
        write(tmp_path / "one" / "x", files),
        write(tmp_path / "two" / "x", dict(reversed(files.items()))),
    )
    assert Taken(one, validation=0.3).dataset.id == Taken(two, validation=0.3).dataset.id


ROWS = [
    {"file_name": "train/a.png", "text": "a red card", "mood": "warm", "size": 3, "license": "MIT"},
    {"file_name": "validation/b.png", "text": "a blue card", "mood": "", "size": None, "license": "CC0-1.0"},
]


def imagefolder(kind: str) -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {"train/a.png": picture(RED), "validation/b.png": picture(BLUE)}
    if kind == "jsonl":
        files["metadata.jsonl"] = "\n".join(json.dumps(row) for row in ROWS)
    else:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
        files["metadata.csv"] = text.getvalue()
    return files


def zipped(path: Path, files: dict[str, bytes | str], **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("pack", [write, lambda root, files: zipped(root / "brand.zip", files)])
def test_an_imagefolder(tmp_path: Path, kind: str, pack: Callable[..., Path]) -> None:
    taken = Taken(pack(tmp_path, imagefolder(kind)), licence="all rights reserved")
    a, b = taken.photo("train/a.png"), taken.photo("validation/b.png")
    assert (a.caption, a.split, a.licence) == ("a red card", "train", "MIT")
    assert a.attributes == {"mood": "warm", "size": "3"}
    assert (b.caption, b.split, b.licence, b.attributes) == ("a blue card", "validation", "CC0-1.0", {})
    assert taken.refused == {}


def test_metadata_inside_a_split_speaks_of_its_own_folder(tmp_path: Path) -> None:
    row = json.dumps({"file_name": "a.png", "caption": "red", "captions": ["red", "crimson"]})
    taken = Taken(write(tmp_path, {"brand/test/a.png": picture(), "brand/test/metadata.jsonl": row}))
    assert taken.photo("brand/test/a.png").captions == ("red", "crimson")
    assert taken.photo("brand/test/a.png").split == "test"


def test_a_zip_is_like_its_folder(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {"x/a.png": picture(), "x/a.txt": "red", "__MACOSX/x/._a.png": "junk"}
    folder = Taken(write(tmp_path / "folder", files), name="brand")
    archive = Taken(zipped(tmp_path / "brand.zip", files, compression=zipfile.ZIP_DEFLATED))
    assert archive.dataset.id == folder.dataset.id
    assert archive.refused == {}


# What is changed


def test_turned_upright_and_stripped(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its left side
    exif.get_ifd(0x8825)[1] = "N"
    exif.get_ifd(0x8769)[0x9003] = "2026:01:01 00:00:00"
    image = Image.new("RGB", (16, 8), RED)
    image.paste(BLUE, (0, 0, 8, 8))
    image.save(tmp_path / "a.jpg", exif=exif, xmp=b"<x:xmpmeta/>", comment="by Ann", quality=95)
    taken = Taken(tmp_path)
    photo = taken.photo("a.jpg")
    assert (photo.width, photo.height) == (8, 16)
    assert taken.pixels("a.jpg")[2, 4, 2] > 150  # blue is on top now
    assert taken.pixels("a.jpg")[13, 4, 0] > 150
    assert taken.notes == ["a.jpg: EXIF, GPS, camera, XMP, comment metadata removed, turned upright"]
    assert "turned upright: 1 of 1" in taken.dataset.notes
    stored = Image.open(io.BytesIO(taken.blobs[photo.sha256]))
    assert not stored.getexif()
    assert stored.info == {}


@given(colour=st.tuples(*[st.integers(0, 255)] * 4), ground=st.tuples(*[st.integers(0, 255)] * 3))
@settings(max_examples=40, deadline=None)
def test_transparency_is_laid_on_the_stated_colour(
    tmp_path_factory: pytest.TempPathFactory, colour: tuple[int, int, int, int], ground: tuple[int, int, int]
) -> None:
    folder = tmp_path_factory.mktemp("alpha")
    write(folder, {"a.png": picture(colour)})
    background = "#{:02x}{:02x}{:02x}".format(*ground)
    taken = Taken(folder, background=background)
    alpha = colour[3] / 255
    expected = [alpha * over + (1 - alpha) * under for over, under in zip(colour, ground, strict=False)]
    assert taken.pixels("a.png")[0, 0] == pytest.approx(expected, abs=1)
    assert taken.dataset.background == background
    assert bool(taken.dataset.notes) == (colour[3] < 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((6, 8), 200 * 256, np.uint16))
    else:
        image = Image.new("RGB", (8, 6), (200, 200, 200) if mode != "1" else (255, 255, 255)).convert(mode)
    image.save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    photo = (taken := Taken(tmp_path)).dataset.photos[0]
    pixels = taken.pixels(photo.source)
    assert pixels.shape == (6, 8, 3)
    assert abs(int(pixels.mean()) - (255 if mode == "1" else 200)) <= 2


def test_a_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (8, 6), 1)
    image.putpalette([0, 0, 0, *RED])
    image.save(tmp_path / "a.png", transparency=1)
    assert Taken(tmp_path, background="blue").pixels("a.png")[0, 0].tolist() == [0, 0, 255]


def test_a_colour_profile_is_applied_before_it_is_dropped(tmp_path: Path) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    write(
        tmp_path, {"a.png": picture(RED, icc_profile=srgb), "b.png": picture(BLUE, icc_profile=b"nonsense")}
    )
    write(tmp_path, {"c.png": picture((1, 2, 3), icc_profile=lab)})  # not a profile for RGB pixels
    taken = Taken(tmp_path)
    assert [taken.pixels(name)[0, 0].tolist() for name in ("a.png", "b.png", "c.png")] == [
        list(RED),
        list(BLUE),
        [1, 2, 3],
    ]


def blue_for_red() -> bytes:
    """An RGB profile that says its red is what sRGB calls blue, and the other way round."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace("sRGB".encode("utf-16-be"), "xRGB".encode("utf-16-be"))
    return profile.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


@pytest.mark.parametrize(("colour", "seen"), [((255, 0, 0), (0, 0, 255)), ((255, 0, 0, 255), (0, 0, 255))])
def test_colours_become_those_that_the_profile_means(
    tmp_path: Path, colour: tuple[int, ...], seen: tuple[int, int, int]
) -> None:
    taken = Taken(write(tmp_path, {"a.png": picture(colour, icc_profile=blue_for_red())}))
    assert taken.pixels("a.png")[0, 0] == pytest.approx(seen, abs=3)
    assert taken.notes == ["a.png: colours converted to sRGB"]


def test_broken_metadata_loses_no_picture(tmp_path: Path) -> None:
    content = picture(kind="JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    taken = Taken(write(tmp_path, {"a.jpg": content}))
    assert taken.refused == {}
    assert "metadata removed" in taken.notes[0]


def test_a_jpeg_named_png_is_taken_for_what_it_is(tmp_path: Path) -> None:
    assert Taken(write(tmp_path, {"a.png": picture(kind="JPEG")})).photo("a.png").width == 8


# What is refused: one line each, and the good one is never lost


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size in its header and has no such pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def animated(kind: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 6), colour) for colour in (RED, BLUE)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def noisy(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


BAD: dict[str, tuple[str, bytes, str]] = {
    "truncated png": ("bad.png", noisy("PNG")[:-4000], "is cut short"),
    "truncated jpeg": ("bad.jpg", noisy("JPEG")[:-1000], "is cut short"),
    "truncated webp": ("bad.webp", noisy("WEBP")[:-1000], "is cut short"),
    "only a header": ("bad.png", picture()[:12], "is cut short"),
    "broken": ("bad.png", picture()[:45] + b"\xff" * 8 + picture()[53:], "is broken"),
    "bomb": ("bad.png", bomb(9000, 9000), "has 9000 x 9000 pixels, over the cap of 64,000,000"),
    "huge bomb": ("bad.png", bomb(200_000, 200_000), "is far over the cap of 64,000,000 pixels"),
    "text": ("bad.png", b"hello, I am no picture", "is not an image"),
    "empty": ("bad.jpg", b"", "is not an image"),
    "gif": ("bad.gif", picture(kind="GIF"), "is GIF, which livery does not read"),
    "gif named png": ("bad.png", picture(kind="GIF"), "is GIF, which livery does not read"),
    "tiff": ("bad.tif", picture(kind="TIFF"), "is TIFF, which livery does not read"),
    "bmp": ("bad.bmp", picture(kind="BMP"), "is BMP, which livery does not read"),
    "svg": ("bad.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is SVG, which livery does not read"),
    "heic": ("bad.heic", b"\0\0\0\x18ftypheic" + b"\0" * 64, "is HEIC, which livery does not read"),
    "unnamed png": ("bad.dat", picture(), "is PNG by content but is not named so: rename it to .png"),
    "animated png": ("bad.png", animated("PNG"), "is animated"),
    "animated webp": ("bad.webp", animated("WEBP"), "is animated"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("pack", [write, lambda root, files: zipped(root / "brand.zip", files)])
def test_a_bad_file_is_one_line_and_the_rest_is_taken(
    tmp_path: Path, case: str, pack: Callable[..., Path]
) -> None:
    name, content, reason = BAD[case]
    source = pack(tmp_path, {"aaa.png": picture(BLUE), name: content, "zzz.png": picture((1, 2, 3))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taken = Taken(source)
    assert list(taken.refused) == [name]
    assert taken.refused[name].startswith(reason)
    assert [photo.source for photo in taken.dataset.photos] == ["aaa.png", "zzz.png"]
    assert len(taken.blobs) == 2


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_damage_escapes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever bytes change in a picture, it is taken or refused, and the good one stays."""
    kind, suffix = data.draw(st.sampled_from([("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")]))
    content = bytearray(picture(RED, kind, exif=Image.Exif(), icc_profile=b"x" * 200))
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)))):
        content[place] = value
    folder = write(
        tmp_path_factory.mktemp("damage"),
        {
            f"bad.{suffix}": bytes(content[: data.draw(st.integers(0, len(content)))]),
            "good.png": picture(BLUE),
        },
    )
    taken = Taken(folder, max_pixels=10_000)
    assert taken.photo("good.png")
    assert len(taken.dataset.photos) + len(taken.refused) == 2


def test_the_pixel_cap_is_the_callers(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(size=(8, 6)), "b.png": picture(BLUE, size=(7, 7))})
    assert list(Taken(tmp_path, max_pixels=48).refused) == ["b.png"]


def test_captions_where_they_are_required(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(), "a.txt": "  \n", "b.png": picture(BLUE), "b.txt": "blue"})
    taken = Taken(tmp_path, require_captions=True)
    assert taken.refused == {"a.png": "has no caption: write one into a.txt beside it"}
    assert taken.photo("b.png").caption == "blue"


def test_a_sidecar_that_is_not_utf8(tmp_path: Path) -> None:
    taken = Taken(write(tmp_path, {"a.png": picture(), "a.txt": "café".encode("latin-1")}))
    assert taken.refused == {"a.txt": "is not UTF-8 text: save it as UTF-8"}
    assert taken.photo("a.png").captions == ()


def test_the_same_picture_twice_is_kept_once(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(), "a.txt": "red", "b.webp": picture(kind="WEBP", lossless=True)})
    taken = Taken(write(tmp_path, {"b.txt": "crimson"}))
    assert taken.refused["b.webp"].startswith("is the same picture as a.png")
    assert taken.photo("a.png").captions == ("red", "crimson")


def test_bad_metadata_lines_cost_only_themselves(tmp_path: Path) -> None:
    good = json.dumps({"file_name": "a.png", "text": "red"})
    lines = [
        "{oops",
        "[1]",
        '{"text": "x"}',
        '{"file_name": "../up.png"}',
        '{"file_name": "a.png", "text": "\\ud800"}',
    ]
    write(tmp_path.parent, {"up.png": picture(BLUE)})
    taken = Taken(write(tmp_path, {"a.png": picture(), "metadata.jsonl": "\n".join([*lines, good])}))
    assert [reason.split(" (")[0] for reason in taken.refused.values()] == [
        "is not JSON",
        "is not a JSON object",
        "has no file_name",
        "speaks of ../up.png, which is not there",
        "is not JSON",
    ]
    assert next(iter(taken.refused)) == "metadata.jsonl, line 1"
    assert taken.photo("a.png").captions == ("red",)


def test_a_csv_that_breaks_off(tmp_path: Path) -> None:
    text = "file_name,text\na.png,red\nb.png," + "x" * 200_000
    taken = Taken(write(tmp_path, {"a.png": picture(), "b.png": picture(BLUE), "metadata.csv": text}))
    assert "is not CSV" in taken.refused["metadata.csv, line 3"]
    assert taken.photo("a.png").caption == "red"


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_links_that_lead_astray(tmp_path: Path) -> None:
    folder = write(tmp_path / "brand", {"a.png": picture(), "sub/b.png": picture(BLUE)})
    write(tmp_path, {"secret/c.png": picture((1, 2, 3))})
    (folder / "inside.png").symlink_to("a.png")
    (folder / "out.png").symlink_to("../secret/c.png")
    (folder / "outside").symlink_to("../secret")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "again").symlink_to("sub")
    os.mkfifo(folder / "pipe.png")
    taken = Taken(folder)
    assert taken.refused["out.png"].startswith("is a link that leads out of the folder")
    assert taken.refused["outside"].startswith("is a link that leads out of the folder")
    assert taken.refused["gone.png"].startswith("is a link that leads nowhere")
    assert taken.refused["again"].startswith("is a link to a folder")
    assert taken.refused["pipe.png"] == "is not a regular file"
    assert taken.refused["inside.png"].startswith("is the same picture as a.png")
    assert len(taken.dataset.photos) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_text(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture()})
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(picture(BLUE))
    assert list(Taken(tmp_path).refused.values()) == ["has a name that is not UTF-8: rename it"]


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(), "b.png": picture(BLUE)})
    (tmp_path / "b.png").chmod(0)
    assert Taken(tmp_path).refused["b.png"].startswith("cannot be read")


def test_a_file_over_the_size_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "MAX_FILE_BYTES", 1 << 10)
    write(tmp_path, {"a.png": picture(), "b.png": noisy("PNG")})
    assert Taken(tmp_path).refused["b.png"].startswith("is larger than")


# Archives that mean harm


@pytest.mark.parametrize(
    "name", ["../evil.png", "/evil.png", "a/../../evil.png", "C:\\evil.png", "..\\evil.png"]
)
def test_names_that_lead_out_of_a_zip(tmp_path: Path, name: str) -> None:
    taken = Taken(zipped(tmp_path / "brand.zip", {name: picture(BLUE), "a.png": picture()}))
    assert list(taken.refused.values()) == ["has a name that leads out of the zip"]
    assert len(taken.dataset.photos) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["brand.zip"]


def test_links_and_doubles_in_a_zip(tmp_path: Path) -> None:
    path = zipped(tmp_path / "brand.zip", {"a.png": picture()})
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(link, "/etc/passwd")
        archive.writestr("a.png", picture(BLUE))
    taken = Taken(path)
    assert taken.refused["link.png"].startswith("is a link")
    assert taken.refused["a.png"].startswith("is in the zip twice")
    assert taken.pixels("a.png")[0, 0].tolist() == list(RED)


def test_an_encrypted_entry(tmp_path: Path) -> None:
    path = zipped(tmp_path / "brand.zip", {"a.png": picture(), "b.png": picture(BLUE)})
    content = bytearray(path.read_bytes())
    content[content.rfind(b"PK\x01\x02") + 8] |= 1  # the last entry's flags
    path.write_bytes(content)
    assert Taken(path).refused["b.png"].startswith("is encrypted")


def test_a_damaged_entry(tmp_path: Path) -> None:
    path = zipped(tmp_path / "brand.zip", {"a.png": picture(), "b.png": noisy("PNG")})
    content = bytearray(path.read_bytes())
    content[content.find(b"b.png") + 2000] ^= 0xFF
    path.write_bytes(content)
    taken = Taken(path)
    assert taken.refused["b.png"].startswith("is broken inside the zip")
    assert len(taken.dataset.photos) == 1


def test_zip_bombs_are_refused_whole_before_anything_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "brand.zip"
    zipped(path, {"a.txt": b"\0" * (20 << 20), "a.png": picture()}, compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("something was unpacked"))
    assert "looks like a zip bomb" in Taken(path).error
    monkeypatch.setattr(source_module, "MAX_ARCHIVE_BYTES", 1 << 20)
    assert "over the limit of 1,048,576" in Taken(path).error
    monkeypatch.setattr(source_module, "MAX_ENTRIES", 1)
    assert "2 files, over the limit of 1" in Taken(path).error


# Sources and rules that make no sense


def test_sources_that_are_none(tmp_path: Path) -> None:
    write(tmp_path, {"text.zip": "hello", "empty/readme.md": "hello", "bad/a.png": "hello"})
    assert "there is no such folder" in Taken(tmp_path / "nowhere").error
    assert "neither a folder nor a zip" in Taken(tmp_path / "text.zip").error
    assert "no picture could be taken, 0 files were refused" in Taken(tmp_path / "empty").error
    bad = Taken(tmp_path / "bad")
    assert "1 files were refused" in bad.error
    assert list(bad.refused) == ["a.png"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"background": "reddish"}, "'reddish' is no colour"),
        ({"validation": 1.0}, "validation is 1.0"),
        ({"validation": -0.1}, "validation is -0.1"),
        ({"max_pixels": 0}, "max_pixels is 0"),
    ],
)
def test_rules_that_make_no_sense(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    assert words in Taken(write(tmp_path, {"a.png": picture()}), **options).error


# Splits


@pytest.mark.parametrize(("share", "held"), [(0.0, 0), (0.01, 1), (0.25, 5), (0.99, 19)])
def test_a_share_is_held_out(tmp_path: Path, share: float, held: int) -> None:
    write(tmp_path, {f"{number}.png": picture((number, 9, 9)) for number in range(20)})
    dataset = Taken(tmp_path, validation=share).dataset
    assert len(dataset.split("validation")) == held
    assert len(dataset.split("train")) == 20 - held


def test_the_seed_chooses_what_is_held_out(tmp_path: Path) -> None:
    write(tmp_path, {f"{number}.png": picture((number, 9, 9)) for number in range(20)})
    held = [Taken(tmp_path, validation=0.5, seed=seed).dataset.split("validation") for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]


def test_a_source_keeps_its_own_validation(tmp_path: Path) -> None:
    dataset = Taken(write(tmp_path, imagefolder("jsonl")), validation=0.5).dataset
    assert [photo.split for photo in dataset.photos] == ["train", "validation"]


# Masks, class photos, repeats and weights


def half_seen() -> bytes:
    """Left half opaque red, right half as good as invisible blue."""
    image = Image.new("RGBA", (8, 6), (*BLUE, 0))
    image.paste((*RED, 255), (0, 0, 4, 6))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def grey_of(taken: Taken, name: str) -> np.ndarray:
    mask = taken.photo(name).mask
    assert mask is not None
    image = Image.open(io.BytesIO(taken.blobs[mask]))
    assert (image.format, image.mode) == ("PNG", "L")
    return np.asarray(image)


def test_transparency_becomes_the_mask_when_asked_for(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": half_seen(), "b.png": picture(RED)})
    taken = Taken(tmp_path, masks="alpha")
    assert np.array_equal(grey_of(taken, "a.png"), [[255] * 4 + [0] * 4] * 6)
    assert taken.photo("b.png").mask is None
    plain = Taken(tmp_path)
    assert plain.photo("a.png").mask is None
    assert plain.photo("a.png").sha256 == taken.photo("a.png").sha256  # the pixels are the same


def test_a_mask_is_turned_with_its_picture(tmp_path: Path) -> None:
    image = Image.open(io.BytesIO(half_seen()))
    exif = image.getexif()
    exif[0x0112] = 6  # stored lying on its side
    image.save(tmp_path / "a.png", exif=exif)
    taken = Taken(tmp_path, masks="alpha")
    assert (taken.photo("a.png").width, taken.photo("a.png").height) == (6, 8)
    assert np.array_equal(grey_of(taken, "a.png"), [[255] * 6] * 4 + [[0] * 6] * 4)


def test_mask_files_are_masks_and_never_pictures(tmp_path: Path) -> None:
    mask = Image.new("L", (8, 6), 0)
    mask.paste(255, (2, 0, 8, 6))
    file = io.BytesIO()
    mask.save(file, "PNG")
    files: dict[str, bytes | str] = {
        "a.jpg": picture(RED, "JPEG"),
        "a.txt": "red",
        "a-masklabel.png": file.getvalue(),
        "deep/b.png": picture(BLUE),
        "deep/b.mask.png": file.getvalue(),
        "c.webp": picture((0, 9, 0), "WEBP"),
        "c.webp.mask.png": file.getvalue(),
        "lonely.mask.png": picture((9, 9, 9)),
    }
    write(tmp_path, files)
    taken = Taken(tmp_path, masks="files")
    sources = ["a.jpg", "c.webp", "deep/b.png", "lonely.mask.png"]
    assert [photo.source for photo in taken.dataset.photos] == sources
    for name in sources[:3]:
        assert np.array_equal(grey_of(taken, name), [[0] * 2 + [255] * 6] * 6)
    assert taken.photo("lonely.mask.png").mask is None
    ignoring = Taken(tmp_path)
    assert [photo.source for photo in ignoring.dataset.photos] == sources
    assert not any(photo.mask for photo in ignoring.dataset.photos)
    assert any("masks, left alone" in note for note in ignoring.notes)


def test_a_mask_of_another_shape_or_broken_costs_the_mask_alone(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.png": picture(RED),
            "a.mask.png": picture((9, 9, 9), size=(8, 8)),
            "b.png": picture(BLUE),
            "b.mask.png": b"\x89PNG\r\n\x1a\nnot really",
            "c.png": picture((0, 9, 0)),
            "c.mask.png": picture((255, 255, 255), size=(16, 12)),  # twice as fine: the same shape
        },
    )
    taken = Taken(tmp_path, masks="files")
    assert taken.refused["a.mask.png"] == (
        "is a mask of 8 x 8 pixels for a picture of 8 x 6: give it the same shape"
    )
    assert taken.refused.keys() == {"a.mask.png", "b.mask.png"}
    assert [photo.mask is None for photo in taken.dataset.photos] == [True, True, False]


def test_a_dataset_with_masks_goes_into_a_store(tmp_path: Path) -> None:
    write(tmp_path / "photos", {"a.png": half_seen()})
    store = Store(tmp_path / "workspace")
    last = list(ingest(tmp_path / "photos", store.put_blob, masks="alpha"))[-1]
    assert isinstance(last, Ingested)
    store.put(last.dataset)
    assert list(store.verify()) == []


def test_class_photos_are_told_by_their_folder_and_never_held_out(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {}
    for number in range(10):
        files[f"_class/dogs/{number}.png"] = picture((number, 0, 0))
        files[f"mine/{number}.png"], files[f"mine/{number}.txt"] = picture((0, number + 1, 0)), "my dog"
    dataset = Taken(write(tmp_path, files), validation=0.5, require_captions=True).dataset
    of_class = [photo for photo in dataset.photos if photo.prior]
    assert sorted(photo.source for photo in of_class) == [f"_class/dogs/{n}.png" for n in range(10)]
    assert {photo.split for photo in of_class} == {"train"}
    assert len(dataset.split("validation")) == 5


def test_repeats_and_weights_come_from_metadata(tmp_path: Path) -> None:
    rows = [
        {"file_name": "a.png", "repeats": 3, "loss_weight": 0.5, "weight": "2 kg"},
        {"file_name": "b.png"},
        {"file_name": "c.png", "repeats": "0"},
        {"file_name": "d.png", "loss_weight": "heavy"},
        {"file_name": "e.png", "loss_weight": "nan"},
    ]
    files: dict[str, bytes | str] = {f"{x}.png": picture((i, 0, 0)) for i, x in enumerate("abcde")}
    taken = Taken(write(tmp_path, {**files, "metadata.jsonl": "\n".join(json.dumps(row) for row in rows)}))
    a, b = taken.photo("a.png"), taken.photo("b.png")
    assert (a.repeats, a.weight, a.attributes) == (3, 0.5, {"weight": "2 kg"})
    assert (b.repeats, b.weight) == (1, 1.0)
    assert taken.refused == {
        "c.png": "has repeats '0' in its metadata: give a number above 0",
        "d.png": "has loss_weight 'heavy' in its metadata: give a number above 0",
        "e.png": "has loss_weight 'nan' in its metadata: give a number above 0",
    }
