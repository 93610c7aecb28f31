"""An image file gives the same pixels in training, evaluation, prediction and packed sets."""

import io
import os
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
from conftest import execute, make_config
from hostile.pictures import check_damaged, check_whole, damage, draw_picture
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from src.dataset.batches import EvalBatches, TrainBatches
from src.dataset.class_folders import unread
from src.dataset.decoding import BadImage, _register_heif, decode_image, picture_pixels, read_image
from src.dataset.packed import pack
from src.dataset.sources import open_images
from src.utils.errors import DamagedImage, UserError

TURNS = {
    1: lambda x: x,
    3: lambda x: x[::-1, ::-1],
    6: lambda x: np.rot90(x, 1),
    8: lambda x: np.rot90(x, -1),
    2: lambda x: x[:, ::-1],
}


@pytest.fixture
def picture():
    """Left half red, right half blue, 20 x 10."""
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, :10, 0], pixels[:, 10:, 2] = 255, 255
    return Image.fromarray(pixels)


def test_exif_orientation_is_applied(picture, tmp_path):
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    picture.save(tmp_path / "turned.png", exif=exif)
    seen = read_image(tmp_path / "turned.png")
    assert (
        seen.shape == (20, 10, 3)
        and seen[0, 0].tolist() == [255, 0, 0]
        and seen[-1, 0].tolist() == [0, 0, 255]
    )


@pytest.mark.parametrize(
    "mode,suffix",
    [("L", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "gif"), ("1", "png"), ("I;16", "png")],
)
def test_other_kinds_of_pictures(picture, tmp_path, mode, suffix):
    converted = (
        Image.fromarray(np.full((10, 20), 65535, np.uint16))
        if mode == "I;16"
        else picture.convert(mode)
    )
    converted.save(tmp_path / f"x.{suffix}")
    seen = read_image(tmp_path / f"x.{suffix}")
    assert seen.shape == (10, 20, 3) and seen.dtype == np.uint8
    if mode in ("CMYK", "RGBA", "P"):
        assert seen[5, 2, 0] > 200 and seen[5, 2, 2] < 60 and seen[5, 17, 2] > 200
    if mode == "I;16":
        assert (seen == 255).all()


def test_transparent_is_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "t.png")
    assert (read_image(tmp_path / "t.png") == 255).all()


@pytest.mark.parametrize("side", [8500, 20000])
def test_decompression_bomb_is_refused(tmp_path, side):
    Image.new("1", (side, side)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="too many pixels"):
        read_image(tmp_path / "b.png")


