"""Operations of RandAugment (Cubuk et al., arXiv:1909.13719)."""

from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 30
_GREY = (128, 128, 128)
Operation = Callable[[Image.Image, float], Image.Image]


def _affine(picture: Image.Image, *coefficients: float) -> Image.Image:
    return picture.transform(
        picture.size,
        Image.Transform.AFFINE,
        coefficients,
        Image.Resampling.BILINEAR,
        fillcolor=_GREY,
    )


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda picture, strength: kind(picture).enhance(1 + 0.9 * strength)


def _posterize(picture: Image.Image, strength: float) -> Image.Image:
    return ImageOps.posterize(picture, 8 - round(4 * abs(strength)))


def _solarize(picture: Image.Image, strength: float) -> Image.Image:
    return ImageOps.solarize(picture, round(256 * (1 - abs(strength))))


def _rotate(picture: Image.Image, strength: float) -> Image.Image:
    return picture.rotate(30 * strength, Image.Resampling.BILINEAR, fillcolor=_GREY)


# Each takes a picture and a strength from -1 to 1.
OPERATIONS: tuple[Operation, ...] = (
    lambda picture, strength: picture,
    lambda picture, strength: _affine(picture, 1, 0.3 * strength, 0, 0, 1, 0),
    lambda picture, strength: _affine(picture, 1, 0, 0, 0.3 * strength, 1, 0),
    lambda picture, strength: _affine(picture, 1, 0, 0.45 * strength * picture.width, 0, 1, 0),
    lambda picture, strength: _affine(picture, 1, 0, 0, 0, 1, 0.45 * strength * picture.height),
    _rotate,
    _enhanced(ImageEnhance.Brightness),
    _enhanced(ImageEnhance.Color),
    _enhanced(ImageEnhance.Contrast),
    _enhanced(ImageEnhance.Sharpness),
    _posterize,
    _solarize,
    lambda picture, strength: ImageOps.autocontrast(picture),
    lambda picture, strength: ImageOps.equalize(picture),
)
