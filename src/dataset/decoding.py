"""Decodes image files, the same way in training, evaluation, prediction and packed sets."""

import errno
import io
import os
import stat
import warnings
import zlib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from src.utils.errors import DamagedImage, UserError

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG"
# First bytes of JPEG, PNG, BMP, WebP, TIFF (both byte orders), and the netpbm formats.
_MAGIC = (_JPEG, _PNG, b"BM", b"RIFF", b"II*\0", b"MM\0*", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")
# Pillow's other plug-ins start programs (Ghostscript) or decode before they know the size (ICO).
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "PPM", "GIF", "AVIF", "JPEG2000", "TGA")
# High Efficiency Image Files: photographs of iPhones. They need the package pillow-heif.
HEIF_ENDINGS = (".heic", ".heif", ".hif")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_BRANDS_END = 40
# What the last bytes of a complete file contain; cameras may append some bytes.
_ENDS = {_JPEG: b"\xff\xd9", _PNG: b"IEND"}
_LAST_BYTES = 64
_LARGEST_FILE = 1 << 28
# Of 3 bytes each.
DEFAULT_MAX_PIXELS = 1 << 26
_TOO_MANY = "too many pixels (possibly a decompression bomb)"
_ORIENTATION = 0x0112
# EXIF orientation -> what turns the picture upright.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
}
_STRIP_ROWS = 256
# Tags of TIFF 6.0, and what Pillow reads of it.
_BITS_PER_SAMPLE, _COMPRESSION, _PHOTOMETRIC, _PLANAR_CONFIGURATION = 258, 259, 262, 284
_COLOR_MAP, _SAMPLE_FORMAT, _SUBSAMPLING = 320, 339, 530
_UNCOMPRESSED, _YCBCR, _SIGNED = 1, 6, 2
_TIFF_BITS = {1, 2, 4, 8, 16}
# The byte of a TGA that has the number of bits for transparency (TGA 2.0, field 5.6).
_TGA_DESCRIPTOR, _TGA_ALPHA_BITS = 17, 0x0F
# The byte of a PNG that has its bits per sample; its colour type follows (PNG, section 11.2.2).
_PNG_DEPTH = 24
_GREY, _RGB = 0, 2
_PLAIN_MODES = ("RGB", "L")
# Cameras append small versions of a picture, which makes a JPEG an MPO for Pillow.
_JPEG_FORMATS = ("JPEG", "MPO")
# OpenCV takes the numbers in netpbm, TIFF and BMP files for bytes, whatever their range, and shows
# a part of a damaged WebP without a word.
_OPENCV_FORMAT = "PNG"
# By what the sides of a JPEG can be divided while it is decoded.
_REDUCTIONS = (8, 4, 2)
# Bytes of a chunk besides its content: length, kind and checksum.
_PNG_CHUNK = 12
# Formats whose Pillow mode "I" holds 16-bit values. In others it holds 32-bit ones, of any range.
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")


class BadImage(UserError):
    """An image file that cannot be read or decoded."""


def warn_of_damage(message: str) -> None:
    """Warn, as DamagedImage, of an image that ``decode_image`` could only decode in part."""
    warnings.warn(message, DamagedImage, 4)


