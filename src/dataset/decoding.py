"""Decodes image files, the same way in training, evaluation, prediction and packed sets."""

import errno
import io
import os
import stat
import warnings

import cv2
import numpy as np
from PIL import Image

from src.utils.errors import UserError

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG"
# First bytes of JPEG, PNG, BMP, WebP, TIFF (both byte orders), and the netpbm formats.
_MAGIC = (_JPEG, _PNG, b"BM", b"RIFF", b"II*\0", b"MM\0*", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")
# What the last bytes of a complete file contain; cameras may append some bytes.
_ENDS = {_JPEG: b"\xff\xd9", _PNG: b"IEND"}
_LAST_BYTES = 64
_LARGEST_FILE = 1 << 28
# Of 3 bytes each.
MOST_PIXELS = 1 << 26
_TOO_MANY = "too many pixels, as a decompression bomb has"
_ORIENTATION = 0x0112
# EXIF orientation -> the transposition that turns the picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PLAIN_MODES = ("RGB", "L")
# OpenCV takes the numbers in netpbm, TIFF and BMP files for bytes, whatever their range.
_OPENCV_FORMATS = ("JPEG", "PNG", "WEBP")
# Formats whose Pillow mode "I" holds 16-bit values. In others it holds 32-bit ones, of any range.
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")


class BadImage(UserError):
    """An image file that cannot be read or decoded."""


def read_image(path: str, max_pixels: int = MOST_PIXELS) -> np.ndarray:
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
    return decode_image(encoded, path, max_pixels)


def open_regular(path: str) -> io.FileIO:
    """Open a file for reading without waiting. Raises OSError, also for a pipe or a device."""
    file = io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    return file


def decode_image(encoded: np.ndarray, name: str, max_pixels: int = MOST_PIXELS) -> np.ndarray:
    """Decode the content of an image file, (N,) uint8, to (H, W, 3) uint8 RGB.

    Follows the EXIF orientation. Converts grey, CMYK and 16-bit pictures, and composites
    transparent parts onto white. Refuses files of 256 MiB or more, and images of more than
    ``max_pixels`` pixels, from their headers: a small file may decode to gigabytes.

    Args:
        name: what to call it in a message.

    Raises:
        BadImage: if it is not an image, or is too large.
        MemoryError: if there is too little memory to decode it.
    """
    if not encoded.size:
        raise BadImage(f"{name} is empty")
    if encoded.size >= _LARGEST_FILE:
        raise BadImage(f"{name} is larger than {_LARGEST_FILE >> 20} MiB")
    try:
        picture = Image.open(io.BytesIO(encoded.data))
    except MemoryError:
        raise
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
            return (
                _decoded_by_opencv(encoded, name) if _is_plain(picture) else _as_seen(picture, name)
            )
        except (BadImage, MemoryError):
            raise
        except Exception as failure:  # as above
            raise BadImage(f"{name} is not an image that can be decoded") from failure


def _decoded_by_opencv(encoded: np.ndarray, name: str) -> np.ndarray:
    """Faster than Pillow, and the same picture if it is upright, opaque and of 8 bits."""
    try:
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as failure:
        if failure.code == cv2.Error.StsNoMem:
            raise MemoryError(f"not enough memory to decode {name}") from None
        image = None
    if image is None:
        raise BadImage(f"{name} is not an image that can be decoded")
    return image


def _is_plain(picture: Image.Image) -> bool:
    """Whether a picture is upright, opaque, of 8 bits and of one of OpenCV's formats.

    Only its header was read.
    """
    return (
        picture.mode in _PLAIN_MODES
        and picture.format in _OPENCV_FORMATS
        and "transparency" not in picture.info
        and _orientation(picture) == 1
    )


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 for upright. Metadata that cannot be read says nothing."""
    try:
        return picture.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # many kinds, one for each way of being damaged
        return 1


def _as_seen(picture: Image.Image, name: str) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        orientation = _orientation(picture)
        is_deep = picture.mode == "I" and picture.format not in _SIXTEEN_BIT_FORMATS
        if is_deep or picture.mode == "F":
            raise BadImage(
                f"{name} has 32-bit values, and its format does not say which value is white; "
                "convert it to 8 or 16 bits"
            )
        if picture.mode.startswith("I"):
            deep = np.asarray(picture, np.float64)
            picture = Image.fromarray((deep / 257).clip(0, 255).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        if orientation in _TURNS:
            picture = picture.transpose(_TURNS[orientation])
        return np.asarray(picture.convert("RGB"))


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
