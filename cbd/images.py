"""Safe decoding of images that nobody vouches for: by content, never by name, and every fault becomes a `Refused`."""

import hashlib
import io
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from cbd.errors import DataError

Pixels = npt.NDArray[np.uint8]
_SIDE, _LOWEST = 32, 8
_LEVELS = np.arange(256.0)
_COSINES = np.cos(np.pi * np.outer(np.arange(_LOWEST), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE)).astype(np.float32)
"""The lowest rows of the discrete cosine transform (type 2) of 32 values."""

EXTENSIONS = {
    "PNG": frozenset({"png", "apng"}),
    "JPEG": frozenset({"jpg", "jpeg", "jpe", "jfif"}),
    "GIF": frozenset({"gif"}),
    "BMP": frozenset({"bmp", "dib"}),
    "WEBP": frozenset({"webp"}),
    "TIFF": frozenset({"tif", "tiff"}),
    "PPM": frozenset({"ppm", "pgm", "pbm", "pnm"}),
}
"""The formats that are taken in, with the file name extensions that fit them."""

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)
_FOREIGN = (
    (0, b"8BPS", "Photoshop"),
    (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"ftyp", "AVIF, HEIC or video"),
)
_PPM = re.compile(rb"P[1-6](\s+|#[^\n]*\n)+[0-9]")
_BMP_HEADERS = frozenset({12, 16, 40, 52, 56, 64, 108, 124})

# What Pillow's decoders are known to raise on hostile bytes. Only calls into Pillow stand inside the `try` that catches them.
_PILLOW_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    BufferError,
    EOFError,
    MemoryError,
    RuntimeError,
    Warning,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class Refused(DataError):
    """A file that is not taken in: `reason` is a short kebab-case word, `detail` one line for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        return Refused, (self.reason, self.detail)


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image as RGB pixels, and what it was before: Pillow's mode and the format by content."""

    pixels: Pixels
    """uint8 [H, W, 3]"""
    mode: str
    format: str


def decode(data: bytes, *, max_pixels: int) -> Decoded:
    """The image in `data` as 8-bit RGB, decided by its content alone.

    Grey, palette and 1-bit become RGB; alpha is composited over white; CMYK and YCbCr by Pillow's plain formula, no colour
    profile; of 16 bits the upper 8 are kept; EXIF orientation is not applied; of a multi-picture JPEG the first picture is taken.

    Args:
        data: the encoded file, at least its whole content.
        max_pixels: an image whose header announces more is refused before any pixel is decoded.

    Raises:
        Refused: `empty-file`, `not-an-image`, `unsupported`, `decompression-bomb`, `animated`, `truncated` or `corrupt`.
    """
    format = sniff(data)
    try:
        _check_size(_webp_size(data) if format == "WEBP" else (0, 0), max_pixels)
        with Image.open(io.BytesIO(data), formats=(format,)) as image:
            _check_size(image.size, max_pixels)
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise Refused("animated", f"{format} with several frames; deliver single images")
            image.load()
            mode = image.mode
            return Decoded(_rgb(image), mode, format)
    except Refused:
        raise
    except Image.DecompressionBombError:
        raise Refused("decompression-bomb", f"the header announces more than {max_pixels} pixels") from None
    except _PILLOW_FAULTS as error:
        raise _refusal(format, data, error) from None


def sniff(data: bytes) -> str:
    """The image format by the first bytes, one of `EXTENSIONS`.

    Raises:
        Refused: `empty-file`, `not-an-image`, or `unsupported` for an image format that is not taken in.
    """
    if not data:
        raise Refused("empty-file", "0 bytes")
    for magic, format in _MAGIC:
        if data.startswith(magic):
            return format
    if _PPM.match(data, 0, 1024):
        return "PPM"
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    for offset, magic, name in _FOREIGN:
        if data[offset : offset + len(magic)] == magic:
            raise Refused("unsupported", f"{name} is not taken in; deliver one of {', '.join(EXTENSIONS)}")
    raise Refused("not-an-image", "the content is no known image format")


def encode_png(pixels: Pixels) -> bytes:
    """The PNG bytes of pixels uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def pixel_digest(pixels: Pixels) -> str:
    """SHA-256 (hex) over height and width (two little-endian uint32) and the RGB bytes: equal for images that look the same."""
    digest = hashlib.sha256(struct.pack("<II", *pixels.shape[:2]))
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def extension_matches(path: str, format: str) -> bool:
    """Whether the file name's extension fits the format; a name without an extension claims nothing and fits."""
    stem, dot, extension = path.rpartition("/")[2].rpartition(".")
    return not (stem and dot) or extension.lower() in EXTENSIONS.get(format, ())