def read_image(
    path: str,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    min_side: int = 0,
    report: Callable[[str], object] = warn_of_damage,
) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB; see ``decode_image``.

    Raises:
        BadImage: if the file cannot be read, is not an image, or is too large.
    """
    try:
        with open_regular(path) as file:
            # Not np.fromfile with a count, which allocates for the count first.
            encoded = np.frombuffer(
                file.read(min(os.fstat(file.fileno()).st_size, _LARGEST_FILE)), np.uint8
            )
    except (OSError, ValueError) as failure:
        raise BadImage(
            f"cannot read the image {path}: {getattr(failure, 'strerror', failure)}"
        ) from None
    return decode_image(encoded, path, max_pixels, min_side, report)


def open_regular(path: str) -> io.FileIO:
    """Open a file for reading without waiting. Raises OSError, also for a pipe or a device."""
    file = io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    return file


def decode_image(
    encoded: np.ndarray,
    name: str,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    min_side: int = 0,
    report: Callable[[str], object] = warn_of_damage,
) -> np.ndarray:
    """Decode the content of an image file, (N,) uint8, to (H, W, 3) uint8 RGB.

    Follows the EXIF orientation. Converts grey, CMYK and 16-bit pictures, and composites
    transparent parts onto white. Refuses files of 256 MiB or more, and images of more than
    ``max_pixels`` pixels, from their headers: a small file may decode to gigabytes.

    Args:
        name: what to call it in a message.
        min_side: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its sides if they keep as many
            pixels; 0: never.
        report: called with a message if a JPEG could only be decoded in part.

    Raises:
        BadImage: if it is not an image, or is too large.
        MemoryError: if there is too little memory to decode it.
    """
    if not encoded.size:
        raise BadImage(f"{name} is empty")
    if encoded.size >= _LARGEST_FILE:
        raise BadImage(f"{name} is larger than {_LARGEST_FILE >> 20} MiB")
    try:
        picture = open_picture(encoded.data)
    except MemoryError:
        raise
    except BadImage as failure:
        raise BadImage(f"{name} cannot be decoded: {failure}") from None
    except Image.DecompressionBombError:
        raise BadImage(f"{name} has {_TOO_MANY}") from None
    except Exception as failure:  # many kinds, one for each format's way of being damaged
        # OpenCV may decode it, but without a header nothing limits the size of the result.
        raise BadImage(f"{name} is not an image that can be decoded") from failure
    with picture:
        if picture.width * picture.height > max_pixels:
            raise BadImage(
                f"{name} has {picture.width} x {picture.height} pixels: {_TOO_MANY}; --max_pixels "
                "sets the limit"
            )
        try:
            pixels, damage = _decoded(picture, encoded, name, _reduction(picture, min_side))
            if damage:
                report(f"{name} is damaged, and a part of it may be wrong: {damage}")
            return pixels
        except (BadImage, MemoryError):
            raise
        except DamagedImage as warning:  # an error because of --strict=1
            raise BadImage(str(warning)) from None
        except Exception as failure:  # as above
            raise BadImage(f"{name} is not an image that can be decoded") from failure


def picture_pixels(picture: Image.Image) -> np.ndarray:
    """A Pillow image as (H, W, 3) uint8 RGB, with the pixels that its file would give.

    Raises:
        BadImage: if Pillow cannot load it, or if the range of its values is unknown.
    """
    name = f"the Pillow image of mode {picture.mode}"
    if "transparency" in picture.info and picture.mode != "P":
        # The colour has the range of the file, which may have had 2, 4 or 16 bits per sample.
        raise BadImage(f"{name} has a transparent colour; convert it to RGBA")
    try:
        _check_values(picture, name)
        _scale_color_map(picture)
        if _has_transparent_alpha(picture):
            return _turned(np.asarray(picture.convert("RGB")), picture)
        return _upright(picture)
    except (BadImage, MemoryError):
        raise
    except Exception as failure:  # many kinds, one for each way of being damaged
        raise BadImage(f"{name} cannot be read: {failure}") from failure


def open_picture(content: bytes | memoryview) -> Image.Image:
    """A picture of which Pillow has read the header. Raises what Pillow does for a damaged one."""
    if not _is_heif(content):
        return Image.open(io.BytesIO(content), formats=_FORMATS)
    _register_heif()
    return Image.open(io.BytesIO(content), formats=("HEIF",))


def reads_heif() -> bool:
    """Whether the package that decodes HEIF is installed."""
    return find_spec("pillow_heif") is not None


def _is_heif(content: bytes | memoryview) -> bool:
    # Any kind of image in this container may begin with mif1; the brands that follow tell which.
    is_avif = b"avif" in bytes(content[8:_BRANDS_END])
    return bytes(content[4:8]) == b"ftyp" and bytes(content[8:12]) in _HEIF_BRANDS and not is_avif


@cache
def _register_heif() -> None:
    """Let Pillow open HEIF. Raises BadImage without the package for it."""
    if not reads_heif():
        raise BadImage("HEIF is read after 'bash scripts/setup.sh --heif'")
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False)


def _reduction(picture: Image.Image, min_side: int) -> int:
    """The divisor of a picture's sides while it is decoded: 1, 2, 4 or 8."""
    if picture.format not in _JPEG_FORMATS or not min_side:
        return 1
    fraction = min(picture.size) // min_side
    return next((reduction for reduction in _REDUCTIONS if reduction <= fraction), 1)


