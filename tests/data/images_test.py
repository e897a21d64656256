"""Pixels: the reference's to the bit, and every bad file with its message."""

import functools
import io
import json
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples, images
from tests.conftest import goldens_folder

TOLERANCE = 1e-6  # float32 rounding of values of size 2; measured difference 0


@functools.cache
def golden_arrays():
    with np.load(goldens_folder() / "images" / "images.npz") as found:
        return dict(found)


def golden_keys():
    return [key for key in golden_arrays() if re.match(r"(clip|siglip)\d+_", key)]


def golden_paths():
    folder = goldens_folder() / "images"
    return [str(folder / image["file"]) for image in json.loads((folder / "meta.json").read_text())["images"]]


def transform(size=20, class_token=True, aspect="pad", max_pixels=50_000_000):
    return images.transform_for(
        config_lib.VisionConfig(image_size=size, class_token=class_token),
        config_lib.DataConfig(image_aspect=aspect, max_pixels=max_pixels),
    )


def noise(width, height, mode="RGB"):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, shape, np.uint8))


def encoded(image, kind="PNG", **kwargs):
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    return file.getvalue()


def huge_png(width, height):
    """A PNG whose header announces that size and whose content is missing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    end = b"IEND"
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + end + struct.pack(">I", zlib.crc32(end))


@pytest.mark.goldens
@pytest.mark.parametrize("key", golden_keys())
def test_pixels_are_the_image_processors(key):
    kind, size, aspect = re.match(r"(clip|siglip)(\d+)_(pad|square)", key).groups()
    step = 16 if key.endswith("_every16") else 1
    for path, expected in zip(golden_paths(), golden_arrays()[key], strict=True):
        found = transform(int(size), kind == "clip", aspect)(path)
        assert found.dtype == np.float32 and found.shape == (int(size), int(size), 3)
        np.testing.assert_allclose(found.transpose(2, 0, 1)[:, ::step, ::step], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.goldens
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_the_processor_file_of_a_checkpoint_gives_the_same_pixels(aspect):
    for folder in sorted(path for path in (goldens_folder() / "images").iterdir() if path.is_dir()):
        found = images.transform_from_hf(folder, aspect=aspect, max_pixels=10**6)
        for path, expected in zip(golden_paths(), golden_arrays()[f"{folder.name}_{aspect}"], strict=True):
            np.testing.assert_allclose(found(path).transpose(2, 0, 1), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("width", "height"), [(700, 31), (31, 700), (33, 32), (20, 5), (1, 300)])
def test_padding_without_the_canvas_equals_padding_with_it(width, height):
    image = noise(width, height)
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), (122, 116, 104))
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    expected = canvas.resize((20, 20), Image.Resampling.BICUBIC)
    mean, std = np.float32(images.CLIP_MEAN), np.float32(images.CLIP_STD)
    np.testing.assert_allclose(
        transform()(encoded(image)), (np.float32(expected) / 255 - mean) / std, rtol=0, atol=TOLERANCE
    )


def test_a_picture_of_the_towers_own_size_is_only_scaled_to_minus_one_to_one():
    image = noise(20, 20)
    found = transform(class_token=False)(encoded(image))
    np.testing.assert_allclose(found, np.asarray(image) / 127.5 - 1, atol=TOLERANCE)


def test_transparency_is_dropped_and_palettes_and_grey_become_rgb():
    image = noise(20, 20)
    expected = transform()(encoded(image))
    transparent = image.copy()
    transparent.putalpha(noise(20, 20, "L"))
    np.testing.assert_array_equal(transform()(encoded(transparent)), expected)
    grey = image.convert("L")
    np.testing.assert_array_equal(transform()(encoded(grey)), transform()(encoded(grey.convert("RGB"))))
    palette = image.convert("P")
    np.testing.assert_array_equal(transform()(encoded(palette)), transform()(encoded(palette.convert("RGB"))))


def test_sixteen_bit_grey_keeps_its_contrast():
    grey = noise(20, 20, "L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    np.testing.assert_array_equal(transform()(encoded(deep)), transform()(encoded(grey)))


def test_the_cameras_rotation_is_applied():
    image = noise(20, 12)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown upright it is rotated by 270 degrees
    turned = encoded(image, exif=exif)
    expected = transform()(encoded(image.transpose(Image.Transpose.ROTATE_270)))
    np.testing.assert_array_equal(transform()(turned), expected)


def both(ref, found=None):
    """Runs the check and the loading: both must refuse; returns the loading's error."""
    found = found or transform()
    with pytest.raises(bad_samples.SampleError):
        found.check(ref)
    with pytest.raises(bad_samples.SampleError) as error:
        found(ref, "s3")
    assert str(error.value).startswith("sample 's3': image")
    return error.value


