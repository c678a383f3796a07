"""The ways in which the demo's damaged files are damaged: what a real delivery holds, and what an attacker would try."""

import hashlib
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cbd.images import encode_png

Pixels = NDArray[np.uint8]


def _truncated_png(stem: Path, pixels: Pixels) -> None:
    content = encode_png(pixels)
    stem.with_suffix(".png").write_bytes(content[: len(content) // 2])


def _truncated_jpeg(stem: Path, pixels: Pixels) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(stem.with_suffix(".jpg"), "JPEG")
    content = stem.with_suffix(".jpg").read_bytes()
    stem.with_suffix(".jpg").write_bytes(content[: len(content) // 3])


def _header_only(stem: Path, pixels: Pixels) -> None:
    stem.with_suffix(".png").write_bytes(encode_png(pixels)[:33])


def _broken_pixels(stem: Path, pixels: Pixels) -> None:
    content = bytearray(encode_png(pixels))
    start = content.index(b"IDAT") + 8
    content[start : start + 40] = bytes(40)
    stem.with_suffix(".png").write_bytes(content)


def _empty(stem: Path, pixels: Pixels) -> None:
    stem.with_suffix(".png").touch()


def _text(stem: Path, pixels: Pixels) -> None:
    stem.with_suffix(".png").write_text("scan failed: please try again later\n")


def _web_page(stem: Path, pixels: Pixels) -> None:
    stem.with_suffix(".jpg").write_text("<!DOCTYPE html><title>404 Not Found</title><script>alert(1)</script>\n")


def _document(stem: Path, pixels: Pixels) -> None:
    stem.with_suffix(".png").write_bytes(b"%PDF-1.4\n1 0 obj << /Type /Catalog >> endobj\ntrailer << /Root 1 0 R >>\n%%EOF\n")


def _noise(stem: Path, pixels: Pixels) -> None:
    stem.with_suffix(".png").write_bytes(hashlib.shake_256(b"noise").digest(900))


def _bomb(stem: Path, pixels: Pixels) -> None:
    """A few bytes that announce 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b""))
    stem.with_suffix(".png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def _animation(stem: Path, pixels: Pixels) -> None:
    from PIL import Image

    frames = [Image.fromarray(pixels), Image.fromarray(255 - pixels)]
    frames[0].save(stem.with_suffix(".gif"), save_all=True, append_images=frames[1:], duration=100)


def _link_outside(stem: Path, pixels: Pixels) -> None:
    """A link that would read a file beside the delivery."""
    stem.with_suffix(".png").symlink_to("../../truth/roles.parquet")


HONEST_DAMAGES: tuple[Callable[[Path, Pixels], None], ...] = (
    _truncated_png,
    _truncated_jpeg,
    _header_only,
    _broken_pixels,
    _empty,
    _text,
    _web_page,
    _document,
    _noise,
    _bomb,
    _animation,
)
"""Each writes one damaged file, given its path without a suffix and the image that it should have been: uint8 [H, W, 3]."""
DAMAGES = (*HONEST_DAMAGES, _link_outside)
"""What an attacker would try as well."""
