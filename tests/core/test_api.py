"""vitcmp.forward and the spec strings: a wrong argument is one clear error; precision is the same on both sides."""

import numpy as np
import pytest

import vitcmp
from vitcmp.specs import parse_image_size

SPEC = "vit_ti16:depth=1,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=32x48"
CNN = "resnet18:depths=1+1,width=8,num_classes=10"
IMAGES = np.random.default_rng(0).uniform(-1, 1, (1, 32, 48, 3)).astype(np.float32)


def forward(backend="torch", spec=SPEC, weights=None, images=IMAGES, **options):
    pytest.importorskip(backend if backend in ("jax", "torch") else "numpy")
    weights = vitcmp.init_weights(spec) if weights is None else weights
    return vitcmp.forward(backend, spec, weights, images, device="cpu", **options)


@pytest.mark.parametrize(
    "images, words",
    [
        ((IMAGES * 255).astype(np.uint8), "uint8"),
        (IMAGES.astype(int), "int64"),
        (IMAGES.astype(complex), "complex128"),
        (IMAGES.astype(bool), "bool"),
        (IMAGES[0], r"\(32, 48, 3\)"),
        (IMAGES[..., :1], r"\(1, 32, 48, 1\)"),
        (IMAGES.transpose(0, 3, 1, 2), r"\(1, 3, 32, 48\)"),
        (IMAGES[:0], r"\(0, 32, 48, 3\)"),
        (None, "object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_wrong_images_are_named_with_what_is_expected(backend, images, words):
    with pytest.raises(ValueError, match=rf"images_nhwc is .*{words}.*floats of \(batch, height, width, 3\)"):
        forward(backend, images=images)


@pytest.mark.parametrize(
    "weights, words",
    [
        ([], "a list"),
        ("file.npz", "a str"),
        ({"norm/bias": [0.0]}, r"norm/bias \(list\)"),
        ({"norm/bias": np.zeros(48, int)}, r"norm/bias \(int64\)"),
        ({"norm/bias": np.array(["a"])}, "norm/bias"),
    ],
)
def test_weights_that_are_no_weights_are_named(weights, words):
    with pytest.raises(ValueError, match=words):
        forward(weights=weights)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"backend": "jaks"}, "did you mean 'jax'"),
        ({"backend": None}, "unknown backend None"),
        ({"numerics": "fp32"}, "allowed: float32"),
        ({"numerics": None}, "unknown numerics None"),
        ({"attention": "flsh"}, "did you mean 'flash'"),
        ({"spec": CNN, "attention": "flash"}, "a resnet has none"),
        ({"spec": 3, "weights": {}}, "model 3"),
    ],
)
def test_wrong_names_are_one_clear_error(options, words):
    with pytest.raises(ValueError, match=words):
        forward(**options)


@pytest.mark.parametrize(
    "backend, options",
    [
        ("torch", {"attention": "cudnn"}),
        ("torch", {"attention": "mem_efficient"}),
        ("jax", {"attention": "cudnn"}),
        ("jax", {"attention": "pallas"}),
        ("jax", {"numerics": "tensorfloat32"}),
        ("torch", {"numerics": "tensorfloat32"}),
    ],
)
def test_what_a_cpu_does_not_have_is_unsupported_by_name(backend, options):
    with pytest.raises(vitcmp.Unsupported, match=next(iter(options.values()))):
        forward(backend, **options)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_mixed_precision_computes_a_vit_as_its_16_bit_twin_does(backend):
    """Parameters are cast where they are used, so only training can tell the two apart."""
    mixed, whole = (forward(backend, numerics=numerics) for numerics in ("bfloat16_mixed", "bfloat16"))
    for name, values in mixed.items():
        np.testing.assert_array_equal(values, whole[name], err_msg=name)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_without_classes_there_are_no_logits(backend):
    spec = f"{SPEC},num_classes=0"
    assert "logits" not in forward(backend, spec=spec, weights=vitcmp.init_weights(spec))


@pytest.mark.parametrize(
    "size", [80.5, 3.7, (80.5, 100), True, None, object(), "80x", "", (1, 2, 3), (), 0, -224, "\uff12\uff12\uff14"]
)
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="image_size="):
        parse_image_size(size)


@pytest.mark.parametrize(
    "name, words",
    [
        ("vit_b16:pool", "pool has no value"),
        ("vit_b16:pool=", "pool has no value"),
        ("vit_b16:norm_eps=inf", "norm_eps='inf'"),
        ("vit_b16:norm_eps=2", "between 0 and 1"),
        ("vit_b16:depth=1_0", "depth='1_0'"),
        ("vit_b016", "unknown model"),
        ("resnet50:norm_momentum=7", "from 0 to 1"),
        ("convnext_b:kernel_size=-3", "kernel_size='-3'"),
        ("vitdet_b16:global_blocks=99", "global_blocks=99"),
        ("vit_b16:image_size=8", "smaller than one patch"),
        ("", "unknown model ''"),
    ],
)
def test_a_spec_string_that_is_nonsense_is_refused(name, words):
    with pytest.raises(ValueError, match=words):
        vitcmp.get_spec(name)


def test_one_global_block_is_named_with_a_plus():
    assert vitcmp.get_spec("vitdet_b16:global_blocks=2+").global_blocks == (2,)
    assert len(vitcmp.get_spec("vitdet_b16:global_blocks=2").global_blocks) == 2


@pytest.mark.parametrize("seed", [-1, 1.5, "0", None])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(ValueError, match="seed="):
        vitcmp.init_weights(CNN, seed)
