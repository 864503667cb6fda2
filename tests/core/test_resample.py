"""Resizing against TensorFlow, JAX, torch and Pillow, and what differs between them, held as such."""

from pathlib import Path

import numpy as np
import pytest

from vitcmp.resample import KERNELS, METHODS, resize, resize_matrix

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tf_image_resize.npz"
# Down, up, one axis each way, one axis alone, and the same size; of a 23 x 37 picture.
SIZES = [(11, 13), (8, 37), (46, 74), (31, 29), (23, 37)]
# The others compute in float32: positions up to 37 are off by eps * 37 pixels, and neighbours differ by up to 255.
ATOL = np.finfo(np.float32).eps * 37 * 255


def picture(shape=(23, 37, 3), dtype=np.float64):
    return (255 * np.random.default_rng(0).random(shape)).astype(dtype)


def apply(rows, columns, image):
    return np.einsum("ih,jw,hwc->ijc", rows, columns, image)


def tensorflow_cases():
    with np.load(FIXTURE) as file:
        return [name for name in file.files if name != "image"]


def load_case(name):
    method, antialias, size = name.split("/")
    with np.load(FIXTURE) as file:
        image, expected = file["image"], file[name]
    size = tuple(map(int, size.split("x")))
    return image, expected, size, method.replace("mitchellcubic", "mitchell"), antialias == "aa"


@pytest.mark.parametrize("name", [name for name in tensorflow_cases() if not name.startswith("bicubic/noaa")])
def test_equals_tensorflow(name):
    image, expected, size, method, antialias = load_case(name)
    np.testing.assert_allclose(resize(image, size, method=method, antialias=antialias), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", [name for name in tensorflow_cases() if name.startswith("bicubic/noaa")])
def test_tensorflows_bicubic_without_antialias_rounds_positions_to_1024ths(name):
    image, expected, size, method, antialias = load_case(name)
    matrices = [rounded_bicubic(*sizes) for sizes in zip(image.shape, size, strict=False)]
    np.testing.assert_allclose(apply(*matrices, image), expected, rtol=0, atol=ATOL)
    # What the rounding costs: half a 1024th, times the kernel's slopes (a sum of 2 at most), for each axis.
    atol = 2 * 255 * 2 * 0.5 / 1024
    np.testing.assert_allclose(resize(image, size, method=method, antialias=antialias), expected, rtol=0, atol=atol)


def rounded_bicubic(in_size, out_size):
    centres = (np.arange(out_size) + 0.5) * in_size / out_size - 0.5
    centres = np.floor(centres) + np.round((centres - np.floor(centres)) * 1024) / 1024
    weights = KERNELS["bicubic"](np.abs(np.arange(in_size) - centres[:, None]))
    return weights / weights.sum(axis=1, keepdims=True)


def test_every_method_is_in_the_tensorflow_fixture():
    assert {load_case(name)[3] for name in tensorflow_cases()} == set(METHODS)


JAX_NAMES = {"bilinear": "linear", "bicubic": "cubic"}


def jax_atol(method):
    """JAX's Lanczos takes 1 for what lies within 1e-3 of the centre, which is 1 - 2e-6 there."""
    return 255 * (1e-5 if method.startswith("lanczos") else 1e-13)


@pytest.mark.parametrize("size", [(31, 14), (11, 13), (46, 74)])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("method", ["nearest", "area", "bilinear", "bicubic", "lanczos3", "lanczos5"])
def test_equals_jax_image_resize(method, antialias, size):
    jax = pytest.importorskip("jax")
    if method == "area" and not hasattr(jax.image.ResizeMethod, "AREA"):
        pytest.skip("this JAX has no area")
    name = JAX_NAMES.get(method, method)
    with jax.enable_x64(True):
        expected = jax.image.resize(picture(), (*size, 3), name, antialias=antialias)
    ours = resize(picture(), size, method=method, antialias=antialias)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=jax_atol(method))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("method", ["bilinear", "bicubic", "lanczos3", "lanczos5"])
