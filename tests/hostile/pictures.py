"""Pictures drawn at random: decoded as Pillow shows them, or refused."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from src.dataset.decoding import BadImage, decode_image, picture_pixels
from src.utils.errors import DamagedImage

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF", "AVIF", "JPEG2000", "TGA")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16")
# Two decoders of these differ by rounding.
_LOSSY = ("JPEG", "WEBP")
_ROUNDING = 3


def draw_picture(random):
    """(format, mode, bytes) as Pillow writes them; None if the format does not have that mode."""
    kind, mode = str(random.choice(FORMATS)), str(random.choice(MODES))
    height, width = random.integers(1, 40, 2)
    picture = Image.fromarray(random.integers(0, 256, (height, width, 4), np.uint8), "RGBA")
    options = {}
    if random.random() < 0.5:
        exif = Image.Exif()
        exif[0x0112] = int(random.integers(0, 10))  # two of them no orientation
        options["exif"] = exif.tobytes()
    if random.random() < 0.3:
        options["icc_profile"] = random.bytes(64)
    if kind == "WEBP":
        options["lossless"] = bool(random.random() < 0.5)
    if kind == "TIFF":
        options["compression"] = str(random.choice(["raw", "tiff_lzw", "packbits"]))
    if kind == "JPEG":
        options["progressive"] = bool(random.random() < 0.5)
        options["subsampling"] = int(random.integers(3))
    file = io.BytesIO()
    try:
        via = picture if mode in ("LA", "PA", "RGBA") else picture.convert("RGB")
        via = via.convert("L") if mode == "I;16" else via
        via.convert(mode).save(file, kind, **options)
    except (OSError, ValueError, KeyError, RuntimeError):
        return None
    return kind, mode, file.getvalue()


def damage(random, encoded):
    """The bytes cut off, with some changed, with some missing, or with more at the end."""
    content = bytearray(encoded)
    kind = random.integers(4)
    if kind == 0:
        return bytes(content[: random.integers(len(content))])
    if kind == 1:
        for place in random.integers(0, len(content), random.integers(1, 6)):
            content[place] = random.integers(256)
    elif kind == 2:
        start = random.integers(len(content))
        del content[start : start + random.integers(1, 20)]
    else:
        content += random.bytes(random.integers(1, 200))
    return bytes(content)


def as_pillow_shows(encoded):
    """(H, W, 3): upright, over white, 16 bits reduced to 8; None for values without a white.

    Raises whatever Pillow does for a damaged picture.
    """
    picture = Image.open(io.BytesIO(encoded))
    if picture.mode == "F" or (picture.mode == "I" and picture.format == "TIFF"):
        return None
    colors = picture.format == "TIFF" and picture.tag_v2.get(320)
    picture.load()  # which turns a TIFF upright
    if picture.mode == "P" and colors and max(colors) <= 255:
        # Pillow takes them for 16-bit values, and shows black.
        picture.putpalette(bytes(colors), "RGB;L")
    if picture.mode == "RGBA" and _alpha_means_nothing(picture, encoded):
        picture = picture.convert("RGB")
    orientation = _orientation(picture)
    if picture.mode.startswith("I"):
        values = np.asarray(picture, float)
        transparent = values == picture.info.get("transparency", -1)
        grey = np.where(transparent, 255, values / 257)
        picture = Image.fromarray(grey.astype(np.uint8))
    picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    upright = picture.copy()
    upright.info = {}
    upright.getexif()[0x0112] = orientation
    return np.asarray(ImageOps.exif_transpose(upright).convert("RGB"))


def _alpha_means_nothing(picture, encoded):
    """Where Pillow takes for transparent what the file does not mean so."""
    if picture.format == "TGA":
        return encoded[17] & 15 == 0
    return picture.format in ("BMP", "DIB") and picture.getchannel("A").getextrema()[1] == 0


def _orientation(picture):
    """That of the metadata; 1 for metadata that Pillow cannot read."""
    try:
        return picture.getexif().get(0x0112, 1)
    except (SyntaxError, ValueError, OSError):
        return 1


def check_whole(kind, mode, encoded):
    """Whether a picture is decoded.

    AssertionError if it is not as Pillow shows it, or is refused although it has a white.
    """
    try:
        expected = as_pillow_shows(encoded)
    except OSError:
        # Before version 13, Pillow could not read the YCbCr TIFF that it writes.
        assert (kind, mode) == ("TIFF", "YCbCr")
        return False
    try:
        found = decode_image(np.frombuffer(encoded, np.uint8), "x")
    except BadImage as refusal:
        assert expected is None and "32-bit" in str(refusal), refusal
        assert _is_refused(lambda: picture_pixels(Image.open(io.BytesIO(encoded))))
        return False
    assert expected is not None and found.shape == expected.shape, found.shape
    assert np.array_equal(picture_pixels(Image.open(io.BytesIO(encoded))), expected)
    assert _difference(found, expected) <= (_ROUNDING if kind in _LOSSY else 0)
    return True


def check_damaged(encoded):
    """Whether a damaged picture is decoded.

    AssertionError if it is although Pillow refuses it, and with other pixels than Pillow's, unless
    a warning says that it is damaged.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = decode_image(np.frombuffer(encoded, np.uint8), "x")
        except BadImage:
            return False
    if any(issubclass(warning.category, DamagedImage) for warning in said):
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = as_pillow_shows(encoded)
            kind = Image.open(io.BytesIO(encoded)).format
    except Exception as refusal:  # Pillow's plug-ins have many kinds
        raise AssertionError(f"decoded, although Pillow says: {refusal!r}") from None
    assert expected is not None and found.shape == expected.shape, found.shape
    assert _difference(found, expected) <= (_ROUNDING if kind in (*_LOSSY, "MPO") else 0)
    return True


def _difference(found, expected):
    return np.abs(found.astype(int) - expected).max()


def _is_refused(read):
    try:
        read()
    except BadImage:
        return True
    return False