def test_a_missing_file_is_refused_with_its_path(tmp_path):
    error = both(str(tmp_path / "none.png"))
    assert error.kind == "missing_image"
    assert re.search(r"none\.png' does not exist; every '<image>' needs its file; add it or correct", str(error))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("where", ["file", "memory"])
def test_a_cut_off_file_is_refused(tmp_path, kind, where):
    cut = encoded(noise(40, 30), kind)[:-200]
    path = tmp_path / "cut.bin"
    path.write_bytes(cut)
    error = both(str(path) if where == "file" else cut)
    assert error.kind == "unreadable_image"
    assert re.search(r"(cut\.bin'|bytes in memory\)) cannot be decoded .*fetch it again or remove", str(error))


@pytest.mark.parametrize(
    "content", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_bytes_that_are_no_image_are_refused(content):
    error = both(content)
    assert error.kind == "unreadable_image" and "must be a whole JPEG, PNG" in str(error)


def test_a_format_outside_the_list_is_refused_though_pillow_knows_it():
    assert both(encoded(noise(8, 6), "PCX")).kind == "unreadable_image"


def test_a_file_with_the_right_end_but_a_broken_middle_is_refused_when_it_is_read():
    broken = bytearray(encoded(noise(40, 30)))
    broken[200:260] = bytes(60)
    with pytest.raises(bad_samples.SampleError, match="cannot be decoded"):
        transform()(bytes(broken))


def test_an_image_of_20000_by_20000_is_refused_without_decoding_it():
    error = both(huge_png(20_000, 20_000))
    assert error.kind == "too_large_image"
    assert "400000000 pixels" in str(error) and "resize the file" in str(error)


def test_the_limit_is_the_configured_one():
    assert transform(max_pixels=600)(encoded(noise(20, 30))).shape == (20, 20, 3)
    error = both(encoded(noise(20, 31)), transform(max_pixels=600))
    assert "20 x 31 = 620 pixels, data.max_pixels is 600; resize the file or raise data.max_pixels" in str(error)


def test_a_very_long_strip_is_bounded_after_its_resize_too():
    error = both(encoded(noise(5000, 1)), transform(aspect="square", max_pixels=1_000_000))
    assert "of 5000 x 1 would take 2000000 pixels once its shorter side is 20" in str(error)
    assert transform(aspect="pad", max_pixels=1_000_000)(encoded(noise(5000, 1))).shape == (20, 20, 3)


def test_a_limit_beyond_pillows_own_is_refused():
    with pytest.raises(ValueError, match=r"data\.max_pixels=200000000 must lie in 1\.\.178956970"):
        transform(max_pixels=200_000_000)


def test_an_unknown_aspect_is_refused():
    with pytest.raises(ValueError, match=r"image_aspect='fit' is neither 'pad' nor 'square'"):
        transform(aspect="fit")


def test_siglip_processor_files_and_old_sizes_are_understood(tmp_path):
    file = tmp_path / "preprocessor_config.json"
    siglip = {"size": {"height": 30, "width": 30}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2}
    file.write_text(json.dumps(siglip))
    found = images.transform_from_hf(tmp_path, aspect="square", max_pixels=9)
    assert (found.size, found.keep_ratio, found.std, found.resample) == (30, False, (0.25,) * 3, 2)
    file.write_text(json.dumps(siglip | {"size": 28, "crop_size": 28}))
    found = images.transform_from_hf(tmp_path, aspect="square", max_pixels=9)
    assert (found.size, found.keep_ratio) == (28, True)
    file.rename(tmp_path / "processor_config.json")
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": siglip}))
    assert images.transform_from_hf(tmp_path, aspect="square", max_pixels=9).size == 30


def test_unsupported_processor_settings_are_all_named_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        images.transform_from_hf(tmp_path, aspect="pad", max_pixels=9)
    settings = {"size": {"longest_edge": 9}, "do_resize": False, "image_mean": [0.5] * 3, "rescale_factor": 0.1}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"do_resize=False.*rescale_factor=0\.1.*longest_edge.*image_std=None"):
        images.transform_from_hf(tmp_path, aspect="pad", max_pixels=9)
