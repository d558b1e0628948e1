import hashlib
import io
import struct
import tracemalloc
import zlib

import icc
import numpy as np
import pytest
from PIL import Image, ImageCms

from dopsd_jax.common.errors import UserError
from dopsd_jax.data.buckets import UPSTREAM
from dopsd_jax.data.images import (
    ImageLimits,
    covering_size,
    crop_name,
    enlargement,
    fit,
    inspect_image,
    open_alpha,
    open_image,
)

WIDTH, HEIGHT = 48, 40


def picture(width=WIDTH, height=HEIGHT, channels=3, seed=0):
    """Smooth colours, different in every corner."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 3, channels), dtype=np.uint8).squeeze())
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def save(path, array_or_image, kind="PNG", **options):
    image = array_or_image
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(path, kind, **options)
    return path


def png(width, height, depth, colour_type, data, chunks=()):
    """A PNG file of any depth, which Pillow cannot write."""
    lines = len(data) // height

    def chunk(name, content):
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    raw = b"".join(b"\0" + data[i * lines : (i + 1) * lines] for i in range(height))
    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", head) + b"".join(chunk(*c) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def problem(path, limits=None, call=open_image):
    with pytest.raises(UserError) as caught:
        call(path, limits)
    (line,) = caught.value.problems
    assert line.startswith(f"{path}: ")
    return line


# --- what is read


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP", "AVIF"])
def test_every_format_is_read_whatever_the_file_is_called(tmp_path, kind):
    array = picture()
    source = Image.fromarray(array).quantize(32) if kind == "GIF" else array
    path = save(tmp_path / "a.jpg", source, kind)
    read = open_image(path)
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert read.dtype == np.uint8 and read.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(read, expected)
    info = inspect_image(path)
    assert (info.width, info.height, info.notes) == (WIDTH, HEIGHT, ())
    assert info.digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_other_modes_become_rgb(tmp_path, mode):
    image = Image.fromarray(picture()).convert(mode)
    path = save(tmp_path / "a.tif", image, "TIFF")
    np.testing.assert_array_equal(open_image(path), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    array = picture()
    alpha = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
    image = Image.fromarray(array).convert(mode)
    image.putalpha(Image.fromarray(alpha))
    kind = "TIFF" if mode == "PA" else "PNG"
    path = save(tmp_path / "a", image, kind)
    colours = np.asarray(image.convert("RGBA"))[..., :3].astype(float)
    share = alpha[..., None] / 255
    read = open_image(path)
    assert np.abs(read - (share * colours + (1 - share) * 255)).max() <= 1
    assert (read[:, 0] == 255).all()
    assert inspect_image(path).notes == ("transparency laid on white",)


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_colour_marked_as_transparent_becomes_white(tmp_path, mode):
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[:, ::2] = 255
    image = Image.fromarray(np.dstack([values] * 3)).convert(mode)
    mark = image.getpixel((1, 0))  # black
    path = save(tmp_path / "a.png", image, transparency=mark)
    assert (open_image(path) == 255).all()


def test_full_opacity_is_not_worth_a_note(tmp_path):
    array = np.dstack([picture(), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    path = save(tmp_path / "a.png", array)
    np.testing.assert_array_equal(open_image(path), array[..., :3])
    assert inspect_image(path).notes == ()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(tmp_path, kind, orientation):
    upright = picture()
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "exif": exif}
    if kind == "MPO":
        options |= {"save_all": True, "append_images": [Image.fromarray(np.zeros_like(turned))]}
    path = save(tmp_path / "a", np.ascontiguousarray(turned), kind, **options)
    read = open_image(path).astype(int)
    assert read.shape == upright.shape
    assert np.abs(read - upright).mean() < 6
    for verify in (True, False):
        info = inspect_image(path, verify=verify)
        assert (info.width, info.height) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, kind):
    values = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    path = save(tmp_path / "a", values, kind)
    expected = np.round(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(open_image(path), np.dstack([expected] * 3))
    assert inspect_image(path).notes == ("16 bits a channel reduced to 8",)


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_16_bit_colour_is_scaled_not_clipped(tmp_path, colour_type, channels):
    count = HEIGHT * WIDTH * channels
    values = np.linspace(0, 65535, count).reshape(HEIGHT, WIDTH, channels).astype(">u2")
    if channels != 3:
        values[..., -1] = 65535
    path = tmp_path / "a.png"
    path.write_bytes(png(WIDTH, HEIGHT, 16, colour_type, values.tobytes()))
    colours = values[..., :3] if channels > 2 else np.repeat(values[..., :1], 3, -1)
    assert np.abs(open_image(path) - colours / 257).max() <= 1  # Pillow keeps the upper byte
    assert inspect_image(path).notes == ("16 bits a channel reduced to 8",)


def test_16_bit_grey_may_have_a_transparent_value(tmp_path):
    values = np.full((HEIGHT, WIDTH), 700, ">u2")
    values[:, 0] = 30000
    data = png(WIDTH, HEIGHT, 16, 0, values.tobytes(), [(b"tRNS", struct.pack(">H", 700))])
    (tmp_path / "a.png").write_bytes(data)
    read = open_image(tmp_path / "a.png")
    assert (read[:, 1:] == 255).all() and (read[:, 0] == round(30000 / 257)).all()


@pytest.mark.parametrize(("bits", "clear"), [(2, 3), (2, 1), (4, 15), (4, 9), (4, 0)])
def test_grey_of_few_bits_may_have_a_transparent_value(tmp_path, bits, clear):
    values = np.full((HEIGHT, WIDTH), clear, np.uint8)
    values[:, 0] = other = 2
    packed = np.packbits(values[..., None] >> np.arange(bits)[::-1] & 1)
    data = png(WIDTH, HEIGHT, bits, 0, packed.tobytes(), [(b"tRNS", struct.pack(">H", clear))])
    (tmp_path / "a.png").write_bytes(data)
    read, alpha = open_image(tmp_path / "a.png"), open_alpha(tmp_path / "a.png")
    assert (read[:, 1:] == 255).all() and (read[:, 0] == other * 255 // (2**bits - 1)).all()
    assert not alpha[:, 1:].any() and (alpha[:, 0] == 255).all()
    assert inspect_image(tmp_path / "a.png").notes == ("transparency laid on white",)


def test_16_bit_colour_with_a_transparent_one_is_refused(tmp_path):
    values = np.full((HEIGHT, WIDTH, 3), 700, ">u2")
    mark = [(b"tRNS", struct.pack(">HHH", 700, 700, 700))]
    (tmp_path / "a.png").write_bytes(png(WIDTH, HEIGHT, 16, 2, values.tobytes(), mark))
    for call in (open_image, open_alpha):
        told = problem(tmp_path / "a.png", call=call)
        assert told.endswith("has 16-bit colours, of which one is transparent; save it with 8 bits")


def test_white_is_zero_in_some_16_bit_tiffs(tmp_path):
    values = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    path = save(tmp_path / "a.tif", values, "TIFF", tiffinfo={262: 0})
    assert Image.open(path).tag_v2[262] == 0
    np.testing.assert_array_equal(open_image(path)[..., 0], 255 - np.round(values / 257))


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_pixels_without_one_meaning_are_refused(tmp_path, mode):
    path = save(tmp_path / "a.tif", Image.new(mode, (WIDTH, HEIGHT)), "TIFF")
    assert f"pixels of kind {mode}" in problem(path)


# --- colour profiles


def test_srgb_profiles_change_nothing(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    array = picture()
    path = save(tmp_path / "a.png", array, icc_profile=profile)
    np.testing.assert_array_equal(open_image(path), array)
    assert inspect_image(path).notes == ()


def srgb_curve(linear):
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_rgb_profiles_are_followed(tmp_path):
    array = picture()
    path = save(tmp_path / "a.png", array, icc_profile=icc.rgb_profile(1.0))
    assert np.abs(open_image(path) - 255 * srgb_curve(array / 255)).max() <= 2
    assert inspect_image(path).notes == ("converted to sRGB from ICC profile 'test'",)
    path = save(tmp_path / "b.png", array, icc_profile=icc.rgb_profile(2.2, swapped=True))
    expected = 255 * srgb_curve((array / 255) ** 2.2)[..., ::-1]
    assert np.abs(open_image(path) - expected).max() <= 2


@pytest.mark.parametrize("profile", [icc.grey_profile(1.0), icc.rgb_profile(1.0)])
def test_grey_pictures_follow_grey_and_rgb_profiles(tmp_path, profile):
    array = picture(channels=1)
    path = save(tmp_path / "a.png", array, icc_profile=profile)
    read = open_image(path)
    assert np.abs(read - 255 * srgb_curve(array[..., None] / 255)).max() <= 2


@pytest.mark.parametrize("inks", [slice(0, 3), slice(3, 4)])
def test_cmyk_goes_through_its_profile(tmp_path, inks):
    amount = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    inked = np.zeros((64, 256, 4), np.uint8)
    inked[..., inks] = amount[..., None]
    image = Image.frombytes("CMYK", (256, 64), inked.tobytes())
    path = save(tmp_path / "a.tif", image, "TIFF", icc_profile=icc.cmyk_profile())
    light = 100 * (1 - amount / 255)
    luminance = np.where(light > 8, ((light + 16) / 116) ** 3, light / 903.3)
    assert np.abs(open_image(path) - 255 * srgb_curve(luminance)[..., None]).max() <= 2
    assert inspect_image(path).notes == ("converted to sRGB from ICC profile 'test'",)


def test_a_cmyk_jpeg_and_its_profile(tmp_path):
    image = Image.new("CMYK", (WIDTH, HEIGHT), (0, 0, 0, 255))
    options = {"quality": 100, "icc_profile": icc.cmyk_profile()}
    path = save(tmp_path / "a.jpg", image, "JPEG", **options)
    assert open_image(path).max() <= 3
    image = Image.new("CMYK", (WIDTH, HEIGHT), 0)
    assert open_image(save(path, image, "JPEG", **options)).min() >= 252


def test_cmyk_without_a_profile_is_read_with_a_note(tmp_path):
    image = Image.new("CMYK", (WIDTH, HEIGHT), (0, 255, 255, 0))
    path = save(tmp_path / "a.jpg", image, "JPEG", quality=100)
    assert np.abs(open_image(path).astype(int) - [255, 0, 0]).max() <= 3
    (note,) = inspect_image(path).notes
    assert "CMYK without a usable ICC profile" in note


def test_a_profile_that_does_not_fit_is_noted(tmp_path):
    array = picture()
    path = save(tmp_path / "a.png", array, icc_profile=icc.cmyk_profile())
    np.testing.assert_array_equal(open_image(path), array)
    assert "ICC profile is for CMYK, the picture is RGB: ignored" in inspect_image(path).notes
    path = save(tmp_path / "b.png", array, icc_profile=b"no profile at all")
    np.testing.assert_array_equal(open_image(path), array)
    assert "unreadable ICC profile ignored" in inspect_image(path).notes[0]


# --- what is refused


def test_each_bad_file_is_one_clear_line(tmp_path):
    def write(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    whole = io.BytesIO()
    Image.fromarray(picture()).save(whole, "PNG")
    whole = whole.getvalue()
    assert "no such picture" in problem(tmp_path / "nowhere.png")
    assert "is a folder, a file is needed" in problem(tmp_path)
    assert "is empty (zero bytes)" in problem(write("zero.png", b""))
    assert "is damaged or truncated" in problem(write("cut.png", whole[: len(whole) // 2]))
    assert "is damaged or truncated" in problem(write("head.png", whole[:20]))
    assert "is not a picture of a known format" in problem(write("noise.png", b"\1\2\3" * 50))
    assert "but text (a failed download?)" in problem(write("html.png", b"<!DOCTYPE html>"))
    film = write("film.jpg", b"\0\0\0\x18ftypisom" + bytes(99))
    assert "is a film or a picture of an unknown kind" in problem(film)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "MPO"])
def test_truncated_files_of_every_format_are_found_by_decoding(tmp_path, kind):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = save(tmp_path / "a", image.quantize() if kind == "GIF" else image, kind)
    path.write_bytes(path.read_bytes()[:-900])
    assert "is damaged or truncated" in problem(path)
    assert "is damaged or truncated" in problem(path, call=inspect_image)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_animations_and_pages_are_refused(tmp_path, kind):
    frames = [Image.fromarray(picture(seed=s)) for s in range(3)]
    path = save(tmp_path / "a", frames[0], kind, save_all=True, append_images=frames[1:])
    line = problem(path)
    assert ("has 3 pages" if kind == "TIFF" else "has 3 frames (animated)") in line


def test_two_views_from_a_phone_are_one_picture(tmp_path):
    first, second = (Image.fromarray(picture(seed=s)) for s in range(2))
    path = save(tmp_path / "a.jpg", first, "MPO", save_all=True, append_images=[second], quality=95)
    assert Image.open(path).n_frames == 2
    assert np.abs(open_image(path).astype(int) - np.asarray(first)).mean() < 3


def test_a_bomb_is_refused_before_its_pixels_are_made(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(30_000, 30_000, 1, 0, bytes(3750 * 30_000)))
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    line = problem(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "30000x30000 is 900 megapixels, the limit is 150" in line
    assert peak < 1 << 20


def test_the_limits_are_free(tmp_path):
    path = save(tmp_path / "a.png", picture())
    assert "the limit is 0" in problem(path, ImageLimits(max_pixels=WIDTH * HEIGHT - 1))
    assert "smaller than 41 pixels" in problem(path, ImageLimits(min_side=41))
    assert "longer than 1.1:1" in problem(path, ImageLimits(max_aspect=1.1))
    open_image(path, ImageLimits(max_pixels=WIDTH * HEIGHT, min_side=40, max_aspect=1.2))


def test_tiny_and_extreme_pictures_are_refused(tmp_path):
    assert "smaller than 32 pixels" in problem(save(tmp_path / "a.png", picture(31, 64)))
    assert "longer than 8:1" in problem(save(tmp_path / "b.png", picture(32, 257)))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_never_escape_as_another_error(tmp_path):
    rng = np.random.default_rng(0)
    sources = []
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"):
        image = Image.fromarray(picture())
        path = save(tmp_path / "a", image.quantize() if kind == "GIF" else image, kind)
        sources.append(path.read_bytes())
    path = tmp_path / "fuzz"
    refused = 0
    for _ in range(300):
        content = bytearray(sources[rng.integers(len(sources))])
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(min(len(content), 400))] = rng.integers(256)
        path.write_bytes(content)
        try:
            open_image(path)
        except UserError as error:
            assert len(error.problems) == 1
            refused += 1
    assert refused > 30


# --- cutting to a bucket


def test_the_scaled_picture_always_covers_the_target():
    for target in UPSTREAM:
        for width in range(200, 2400, 7):
            for height in (width, 777, 1024, 1531):
                scaled = covering_size(width, height, *target)
                assert scaled[0] >= target[0] and scaled[1] >= target[1]
                assert target[0] == scaled[0] or target[1] == scaled[1]
                scale = max(target[0] / width, target[1] / height)
                assert abs(scaled[0] - width * scale) <= 0.5 + 1e-9
                assert abs(scaled[1] - height * scale) <= 0.5 + 1e-9


def test_no_black_edge_at_any_width():
    for width in range(65, 400):
        white = np.full((60, width, 3), 255, np.uint8)
        assert (fit(white, 64, 48) == 255).all()
    # Where truncation, as upstream, falls one pixel short: about a tenth of all widths.
    truncated = [w for w in range(1025, 3000) if int(w * (1024 / w)) < 1024]
    assert len(truncated) > 150
    for width in truncated[:20]:
        assert (fit(np.full((width, width, 3), 255, np.uint8), 1024, 1024)[:, -1] == 255).all()


def test_fit_keeps_the_centre():
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = (10, 200, 90)
    np.testing.assert_array_equal(fit(wide, 64, 64), np.full((64, 64, 3), (10, 200, 90)))
    tall = wide.transpose(1, 0, 2)
    np.testing.assert_array_equal(fit(tall, 64, 64), np.full((64, 64, 3), (10, 200, 90)))


def test_fit_is_pillows_antialiased_bicubic():
    array = picture(200, 150)
    expected = Image.fromarray(array).resize((128, 96), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(fit(array, 96, 96), np.asarray(expected)[:, 16:112])


def test_fit_leaves_a_fitting_picture_alone():
    array = picture(64, 48)
    np.testing.assert_array_equal(fit(array, 64, 48), array)


def test_enlargement_is_told():
    assert enlargement(512, 512, 1024, 1024) == 2
    assert enlargement(2048, 1024, 1024, 1024) == 1
    assert enlargement(2048, 2048, 1024, 1024) == 0.5


def test_crop_names_differ_by_size():
    assert crop_name(64, 48) != crop_name(48, 64)