def test_equals_jax_image_scale_and_translate(method, antialias):
    jax = pytest.importorskip("jax")
    scale, name = np.divide((8, 50), (23, 37)), JAX_NAMES.get(method, method)
    with jax.enable_x64(True):
        expected = jax.image.scale_and_translate(
            picture(), (8, 50, 3), (0, 1), scale, np.zeros(2), name, antialias=antialias
        )
    ours = resize(picture(), (8, 50), method=method, antialias=antialias)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=jax_atol(method))


def torch_resize(image, size, **options):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(image.transpose(2, 0, 1))[None]
    return torch.nn.functional.interpolate(x, size, **options)[0].numpy().transpose(1, 2, 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("method", "antialias", "mode"),
    [
        ("bilinear", True, "bilinear"),
        ("bicubic", True, "bicubic"),
        ("bilinear", False, "bilinear"),
        ("nearest", True, "nearest-exact"),
    ],
)
def test_equals_torch(method, antialias, mode, size):
    options = {"antialias": antialias, "align_corners": False} if mode != "nearest-exact" else {}
    expected = torch_resize(picture(), size, mode=mode, **options)
    ours = resize(picture(), size, method=method, antialias=antialias)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=255 * 1e-13)


@pytest.mark.parametrize("size", SIZES)
def test_equals_torchs_lanczos(size):
    torch = pytest.importorskip("torch")
    if "lanczos" not in torch.nn.functional.interpolate.__doc__:
        pytest.skip("this torch has no Lanczos")
    expected = torch_resize(picture(), size, mode="lanczos", antialias=True, align_corners=False)
    np.testing.assert_allclose(resize(picture(), size, method="lanczos3"), expected, rtol=0, atol=255 * 1e-13)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_torch_rounds_and_clips_uint8_images_after_each_axis(method):
    image = picture(dtype=np.uint8)
    theirs = torch_resize(image, (11, 13), mode=method, antialias=True, align_corners=False)
    # As Pillow, below: half a level for each axis, and weights of 16 bits at most.
    difference = np.clip(resize(image, (11, 13), method=method), 0, 255) - theirs
    assert 0.4 < np.abs(difference).max() < 1.5
    assert abs(difference.mean()) < 0.1, "it cuts off"


@pytest.mark.parametrize("size", SIZES[:4])
def test_torchs_bicubic_without_antialias_has_another_kernel_and_repeats_the_edge(size):
    expected = torch_resize(picture(), size, mode="bicubic", align_corners=False)
    matrices = [torch_bicubic(*sizes) for sizes in zip((23, 37), size, strict=True)]
    np.testing.assert_allclose(apply(*matrices, picture()), expected, rtol=0, atol=255 * 1e-13)
    ours = resize(picture(), size, method="bicubic", antialias=False)
    assert np.abs(ours - expected).max() > 1


def torch_bicubic(in_size, out_size):
    centres = (np.arange(out_size) + 0.5) * in_size / out_size - 0.5
    weights = np.zeros((out_size, in_size))
    for row, centre in zip(weights, centres, strict=True):
        for pixel in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            row[np.clip(pixel, 0, in_size - 1)] += KERNELS["bicubic"].func(np.abs(pixel - centre), b=0, c=0.75)
    return weights


def test_torchs_area_is_ours_only_where_whole_pixels_fit():
    image = picture((24, 36, 3))
    np.testing.assert_allclose(
        resize(image, (8, 9), method="area"), torch_resize(image, (8, 9), mode="area"), atol=1e-12
    )
    assert np.abs(resize(image, (11, 13), method="area") - torch_resize(image, (11, 13), mode="area")).max() > 1


def test_torchs_nearest_has_no_half_pixel_centres():
    assert (
        np.abs(resize(picture(), (11, 13), method="nearest") - torch_resize(picture(), (11, 13), mode="nearest")).max()
        > 1
    )