def photograph():
    """A smooth picture of 60 x 40 without symmetries."""
    y, x = np.mgrid[:40, :60]
    return np.stack([4 * x, 6 * y, (x * y) // 10], axis=2).clip(0, 255).astype(np.uint8)


def stored_turned(path, orientation, pixels, **options):
    """The picture as a camera held askew stores it: turned pixels, and how to turn them back."""
    picture = Image.fromarray(np.ascontiguousarray(TURNS[orientation](pixels)))
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(path, exif=exif, **options)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_picture_that_its_camera_stored_turned_is_the_upright_one(tmp_path, orientation, suffix):
    options = (
        {"lossless": True}
        if suffix == "webp"
        else {"quality": 95, "subsampling": 0}
        if suffix == "jpg"
        else {}
    )
    stored_turned(tmp_path / f"x.{suffix}", orientation, photograph(), **options)
    seen = read_image(tmp_path / f"x.{suffix}")
    assert seen.shape == (40, 60, 3)
    assert np.abs(seen.astype(int) - photograph()).max() <= (0 if suffix != "jpg" else 12)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_has_the_pixels_that_pillow_and_opencv_decode(
    tmp_path, subsampling, progressive, mode
):
    picture = Image.fromarray(photograph()).convert(mode)
    options = {"quality": 90, "progressive": progressive}
    picture.save(tmp_path / "plain.jpg", subsampling=subsampling, **options)
    found = read_image(tmp_path / "plain.jpg")
    with Image.open(tmp_path / "plain.jpg") as picture:
        assert np.array_equal(found, np.asarray(picture.convert("RGB")))
    by_opencv = cv2.imread(str(tmp_path / "plain.jpg"), cv2.IMREAD_COLOR_RGB)
    assert np.array_equal(found, by_opencv)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photographs_of_iphones_are_read_upright(tmp_path, orientation):
    pillow_heif = pytest.importorskip("pillow_heif", reason="HEIF is an optional extra")
    pillow_heif.register_heif_opener()
    pixels = np.tile(photograph(), (2, 2, 1))
    stored = Image.fromarray(np.ascontiguousarray(TURNS[orientation](pixels)))
    exif = stored.getexif()
    exif[0x0112] = orientation
    # From here pillow-heif also takes the rotation that HEIF has besides EXIF's.
    stored.info["exif"] = exif.tobytes()
    (tmp_path / "train" / "ant").mkdir(parents=True)
    stored.save(tmp_path / "train" / "ant" / "x.HEIC", format="HEIF", quality=100)
    images = open_images(str(tmp_path / "train"), "train")
    assert images.load(0).shape == pixels.shape and not images.left_out
    assert np.abs(images.load(0).astype(int) - pixels).mean() < 6


def test_how_to_read_heif_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("src.dataset.decoding.reads_heif", lambda: False)
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(12))
    _register_heif.cache_clear()
    with pytest.raises(BadImage, match="x.heic cannot be decoded: .*setup.sh --heif"):
        read_image(tmp_path / "x.heic")
    assert unread(["a/x.heic"]).endswith("; 'bash scripts/setup.sh --heif' makes .heic readable")


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_that_is_damaged_in_the_middle_is_named(tmp_path, orientation):
    """Nobody was told but by libjpeg, without the file's name."""
    path = tmp_path / "x.jpg"
    stored_turned(path, orientation, np.tile(photograph(), (5, 5, 1)), quality=90)
    whole = read_image(path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.warns(DamagedImage, match=f"{path} is damaged, and a part of it may be wrong: "):
        found = read_image(path)
    with warnings.catch_warnings(), pytest.raises(BadImage, match="a part of it may be wrong"):
        warnings.simplefilter("error", DamagedImage)  # as with --strict=1
        read_image(path)
    assert found.shape == whole.shape and not np.array_equal(found, whole)
    assert np.array_equal(found, np.asarray(ImageOps.exif_transpose(Image.open(path))))
    with pytest.warns(DamagedImage):
        assert read_image(path, min_side=50).shape == tuple(s // 4 for s in whole.shape[:2]) + (3,)


def png_chunk(kind, content):
    checksum = zlib.crc32(kind + content)
    return len(content).to_bytes(4, "big") + kind + content + checksum.to_bytes(4, "big")


def test_libpng_says_nothing_of_profiles_and_damage(picture, capfd):
    """It would write lines without the name of a file between ours."""
    picture = np.asarray(picture)
    whole = bytes(cv2.imencode(".png", picture[..., ::-1])[1])
    end_of_header = 33
    profile = png_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(b"no profile" * 20))
    odd = whole[:end_of_header] + profile + png_chunk(b"tIME", b"1") + whole[end_of_header:]
    for content in (whole, odd, odd + b"behind the end"):
        assert np.array_equal(decode_image(np.frombuffer(content, np.uint8), "a.png"), picture)
    middle = whole.index(b"IDAT") + 10
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (flipped, whole[:middle], whole[:-12], whole[:-13]):
        with pytest.raises(BadImage, match=r"a.png cannot be decoded: .* damaged, or was cut off"):
            decode_image(np.frombuffer(content, np.uint8), "a.png")
    assert capfd.readouterr() == ("", "")


def test_every_command_and_packed_sets_see_the_same_picture(tmp_path):
    """Photographs upright, turned by their camera and transparent.

    Training, evaluation and packed sets read what predict.py reads.
    """
    for name in ("upright", "turned", "transparent"):
        (tmp_path / "train" / name).mkdir(parents=True)
    Image.fromarray(photograph()).save(tmp_path / "train" / "upright" / "a.png")
    stored_turned(tmp_path / "train" / "turned" / "a.png", 6, photograph())
    clear = np.dstack(
        [photograph(), np.where(np.arange(60) < 30, 0, 255)[None].repeat(40, 0).astype(np.uint8)]
    )
    Image.fromarray(clear).save(tmp_path / "train" / "transparent" / "a.png")
    folder = open_images(str(tmp_path / "train"), "train")
    order = [path.split("/")[-2] for path in folder.paths]
    seen = dict(zip(order, map(folder.load, range(3))))
    assert np.array_equal(seen["upright"], photograph()) and np.array_equal(
        seen["turned"], photograph()
    )
    assert (seen["transparent"][:, :30] == 255).all() and np.array_equal(
        seen["transparent"][:, 30:], photograph()[:, 30:]
    )
    for side in (0, 30):
        target = str(tmp_path / f"{side}.safetensors")
        pack(folder, target, side, 95, 1, lambda count: None)
        packed = open_images(target, "train")
        for index in range(3):
            expected = folder.load(index)
            assert packed.load(index).shape[:2] == (expected.shape[:2] if side == 0 else (30, 45))
            assert side or np.array_equal(packed.load(index), expected)
            assert np.abs(packed.load(index).mean((0, 1)) - expected.mean((0, 1))).max() < 3


@pytest.fixture
def pipe(tmp_path):
    (tmp_path / "ant").mkdir()
    os.mkfifo(tmp_path / "ant" / "pipe.jpg")
    return tmp_path


def test_a_named_pipe_is_no_image_and_hangs_nothing(pipe):
    with pytest.raises(UserError, match="not a regular file"):
        read_image(str(pipe / "ant" / "pipe.jpg"))
    run = execute(
        ["python3", "train.py", f"--data_path={pipe}", f"--output_path={pipe}/out"], timeout=60
    )
    assert run.status == 2 and len(run.error_lines) == 1, run


@pytest.mark.parametrize("side", [4, 20000])
def test_what_only_opencv_knows_is_refused_because_nothing_bounds_it(tmp_path, side):
    """A Radiance picture: Pillow cannot read its header, OpenCV would decode it to any size."""
    header = f"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y {side} +X {side}\n".encode()
    (tmp_path / "x.jpg").write_bytes(header + bytes(4 * 4 * 4))
    with pytest.raises(UserError, match="not an image that can be decoded"):
        read_image(str(tmp_path / "x.jpg"))


def netpbm(magic, maxval, values):
    """A netpbm file of one row of grey or RGB values."""
    channels = 3 if magic in ("P3", "P6") else 1
    head = f"{magic}\n{len(values) // channels} 1\n{maxval}\n".encode()
    if magic in ("P2", "P3"):
        return head + " ".join(map(str, values)).encode() + b"\n"
    return head + np.array(values, ">u2" if maxval > 255 else "u1").tobytes()


@pytest.mark.parametrize("magic", ["P2", "P3", "P5", "P6"])
@pytest.mark.parametrize("maxval", [15, 255, 1023, 65535])
def test_netpbm_values_are_fractions_of_their_maximum(tmp_path, magic, maxval):
    """The definition of the formats (netpbm.sourceforge.net): maxval is white."""
    grey = [round(maxval * fraction) for fraction in (0, 1 / 3, 2 / 3, 1)]
    values = [value for value in grey for _ in range(3 if magic in ("P3", "P6") else 1)]
    (tmp_path / "x.ppm").write_bytes(netpbm(magic, maxval, values))
    found = read_image(str(tmp_path / "x.ppm"))[0]
    expected = np.array(grey) / maxval * 255
    assert np.abs(found - expected[:, None]).max() <= 1 and (found == found[:, :1]).all()


@pytest.mark.parametrize("masks", [None, (0xF800, 0x07E0, 0x001F)])
def test_bitmaps_of_16_bits_reach_white(tmp_path, masks):
    """5-5-5 and 5-6-5: the largest value of each channel is 255."""
    row = np.array([0, 0x7FFF if masks is None else 0xFFFF], "<u2").tobytes()
    fields = b"" if masks is None else np.array(masks, "<u4").tobytes()
    info = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 0 if masks is None else 3, 4, 0, 0, 0, 0)
    start = 14 + 40 + len(fields)
    header = b"BM" + struct.pack("<IHHI", start + 4, 0, 0, start)
    (tmp_path / "x.bmp").write_bytes(header + info + fields + row)
    assert read_image(str(tmp_path / "x.bmp"))[0].tolist() == [[0, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_without_a_white_are_refused(tmp_path, dtype):
    """They came out black."""
    Image.fromarray(np.full((4, 4), 200, dtype)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match="x.tif has signed, 32-bit or floating-point values"):
        read_image(str(tmp_path / "x.tif"))


def tiff(width, height, tags, data):
    """A little-endian TIFF of one strip; ``tags``: {tag: (type, values)}."""
    tags = {
        256: (3, [width]),
        257: (3, [height]),
        259: (3, [1]),
        273: (4, [8]),
        278: (3, [height]),
        279: (4, [len(data)]),
        **tags,
    }
    data += b"\0" * (len(data) % 2)
    start = 8 + len(data)
    after, entries = start + 2 + 12 * len(tags) + 4, b""
    rest = b""
    for tag, (kind, values) in sorted(tags.items()):
        packed = struct.pack("<" + {3: "H", 4: "I"}[kind] * len(values), *values)
        if len(packed) > 4:
            packed, rest = struct.pack("<I", after + len(rest)), rest + packed
        entries += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    directory = struct.pack("<H", len(tags)) + entries + b"\0" * 4
    return b"II*\0" + struct.pack("<I", start) + data + directory + rest


def decoded(content):
    return decode_image(np.frombuffer(content, np.uint8), "x")


def test_a_tiff_palette_of_8_bits_is_not_black():
    """As libtiff reads it: TIFF 6.0 has 16 bits there, but not every program knows."""
    colors = [0] * 768
    for place, value in {0: 10, 256: 20, 512: 30, 1: 200, 257: 100, 513: 50}.items():
        colors[place] = value
    tags = {258: (3, [8]), 262: (3, [3]), 277: (3, [1]), 320: (3, colors)}
    assert decoded(tiff(2, 1, tags, b"\0\1")).tolist() == [[[10, 20, 30], [200, 100, 50]]]


@pytest.mark.parametrize(
    "tags,data,message",
    [
        ({258: (3, [8]), 262: (3, [1]), 277: (3, [1]), 339: (3, [2])}, b"\x80\0", "signed values"),
        ({258: (3, [8, 8, 8]), 262: (3, [6]), 277: (3, [3])}, b"\x4c" * 6, "subsampled colours"),
    ],
)
def test_tiffs_that_pillow_reads_otherwise_than_they_mean_are_refused(tags, data, message):
    with pytest.raises(BadImage, match=message):
        decoded(tiff(2, 1, tags, data))


def test_a_fourth_value_that_is_no_transparency_hides_nothing():
    red = Image.new("RGBA", (2, 2), (250, 0, 0, 0))
    file = io.BytesIO()
    red.save(file, "TGA")
    content = bytearray(file.getvalue())
    assert (decoded(content) == 255).all()
    content[17] &= 0xF0  # no bits for transparency
    assert (decoded(content) == [250, 0, 0]).all()
    # A BMP of version 4 whose mask for transparency is there, and whose values are all 0.
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 1, 1, 1, 32, 3, 4, 0, 0, 0, 0) + masks
    header = header.ljust(108, b"\0")
    bmp = b"BM" + struct.pack("<IHHI", 14 + 108 + 4, 0, 0, 14 + 108) + header + b"\0\0\xfa\0"
    assert decoded(bmp).tolist() == [[[250, 0, 0]]]


def test_avif_in_a_container_of_any_images(picture):
    file = io.BytesIO()
    picture.save(file, "AVIF")
    content = file.getvalue()
    general = content[:8] + b"mif1" + content[12:]
    assert b"avif" in general[12:40] and np.array_equal(decoded(general), decoded(content))


def test_pictures_with_unreadable_metadata_are_upright(picture, tmp_path):
    picture.save(tmp_path / "good.jpg", dpi=(72, 72))
    whole = (tmp_path / "good.jpg").read_bytes()
    end = 4 + int.from_bytes(whole[4:6], "big")
    for number, exif in enumerate((b"\0" * 64, b"MM\0*\0\0\xff\xff", b"II*\0\x08\0\0\0\xff\xff")):
        block = b"Exif\0\0" + exif
        segment = b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block
        file = tmp_path / f"bad{number}.jpg"
        file.write_bytes(whole[:end] + segment + whole[end:])
        assert np.array_equal(read_image(str(file)), read_image(str(tmp_path / "good.jpg")))
    for kind in ("png", "webp"):
        file = tmp_path / f"bad.{kind}"
        picture.save(file, exif=b"Exif\0\0" + b"\0" * 64, lossless=True)
        assert np.array_equal(read_image(str(file)), np.asarray(picture))
    text = PngInfo()
    text.add_text("exif", "not metadata")
    picture.save(tmp_path / "text.png", pnginfo=text)
    assert np.array_equal(read_image(str(tmp_path / "text.png")), np.asarray(picture))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["TIFF", "PNG", "WEBP", "JPEG"])
def test_pictures_are_turned_once(orientation, suffix):
    """A red corner, top left as a person sees it; TIFF 6.0, page 36, says where it is stored."""
    seen = np.zeros((48, 64, 3), np.uint8)
    seen[:16, :16] = (255, 0, 0)
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: np.rot90,
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](seen)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    lossless = {"lossless": True} if suffix == "WEBP" else {}
    Image.fromarray(stored.copy()).save(file, suffix, exif=exif, **lossless)
    found = decode_image(np.frombuffer(file.getvalue(), np.uint8), "x")
    assert np.array_equal(found > 127, seen > 127)