def _decoded(
    picture: Image.Image, encoded: np.ndarray, name: str, reduction: int
) -> tuple[np.ndarray, str]:
    """The pixels, and what is damaged or ""."""
    damage = ""
    if picture.format in _JPEG_FORMATS:
        try:
            if picture.mode in _PLAIN_MODES:
                return _turned(_decoded_jpeg(encoded, picture, reduction), picture), ""
            # Only to learn of damage.
            _decoded_jpeg(encoded, picture, reduction)
        except ValueError as failure:
            damage = str(failure).removeprefix("Corrupt JPEG data: ")
    if _is_plain(picture):
        return _decoded_by_opencv(encoded, name), ""
    _check_chunks(encoded, name)
    if reduction > 1:
        picture.draft(None, (picture.width // reduction, picture.height // reduction))
    # Pillow shows what can be read of a damaged JPEG, and refuses one that was cut off.
    return _as_seen(picture, encoded, name), damage


def _decoded_jpeg(encoded: np.ndarray, picture: Image.Image, reduction: int) -> np.ndarray:
    """A JPEG as it is stored, (H, W, 3), or (H, W, 4) of CMYK.

    Raises:
        ValueError: if something in it does not fit together.
    """
    width, height = (-(-side // reduction) for side in picture.size)
    space = "RGB" if picture.mode in _PLAIN_MODES else "CMYK"
    try:
        return simplejpeg.decode_jpeg(
            encoded, space, min_width=width, min_height=height, min_factor=reduction
        )
    except ValueError as failure:
        if "memory" in str(failure).lower():
            raise MemoryError(str(failure)) from None
        raise


def _decoded_by_opencv(encoded: np.ndarray, name: str) -> np.ndarray:
    """Faster than Pillow, and the same picture if it is upright, opaque and of 8 bits."""
    try:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(_without_metadata(encoded), flags)
    except cv2.error as failure:
        if failure.code == cv2.Error.StsNoMem:
            raise MemoryError(f"not enough memory to decode {name}") from None
        image = None
    except ValueError as failure:
        raise BadImage(f"{name} cannot be decoded: {failure}") from None
    if image is None:
        raise BadImage(f"{name} is not an image that can be decoded")
    return image


def _check_chunks(encoded: np.ndarray, name: str) -> None:
    """Raise BadImage for a PNG with a damaged chunk: Pillow does not compare their checksums."""
    try:
        _visible_chunks(encoded)
    except ValueError as failure:
        raise BadImage(f"{name} cannot be decoded: {failure}") from None


def _without_metadata(encoded: np.ndarray) -> np.ndarray:
    """A PNG with the chunks alone that decide its pixels; another file as it is.

    libpng writes to standard error about each colour profile and date that it does not like, and
    about damage, which is found here first. Raises ValueError for damage.
    """
    chunks = _visible_chunks(encoded)
    return np.frombuffer(b"".join(chunks), np.uint8) if chunks else encoded


def _visible_chunks(encoded: np.ndarray) -> list[memoryview]:
    """The signature of a PNG and the chunks that decide its pixels; [] of another file.

    Raises:
        ValueError: if such a chunk is damaged, or the file was cut off.
    """
    content = encoded.data
    if content[:4] != _PNG:
        return []
    kept, start, kind = [content[:8]], 8, b""
    while kind != b"IEND":
        end = start + _PNG_CHUNK + int.from_bytes(content[start : start + 4], "big")
        kind = bytes(content[start + 4 : start + 8])
        # Chunks in capitals are critical (PNG specification, section 5.4).
        if end > len(content) or kind[:1].isupper() or kind == b"tRNS":
            stored = int.from_bytes(content[end - 4 : end], "big")
            if end > len(content) or stored != zlib.crc32(content[start + 4 : end - 4]):
                raise ValueError("the file is damaged, or was cut off")
            kept.append(content[start:end])
        start = end
    return kept


def _is_plain(picture: Image.Image) -> bool:
    """Whether a picture is upright, opaque, of 8 bits and of OpenCV's format.

    Only its header was read.
    """
    return (
        picture.mode in _PLAIN_MODES
        and picture.format == _OPENCV_FORMAT
        and "transparency" not in picture.info
        and _orientation(picture) == 1
    )


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) if the metadata cannot be read."""
    try:
        return picture.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # many kinds, one for each way of being damaged
        return 1


def _as_seen(picture: Image.Image, encoded: np.ndarray, name: str) -> np.ndarray:
    _check_values(picture, name)
    _scale_color_key(picture, encoded)
    _scale_color_map(picture)
    if _has_unused_alpha(picture, encoded):
        return np.asarray(picture.convert("RGB"))
    return _upright(picture, _sixteen_bit_transparency(picture, encoded))


def _has_unused_alpha(picture: Image.Image, encoded: np.ndarray) -> bool:
    """Whether the alpha channel is unused: a TGA's header tells, and in such a BMP it is all 0."""
    if picture.mode != "RGBA":
        return False
    if picture.format == "TGA":
        return not encoded[_TGA_DESCRIPTOR] & _TGA_ALPHA_BITS
    return _has_transparent_alpha(picture)


def _has_transparent_alpha(picture: Image.Image) -> bool:
    """Whether every pixel of a BMP or TGA is transparent, which nobody means."""
    has_alpha = picture.mode == "RGBA" and picture.format in ("BMP", "DIB", "TGA")
    return has_alpha and picture.getchannel("A").getextrema() == (0, 0)


def _scale_color_map(picture: Image.Image) -> None:
    """Correct the palette of a TIFF that has 8-bit values, where the format and Pillow expect 16.

    libtiff decides in the same way: no value is above 255.
    """
    colors = _tiff_tag(picture, _COLOR_MAP)
    if picture.mode == "P" and colors and max(colors) <= 255:
        picture.load()
        picture.putpalette(bytes(colors), "RGB;L")


def _upright(picture: Image.Image, transparent: np.ndarray | None = None) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB, over white, turned as its metadata says.

    Args:
        transparent: pixels that are transparent although Pillow does not know it, (H, W) bool,
            before the picture is turned.
    """
    black = 65535 if _tiff_tag(picture, _PHOTOMETRIC) == 0 else 0
    # Pillow turns a TIFF upright when it loads it, and then has no orientation any more.
    picture.load()
    pixels = np.empty((picture.height, picture.width, 3), np.uint8)
    # Strip by strip: a copy of the whole picture for each operation would take five times as much.
    for top in range(0, picture.height, _STRIP_ROWS):
        bottom = min(top + _STRIP_ROWS, picture.height)
        strip = picture.crop((0, top, picture.width, bottom))
        pixels[top:bottom] = _strip_as_seen(strip, black)
    if transparent is not None:
        pixels[transparent] = 255
    return _turned(pixels, picture)


def _turned(pixels: np.ndarray, picture: Image.Image) -> np.ndarray:
    """The pixels turned as the picture's metadata says."""
    orientation = _orientation(picture)
    return _TURNS[orientation](pixels).copy() if orientation in _TURNS else pixels


def _strip_as_seen(strip: Image.Image, black: int) -> np.ndarray:
    """Part of a picture as (H, W, 3) uint8 RGB, over white.

    Args:
        black: the value that is black in a picture of 16 bits; of fewer bits, Pillow knows it.
    """
    if strip.mode.startswith("I"):
        deep = abs(np.asarray(strip, np.float64) - black)
        strip = Image.fromarray((deep / 257).clip(0, 255).astype(np.uint8))
    if strip.has_transparency_data:
        strip = strip.convert("RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
    return np.asarray(strip.convert("RGB"))


def _check_values(picture: Image.Image, name: str) -> None:
    """Raise BadImage for values that Pillow does not scale to those of a picture."""
    is_deep = picture.mode == "I" and picture.format not in _SIXTEEN_BIT_FORMATS
    if is_deep or picture.mode == "F":
        raise BadImage(
            f"{name} has signed, 32-bit or floating-point values, and its format does not say "
            "which value is white; convert it to 8 or 16 bits"
        )
    if picture.format == "TIFF":
        bits = set(_tiff_tag(picture, _BITS_PER_SAMPLE) or (1,))
        if not bits <= _TIFF_BITS:
            raise BadImage(f"{name} has {max(bits)} bits per value; convert it to 8 or 16 bits")
        if _SIGNED in (_tiff_tag(picture, _SAMPLE_FORMAT) or ()):
            raise BadImage(f"{name} has signed values; convert it to unsigned ones")
        is_raw = _tiff_tag(picture, _COMPRESSION) == _UNCOMPRESSED
        is_ycbcr = _tiff_tag(picture, _PHOTOMETRIC) == _YCBCR
        if is_raw and is_ycbcr and _tiff_tag(picture, _SUBSAMPLING) != (1, 1):
            raise BadImage(
                f"{name} has YCbCr values with subsampled colours and no compression, which is not "
                "read; convert it to RGB"
            )
        if bits == {16} and _tiff_tag(picture, _PLANAR_CONFIGURATION) == 2:
            raise BadImage(f"{name} has 16-bit values in separate planes; convert it to 8 bits")


def _tiff_tag(picture: Image.Image, tag: int) -> Any:
    """The value of a tag of a TIFF; None without it, and for other formats."""
    return picture.tag_v2.get(tag) if isinstance(picture, TiffImageFile) else None


def _scale_color_key(picture: Image.Image, encoded: np.ndarray) -> None:
    """Scale the transparent grey of a PNG of 2 or 4 bits as Pillow scales the pixels."""
    if _png_kind(picture, encoded) in ((2, _GREY), (4, _GREY)) and "transparency" in picture.info:
        largest = (1 << int(encoded[_PNG_DEPTH])) - 1
        picture.info["transparency"] = picture.info["transparency"] * 255 // largest


def _sixteen_bit_transparency(picture: Image.Image, encoded: np.ndarray) -> np.ndarray | None:
    """Where a PNG of 16 bits has its transparent colour, (H, W) bool; None without one.

    Pillow compares that colour with pixels that it has reduced to 8 bits.
    """
    kind = _png_kind(picture, encoded)
    if "transparency" not in picture.info or kind not in ((16, _GREY), (16, _RGB)):
        return None
    if kind == (16, _GREY):
        return np.asarray(picture) == picture.info["transparency"]
    flags = cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.imdecode(_without_metadata(encoded), flags)[..., 3] == 0


def _png_kind(picture: Image.Image, encoded: np.ndarray) -> tuple[int, int] | None:
    """(bits per sample, colour type) of a PNG; None of another format."""
    if picture.format != "PNG":
        return None
    return int(encoded[_PNG_DEPTH]), int(encoded[_PNG_DEPTH + 1])


def looks_whole_file(path: str) -> bool:
    """Whether an image file is likely to be complete, judging from its first and last bytes."""
    try:
        with open_regular(path) as file:
            first = file.read(4)
            file.seek(max(os.fstat(file.fileno()).st_size - _LAST_BYTES, 0))
            return looks_whole(first, file.read(_LAST_BYTES))
    except OSError:
        return False


def looks_whole(first: bytes, last: bytes) -> bool:
    """``looks_whole_file`` for the first 4 and the last 64 bytes of a file."""
    end = next((end for magic, end in _ENDS.items() if first.startswith(magic)), b"")
    return first.startswith(_MAGIC) and end in last