def pillow_resize(image, size, method):
    pillow = pytest.importorskip("PIL.Image")
    filters = {
        "nearest": "NEAREST", "area": "BOX", "bilinear": "BILINEAR", "bicubic": "BICUBIC", "lanczos3": "LANCZOS"
    }  # fmt: skip
    channels = [pillow.fromarray(image[..., c]) for c in range(3)]
    resample = pillow.Resampling[filters[method]]
    return np.stack([np.asarray(channel.resize(size[::-1], resample)) for channel in channels], axis=-1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic", "lanczos3"])
def test_equals_pillow_on_float_images(method, size):
    image = picture(dtype=np.float32)
    np.testing.assert_allclose(
        resize(image, size, method=method), pillow_resize(image, size, method), rtol=0, atol=ATOL
    )


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "lanczos3"])
def test_pillow_rounds_and_clips_uint8_images_after_each_axis(method):
    image = picture(dtype=np.uint8)
    ours, theirs = resize(image, (11, 13), method=method), pillow_resize(image, (11, 13), method)
    # Half a level for each axis, the first one's spread by the second's negative lobes.
    assert np.abs(np.clip(ours, 0, 255) - theirs).max() < 1.5
    assert np.abs(ours - theirs).max() > 0.4


def test_pillows_box_is_area_only_where_whole_pixels_fit():
    image = picture((24, 36, 3), np.float32)
    np.testing.assert_allclose(resize(image, (8, 9), method="area"), pillow_resize(image, (8, 9), "area"), atol=ATOL)
    assert np.abs(resize(image, (11, 13), method="area") - pillow_resize(image, (11, 13), "area")).max() > 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("in_size", [1, 2, 7])
@pytest.mark.parametrize("out_size", [1, 3, 7, 20])
@pytest.mark.parametrize("antialias", [True, False])
def test_a_constant_stays_constant(method, in_size, out_size, antialias):
    image = np.full((in_size, 5, 2), 0.3)
    resized = resize(image, (out_size, 4), method=method, antialias=antialias)
    np.testing.assert_allclose(resized, np.full((out_size, 4, 2), 0.3), rtol=1e-12)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("gaussian", "mitchell")])
def test_the_same_size_changes_nothing(method):
    np.testing.assert_allclose(resize(picture(), (23, 37), method=method), picture(), atol=255 * 1e-15)


def test_height_and_width_are_not_swapped():
    image = np.broadcast_to(np.arange(4.0)[:, None, None], (4, 6, 1))  # each row its number
    assert resize(image, (2, 9)).shape == (2, 9, 1)
    assert (np.ptp(resize(image, (2, 9)), axis=1) < 1e-12).all()
    np.testing.assert_allclose(resize(picture(), (31, 9)).swapaxes(0, 1), resize(picture().swapaxes(0, 1), (9, 31)))


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)])
def test_leading_axes_are_images_of_their_own(batch):
    images = picture((*batch, 5, 7, 2))
    resized = resize(images, (4, 9))
    assert resized.shape == (*batch, 4, 9, 2)
    for index in np.ndindex(*batch):
        np.testing.assert_allclose(resized[index], resize(images[index], (4, 9)), atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "result"), [("float64", "float64"), ("float32", "float32"), ("float16", "float32"), ("uint8", "float32")]
)
def test_float64_stays_and_all_else_becomes_float32(dtype, result):
    image = picture((5, 7, 3)).astype(dtype)
    resized = resize(image, (3, 9), method="bicubic")
    assert resized.dtype == result
    np.testing.assert_array_equal(resized, resize(image.astype(np.float64), (3, 9), method="bicubic").astype(result))


def test_a_matrix_that_is_kept_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        resize_matrix(5, 3, method="area")[0] = 1


@pytest.mark.parametrize(
    ("shape", "size", "method", "message"),
    [
        (
            (5, 5, 3),
            (4, 4),
            "bilinaer",
            r"unknown method 'bilinaer'; did you mean 'bilinear'\?; allowed: nearest, area",
        ),
        ((5, 5), (4, 4), "area", r"shape \(5, 5\), expected \(..., height, width, channels\)"),
        ((0, 5, 3), (4, 4), "area", r"shape \(0, 5, 3\)"),
        ((5, 5, 3), (0, 4), "area", r"size=\(0, 4\) must be \(height, width\)"),
        ((5, 5, 3), (4.5, 4), "area", r"size=\(4.5, 4\)"),
        ((5, 5, 3), 4, "area", r"size=4"),
        ((5, 5, 3), (4, 4, 3), "area", r"size=\(4, 4, 3\)"),
        ((5, 5, 3), "ab", "area", r"size='ab'"),
    ],
)
def test_bad_arguments_are_named_with_what_is_allowed(shape, size, method, message):
    with pytest.raises(ValueError, match=message):
        resize(np.zeros(shape), size, method=method)