def png(depth, color, rows, key):
    """A PNG of ``rows``, packed lines of bytes, with the transparent colour ``key``."""

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", 8, len(rows), depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("key", [0, 1, 3])
@pytest.mark.parametrize("depth", [2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_is_white(depth, key):
    """Of eight greys, 0 to 3 twice. PNG, section 11.3.2.1: samples that equal the key."""
    greys = [0, 1, 2, 3] * 2
    bits = "".join(f"{grey:0{depth}b}" for grey in greys)
    row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    found = decode_image(np.frombuffer(png(depth, 0, [row], [key]), np.uint8), "x")
    scale = 255 / ((1 << depth) - 1)
    expected = [255 if grey == key else int(grey * scale) for grey in greys]
    assert found[0, :, 0].tolist() == expected and (found[..., :1] == found).all()


def test_the_transparent_colour_of_a_png_of_16_bits_is_white():
    colors = np.array([[60123, 0, 513], [60123, 0, 512]] * 4, ">u2")
    encoded = png(16, 2, [colors.tobytes()], [60123, 0, 513])
    found = decode_image(np.frombuffer(encoded, np.uint8), "x")
    assert found[0, 0].tolist() == [255, 255, 255] and found[0, 1].tolist() == [234, 0, 2]


def test_white_is_zero_in_a_tiff_of_16_bits():
    greys = np.arange(0, 256, 4, dtype=np.uint16)[None]
    file = io.BytesIO()
    Image.fromarray(65535 - greys * 257).save(file, "TIFF", tiffinfo={262: 0})
    found = decode_image(np.frombuffer(file.getvalue(), np.uint8), "x")
    assert found[0, :, 0].tolist() == greys[0].tolist()


def test_a_tiff_of_12_bits_is_refused():
    """Pillow reads 4095, white, as 15 of 255."""
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    content = b"II" + struct.pack("<HI4sH", 42, 12, b"\xff\xff\xff\0", len(tags))
    content += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content += bytes(4)
    with pytest.raises(BadImage, match="x has 12 bits per value"):
        decode_image(np.frombuffer(content, np.uint8), "x")


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PDF", "PCX"])
def test_formats_that_start_programs_or_hide_their_size_are_refused(kind):
    """Ghostscript would run what an EPS says; an ICO may hold a picture of any size."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, kind)
    with pytest.raises(BadImage, match="x is not an image that can be decoded"):
        decode_image(np.frombuffer(file.getvalue(), np.uint8), "x")


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.extended)])
def test_drawn_pictures_are_as_pillow_shows_them_or_refused(count):
    random, seen = np.random.default_rng(20261128), set()
    for _ in range(count):
        drawn = draw_picture(random)
        if drawn is not None and check_whole(*drawn):
            seen.add(drawn[:2])
    assert len(seen) > 40


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.extended)])
def test_damaged_pictures_are_as_pillow_shows_them_or_refused(count):
    random, decoded = np.random.default_rng(20261130), 0
    for _ in range(count):
        drawn = draw_picture(random)
        if drawn is not None:
            decoded += check_damaged(damage(random, drawn[2]))
    assert decoded > count / 10


def test_a_pillow_image_with_a_transparent_colour_of_unknown_range_is_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "x.png", transparency=0)
    with pytest.raises(BadImage, match="RGBA"):
        picture_pixels(Image.open(tmp_path / "x.png"))


@pytest.fixture(scope="module")
def large_photo():
    """Shapes and textures of every size, as in a photograph, 2000 x 1400."""
    random = np.random.default_rng(0)
    pixels = np.zeros((1400, 2000, 3))
    for side in (4, 16, 64, 256, 1024):
        noise = Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8))
        pixels += np.asarray(noise.resize((2000, 1400), Image.Resampling.BICUBIC), float) / 5
    pixels[300:900, 700:1300] += 60
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    "min_side,divided_by", [(0, 1), (1401, 1), (701, 1), (700, 2), (350, 4), (175, 8), (10, 8)]
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_keeps_the_least_side(large_photo, tmp_path, min_side, divided_by, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    large_photo.save(tmp_path / "x.jpg", exif=exif)
    sides = (1400 // divided_by, 2000 // divided_by)
    seen = read_image(tmp_path / "x.jpg", min_side=min_side)
    assert seen.shape[:2] == (sides if orientation == 1 else sides[::-1])
    whole = Image.fromarray(read_image(tmp_path / "x.jpg"))
    small = whole.resize(seen.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(seen.astype(float) - np.asarray(small)).mean() < 1.5


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp"])
def test_other_formats_are_decoded_whole(large_photo, tmp_path, suffix):
    large_photo.crop((0, 0, 800, 600)).save(tmp_path / f"x.{suffix}")
    assert read_image(tmp_path / f"x.{suffix}", min_side=50).shape == (600, 800, 3)


def test_a_damaged_or_too_large_jpeg_is_refused_at_a_reduced_scale_too(large_photo, tmp_path):
    large_photo.save(tmp_path / "x.jpg")
    with pytest.raises(BadImage, match="2000 x 1400 pixels"):
        read_image(tmp_path / "x.jpg", max_pixels=10**6, min_side=100)
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:700])
    with pytest.raises(BadImage):
        read_image(tmp_path / "x.jpg", min_side=100)


@pytest.mark.parametrize(
    "what,reduced,exact",
    [
        ("training", "train", False),
        ("training", "all", False),
        ("training", "never", True),
        ("evaluation", "train", True),
        ("evaluation", "all", False),
    ],
)
@pytest.mark.parametrize("changes", [{"crop_scale": (0.35, 1.0)}, {"train_crop": "resize"}])
def test_the_network_sees_nearly_the_same(large_photo, tmp_path, what, reduced, exact, changes):
    (tmp_path / "a").mkdir()
    large_photo.save(tmp_path / "a" / "x.jpg", quality=95)
    images = open_images(str(tmp_path), "train")

    def seen(**more):
        config = make_config(
            image_size=64,
            per_batch_size=1,
            augmentations=["crop"],
            max_epoch=20,
            **{"antialias": True, **changes, **more},
        )
        if what == "evaluation":
            return EvalBatches(images, config, 0, 1, 1)[0].images.astype(float)
        batches = TrainBatches(images, config, 0, 1)
        return np.stack([batches[number].images for number in range(20)]).astype(float)

    difference = np.abs(seen(reduced_decoding=reduced) - seen(reduced_decoding="never"))
    assert difference.max() == 0 if exact else 0 < difference.mean() < 1.5


def test_without_antialiasing_images_are_decoded_whole(large_photo, tmp_path):
    """The pixels that it picks are those of the whole image."""
    (tmp_path / "a").mkdir()
    large_photo.save(tmp_path / "a" / "x.jpg", quality=95)
    images = open_images(str(tmp_path), "train")
    seen = [
        EvalBatches(images, make_config(image_size=64, reduced_decoding=reduced), 0, 1, 1)[0].images
        for reduced in ("all", "never")
    ]
    assert (seen[0] == seen[1]).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "L", "I;16", "1"])
def test_a_png_with_a_changed_byte_is_refused(mode):
    """Pillow does not compare the checksums: other pixels came out, without a word."""
    pixels = photograph()[:64, :64]
    source = Image.fromarray(pixels if mode != "I;16" else pixels[..., 0].astype(np.uint16) * 257)
    file = io.BytesIO()
    (source if mode == "I;16" else source.convert(mode)).save(file, "PNG")
    whole = file.getvalue()
    assert decode_image(np.frombuffer(whole, np.uint8), "x").shape == pixels.shape
    start = whole.index(b"IDAT") + 4
    for place in range(start, len(whole) - 16, max((len(whole) - 16 - start) // 20, 1)):
        content = bytearray(whole)
        content[place] ^= 0x10
        with pytest.raises(BadImage, match="damaged"):
            decode_image(np.frombuffer(content, np.uint8), "x")


def test_damage_in_a_cmyk_jpeg_is_told():
    file = io.BytesIO()
    Image.fromarray(np.tile(photograph(), (3, 3, 1))).convert("CMYK").save(file, "JPEG", quality=90)
    content = bytearray(file.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_image(np.frombuffer(bytes(content), np.uint8), "x")
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    with pytest.warns(DamagedImage, match="x is damaged"):
        decode_image(np.frombuffer(content, np.uint8), "x")


@pytest.mark.parametrize("kind", ["BMP", "TGA", "TIFF"])
def test_a_pillow_image_has_the_pixels_of_its_file(kind):
    """Two were white, because nobody had meant their transparency, and the third black."""
    pixels = photograph()[:40, :30]
    if kind == "TIFF":
        colors = [200] * 768
        tags = {258: (3, [8]), 262: (3, [3]), 277: (3, [1]), 320: (3, colors)}
        content = tiff(2, 1, tags, b"\0\1")
    else:
        file = io.BytesIO()
        transparent = np.dstack([pixels, np.zeros((40, 30), np.uint8)])
        Image.fromarray(transparent).save(file, kind)
        content = bytearray(file.getvalue())
        if kind == "TGA":
            content[17] &= 0xF0
    expected = decode_image(np.frombuffer(bytes(content), np.uint8), "x")
    assert np.array_equal(picture_pixels(Image.open(io.BytesIO(bytes(content)))), expected)
    assert 20 < expected.mean() < 235