def resize(pixels: Pixels, size: int) -> Pixels:
    """uint8 [size, size, 3]: Pillow's bilinear filter (antialiased when it shrinks); unchanged where the size fits already."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise Refused("decompression-bomb", f"the header announces {width} x {height} pixels, more than {max_pixels}")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas size in a WEBP header, read here because Pillow makes the whole canvas on opening; (0, 0) if there is none."""
    if data[12:16] == b"VP8X" and len(data) >= 30:
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if data[12:16] == b"VP8 " and len(data) >= 30:
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return 0, 0


def _rgb(image: Image.Image) -> Pixels:
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.asarray(image)
    if image.mode == "F":
        raise Refused("unsupported", "floating-point pixels have no fixed range; deliver 8 or 16 bits")
    if image.mode.startswith("I"):
        return _from_16_bits(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _from_16_bits(values: npt.NDArray[Any]) -> Pixels:
    if values.min() < 0 or values.max() > 0xFFFF:
        raise Refused("unsupported", "grey values beyond 16 bits; deliver 8 or 16 bits")
    return np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2)


def _refusal(format: str, data: bytes, error: BaseException) -> Refused:
    text = " ".join(str(error).split())[:120]
    unidentified = isinstance(error, UnidentifiedImageError)
    if isinstance(error, EOFError) or "truncated" in text.lower() or _lacks_end(format, data):
        return Refused("truncated", f"{format} ends too early after {len(data)} bytes")
    if isinstance(error, ValueError) and "conversion" in text.lower():
        return Refused("unsupported", f"{format}: {text}")
    return Refused("corrupt", f"{format} cannot be decoded" + ("" if unidentified else f": {text or type(error).__name__}"))


def _lacks_end(format: str, data: bytes) -> bool:
    """Whether the file has lost its end, as far as the format says where that is."""
    tail = data.rstrip(b"\0\r\n ")
    if format == "PNG":
        return b"IEND" not in tail[-16:]
    if format == "JPEG":
        return not tail.endswith(b"\xff\xd9")
    if format == "GIF":
        return not tail.endswith(b";")
    if format == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return False


class Looks(NamedTuple):
    """What an image looks like, in three numbers."""

    phash: int
    """64 bits: the signs of the 64 lowest frequencies of the picture at 32x32 pixels, against their median (Zauner, 2010)."""
    brightness: float
    """Mean grey level, in [0, 255]."""
    entropy: float
    """Of the histogram of grey levels, in bits, in [0, 8]: 0 is one level only."""


class Glance(NamedTuple):
    """What `looks_of` needs of an image: little, so that many can be kept."""

    small: Pixels
    """uint8 [32, 32], grey."""
    counts: npt.NDArray[np.int64]
    """int64 [256], of the grey levels."""


def glance(pixels: Pixels) -> Glance:
    """What the looks of an image are made of, uint8 RGB [H, W, 3]."""
    grey = Image.fromarray(pixels).convert("L")
    small = grey if grey.size == (_SIDE, _SIDE) else grey.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return Glance(np.asarray(small), np.bincount(np.frombuffer(grey.tobytes(), np.uint8), minlength=256))


def looks_of(glances: Sequence[Glance]) -> list[Looks]:
    """The looks of images, all at once."""
    if not glances:
        return []
    small = np.stack([one.small for one in glances]).astype(np.float32)
    frequencies = (_COSINES @ small @ _COSINES.T).reshape(len(small), -1)
    middle = np.partition(frequencies, (31, 32), axis=1)[:, 31:33].mean(1, keepdims=True)
    hashes = np.packbits(frequencies > middle, axis=1).view(">u8")[:, 0]
    counts = np.stack([one.counts for one in glances]).astype(np.float64)
    shares = counts / counts.sum(1, keepdims=True)
    entropies = -(shares * np.log2(shares, out=np.zeros_like(shares), where=shares > 0)).sum(1) + 0.0
    columns = hashes.tolist(), (shares @ _LEVELS).round(3).tolist(), entropies.round(3).tolist()
    return [Looks(*values) for values in zip(*columns, strict=True)]
