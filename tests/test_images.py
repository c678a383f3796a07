"""Every image is decided by its content, and no supplier's file raises anything but `Refused`."""

import struct

import numpy as np
import pytest
from delivery_files import animation, bomb, encode, pixels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cbd.images import EXTENSIONS, Refused, decode, extension_matches, glance, looks_of, pixel_digest, resize

PHOTO = pixels(0, size=(24, 20))
FORMATS = {name: encode(PHOTO, name) for name in EXTENSIONS}


def reason(data: bytes) -> str:
    with pytest.raises(Refused) as caught:
        decode(data, max_pixels=1_000_000)
    assert "\n" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_a_lossless_image_comes_back_pixel_by_pixel(format: str) -> None:
    decoded = decode(FORMATS[format], max_pixels=480)
    assert (decoded.format, decoded.mode) == (format, "RGB")
    assert np.array_equal(decoded.pixels, PHOTO)


@pytest.mark.parametrize("format", sorted(EXTENSIONS))
def test_every_format_is_told_by_content(format: str) -> None:
    decoded = decode(FORMATS[format], max_pixels=480)
    assert decoded.format == format
    assert decoded.pixels.shape == (24, 20, 3)
    assert decoded.pixels.dtype == np.uint8


GREY = np.array([[0, 100], [200, 255]], np.uint8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(GREY), GREY),
        (Image.fromarray(GREY).convert("1", dither=Image.Dither.NONE), [[0, 0], [255, 255]]),
        (Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
        (Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (2, 2), 255)]), GREY),
        (Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (2, 2), 0)]), [[255, 255], [255, 255]]),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 51)), [[204, 204], [204, 204]]),
        (Image.fromarray(GREY).convert("P"), GREY),
    ],
    ids=["grey", "1-bit", "16-bit", "grey with alpha", "transparent", "a fifth of black over white", "palette"],
)
def test_other_modes_become_rgb_as_documented(image: Image.Image, expected: object) -> None:
    found = decode(encode(image), max_pixels=100).pixels
    assert np.array_equal(found, np.repeat(np.asarray(expected)[:, :, None], 3, axis=2))


def test_a_palette_with_transparency_is_laid_over_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30] * 256)
    assert (decode(encode(image, transparency=0), max_pixels=100).pixels == 255).all()


def test_cmyk_becomes_rgb() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    decoded = decode(encode(image, "TIFF"), max_pixels=100)
    assert decoded.mode == "CMYK"
    assert (decoded.pixels == [255, 0, 0]).all()


def test_zero_bytes_and_other_content_are_refused() -> None:
    assert reason(b"") == "empty-file"
    assert reason(b"this is text in a .png") == "not-an-image"
    assert reason(b"BMW is a make of cars") == "not-an-image"
    assert reason(b"P6 is no picture either") == "not-an-image"
    assert reason(b"%PDF-1.7") == "unsupported"
    assert reason(b"\0\0\0\x1cftypavif" + bytes(100)) == "unsupported"


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    assert reason(bomb()) == "decompression-bomb"
    with pytest.raises(Refused, match="decompression-bomb"):
        decode(FORMATS["PNG"], max_pixels=479)


def test_a_webp_canvas_is_judged_before_it_is_made() -> None:
    data = bytearray(encode(pixels(0), "WEBP", lossless=True, exact=True))
    data[12:16], data[21:25] = b"VP8L", (16383 | 16383 << 14).to_bytes(4, "little")
    assert reason(bytes(data)) == "decompression-bomb"


def test_an_animation_is_refused_and_a_still_gif_is_not() -> None:
    assert reason(animation()) == "animated"
    assert decode(encode(PHOTO, "GIF"), max_pixels=480).format == "GIF"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_half_a_file_is_refused(format: str) -> None:
    data = encode(pixels(0, size=(64, 64)), format)
    assert reason(data[: len(data) // 2]) in ("truncated", "corrupt")


def test_truncated_and_corrupt_are_told_apart() -> None:
    assert reason(FORMATS["PNG"][:-60]) == "truncated"
    assert reason(FORMATS["JPEG"][:-40]) == "truncated"
    data = bytearray(FORMATS["PNG"])
    data[41] ^= 0xFF
    assert reason(bytes(data)) == "corrupt"


def test_float_pixels_are_unsupported() -> None:
    assert reason(encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")) == "unsupported"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(set(EXTENSIONS) - {"TIFF"})),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    st.floats(0, 1),
)
def test_no_damage_raises_anything_but_refused(format: str, changes: list[tuple[float, int]], kept: float) -> None:
    data = bytearray(FORMATS[format])
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        found = decode(bytes(data[: int(len(data) * kept) + 1]), max_pixels=100_000).pixels
    except Refused as refused:
        assert refused.reason in {"not-an-image", "unsupported", "decompression-bomb", "animated", "truncated", "corrupt"}
    else:
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3


def test_the_pixel_digest_is_over_shape_and_pixels() -> None:
    import hashlib

    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert pixel_digest(image) == hashlib.sha256(struct.pack("<II", 2, 2) + bytes(range(12))).hexdigest()
    assert pixel_digest(image) != pixel_digest(image.reshape(1, 4, 3))
    assert pixel_digest(decode(FORMATS["PNG"], max_pixels=480).pixels) == pixel_digest(decode(FORMATS["BMP"], max_pixels=480).pixels)


def test_extensions_are_compared_with_the_content() -> None:
    assert extension_matches("a/b.JPG", "JPEG") and extension_matches("a/noname", "PNG") and extension_matches("a.b/.hidden", "PNG")
    assert not extension_matches("a/b.jpg", "PNG")


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    assert resize(PHOTO[:20], 20) is not None and np.array_equal(resize(PHOTO[:20], 20), PHOTO[:20])
    assert resize(PHOTO, 8).shape == (8, 8, 3)
    assert (resize(np.full((5, 9, 3), 77, np.uint8), 32) == 77).all()


def test_looks_are_worked_out_by_hand() -> None:
    """Half black, half white: brightness 127.5 and one bit; flat grey: no bit, and a hash that says nothing."""
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, 16:] = 255
    flat, halves = looks_of([glance(np.full((20, 40, 3), 7, np.uint8)), glance(half)])
    assert (flat.brightness, flat.entropy) == (7.0, 0.0)
    assert (halves.brightness, halves.entropy) == (127.5, 1.0)
    assert looks_of([]) == []


def test_hashes_tell_a_brighter_copy_from_another_picture() -> None:
    generator = np.random.default_rng(0)
    small = [Image.fromarray(generator.integers(40, 180, (5, 5, 3), dtype=np.uint8)) for _ in range(2)]
    one, other = (np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) for image in small)
    hashes = [seen.phash for seen in looks_of([glance(image) for image in (one, one + np.uint8(20), other)])]
    assert (hashes[0] ^ hashes[1]).bit_count() <= 3
    assert (hashes[0] ^ hashes[2]).bit_count() > 15


def test_the_hash_is_the_sign_of_each_low_frequency_against_their_median() -> None:
    from scipy.fft import dctn

    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    low = dctn(np.asarray(Image.fromarray(image).convert("L"), np.float64))[:8, :8].ravel()
    bits = "".join("1" if value > np.median(low) else "0" for value in low)
    assert looks_of([glance(image)])[0].phash == int(bits, 2)
