"""From the bytes of a picture file to clean pixels: what the file says, no more, no less."""

import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, ImageOps

from livery.data.source import Unreadable

FORMATS = ("PNG", "JPEG", "WEBP")
EXTENSIONS = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp"}

_GPS, _EXIF, _ORIENTATION = 0x8825, 0x8769, 0x0112
_HEIF = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC", b"avif": "AVIF", b"avis": "AVIF"}
_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"8BPS": "PSD",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
}


@dataclass(frozen=True)
class Clean:
    """A picture as the workspace keeps it: an RGB PNG without metadata, and what was done to get there."""

    png: bytes
    width: int
    height: int
    removed: tuple[str, ...]  # groups of metadata, such as "GPS"
    turned: bool
    laid_on_background: bool
    colours_converted: bool
    opacity: bytes | None = None  # a grey PNG, white where the picture is opaque; none = everywhere


def sniff(head: bytes) -> str | None:
    """The image format that a file's first bytes (64 or more) say it has, or none."""
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return _HEIF.get(head[8:12])
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0":
        return "BMP"
    if head.lstrip().startswith((b"<svg", b"<?xml")) and b"<svg" in head:
        return "SVG"
    return None


def clean(content: bytes, background: tuple[int, int, int], max_pixels: int) -> Clean:
    """Decode a PNG, JPEG or WebP file.

    Turned upright by its EXIF orientation, converted to sRGB by its colour profile, laid on
    `background` (0-255 each) where it is transparent. Raises Unreadable: over `max_pixels` (seen
    from the header, before any pixel is decoded), animated, cut short, broken.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures and odd metadata: both are dealt with here
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            _check_header(image, max_pixels)
            image.load()
            return _cleaned(image, background)
    except Unreadable:
        raise
    except Image.DecompressionBombError as error:
        raise Unreadable(f"is far over the cap of {max_pixels:,} pixels: make it smaller") from error
    except Exception as error:  # decoders of hostile bytes raise anything
        if cut_short(content):
            raise Unreadable("is cut short: copy or download it again") from error
        raise Unreadable(f"is broken ({error or type(error).__name__}): export it again") from error


def grey(cleaned: Clean) -> bytes:
    """A picture as a grey PNG: what a mask file shows."""
    return _png(Image.open(io.BytesIO(cleaned.png)).convert("L"))


def cut_short(content: bytes) -> bool:
    """Whether a file that would not decode ends before its format says it does."""
    if content.startswith(b"RIFF") and len(content) >= 8:
        return len(content) < 8 + struct.unpack("<I", content[4:8])[0]
    if content.startswith(b"\x89PNG"):
        return b"IEND" not in content[-64:]
    return b"\xff\xd9" not in content[-64:]


def _check_header(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise Unreadable(
            f"has {image.width} x {image.height} pixels, over the cap of {max_pixels:,}: make it smaller"
        )
    # A second frame in a JPEG is a phone's depth map or preview; the first is the picture.
    if getattr(image, "is_animated", False) and image.format in ("PNG", "WEBP"):
        raise Unreadable("is animated: export one frame")


def _cleaned(image: Image.Image, background: tuple[int, int, int]) -> Clean:
    profile = image.info.get("icc_profile")
    try:
        removed, turned = _metadata(image), image.getexif().get(_ORIENTATION, 1) in range(2, 9)
        upright = ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001  broken metadata raises anything and costs no sound picture
        removed, turned, upright = ("unreadable",), False, image
    colours, alpha = _split_alpha(upright)
    rgb, converted = _to_srgb(colours, profile)
    laid = False
    if alpha is not None and alpha.getextrema() != (255, 255):
        laid = True
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha)
    pixels = Image.frombytes("RGB", rgb.size, rgb.tobytes())  # a new picture carries nothing along
    opacity = _png(alpha) if laid and alpha else None
    return Clean(_png(pixels), *rgb.size, removed, turned, laid, converted, opacity)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=6)
    return file.getvalue()


def _metadata(image: Image.Image) -> tuple[str, ...]:
    """The groups of metadata in a picture, all of which stay behind."""
    exif, info = image.getexif(), image.info
    groups = {
        "EXIF": bool(exif) or "exif" in info,
        "GPS": bool(exif.get_ifd(_GPS)),
        "camera": bool(exif.get_ifd(_EXIF)),
        "XMP": "xmp" in info or "XML:com.adobe.xmp" in info,
        "IPTC": "photoshop" in info,
        "comment": "comment" in info or bool(set(getattr(image, "text", {})) - {"XML:com.adobe.xmp"}),
    }
    return tuple(name for name, there in groups.items() if there)


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours in a mode that a colour profile can speak of (L, RGB, CMYK), and opacity in mode L or none."""
    if image.mode.startswith("I"):  # 16-bit greys: convert() would clip them to white
        high = np.asarray(image).astype(np.uint32) >> 8
        return Image.fromarray(high.clip(0, 255).astype(np.uint8)), None
    if image.has_transparency_data:
        whole = image.convert("RGBA")
        return whole.convert("RGB"), whole.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("RGB"), None


def _to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, bool]:
    """A brand's red must stay its red: the profile that says what the numbers mean is about to be dropped."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):
                target = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
                if converted is not None:
                    return converted, True
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass  # a profile that is broken or of another colour space says nothing; the numbers stand
    return image.convert("RGB"), False
