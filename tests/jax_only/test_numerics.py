"""Numerics are what their names say: in a matmul, in a convolution, and through a whole model, against float64."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp

import vitcmp
from jax_models.backend import JaxBackend
from vitcmp.backend import Unsupported, load_backend

# A value rounded to p bits is off by a uniform share of its last place: in the mean square 2**-p / sqrt(3) at most
# and half of that at least. 16-bit products are summed in float32, so that one rounding is all there is; in float32 and
# float64 the sums of 256 and 576 products are rounded too: up to sqrt(576) roundings that add like noise.
BITS = {"float64": 53, "float32": 24, "bfloat16": 8, "bfloat16_mixed": 8, "float16": 11}
MODELS = {
    "vit": "vit_ti16:depth=2,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=48x80",
    "vitdet": "vitdet_ti16:depth=2,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=48x80,window_size=2,"
    "global_blocks=1",
    "resnet": "resnet50:depths=1+1,width=8,num_classes=10,image_size=48x80",
    "bit": "bit_r50x1:depths=1+1,num_classes=10,image_size=48x80",
    "convnext": "convnext_atto:depths=1+1,widths=8+16,num_classes=10,image_size=48x80",
}


@pytest.fixture(scope="module")
def backend() -> JaxBackend:
    return load_backend("jax", platform="cpu")


@pytest.mark.parametrize("name", [name for name in BITS if name != "float64"])
def test_a_matmul_and_a_convolution_are_rounded_as_the_name_says(backend, name):
    is_wide = BITS[name] >= 24
    rounding = 2.0 ** -BITS[name] / 3**0.5
    with backend.numerics(name) as effective:
        for error in (effective["matmul_error"], effective["conv_error"]):
            assert rounding / 2 < error < rounding * (24 if is_wide else 1)
    assert jnp.ones(1).dtype == jnp.float32


def test_float64_is_double_and_does_not_outlast_its_context(backend):
    with backend.numerics("float64") as effective:  # what it is compared with is no better
        assert effective["matmul_error"] < 2**-53 * 24
        assert effective["conv_error"] < 2**-53 * 24
        assert jnp.asarray(np.ones(1)).dtype == jnp.float64
    assert jnp.asarray(np.ones(1)).dtype == jnp.float32


def test_an_error_that_the_name_does_not_allow_is_unsupported(backend, monkeypatch):
    monkeypatch.setattr(backend, "_errors", lambda dtype: {"matmul_error": 1e-7, "conv_error": 3e-4})
    with pytest.raises(Unsupported, match="numerics=float32: conv_error .*0.0003.* at most 1e-05"):
        backend.numerics("float32").__enter__()
    with backend.numerics("float16") as effective:
        assert effective["conv_error"] == 3e-4


def test_what_the_cpu_does_not_have_is_unsupported(backend):
    with pytest.raises(Unsupported, match="tensorfloat32"), backend.numerics("tensorfloat32"):
        pass
    with pytest.raises(Unsupported, match="tpu"):
        load_backend("jax", platform="tpu")


@pytest.fixture(scope="module")
def exact_logits(backend):
    return {family: run_model(backend, family, "float64") for family in MODELS}


def run_model(backend, family, numerics, *, attention=None):
    spec = vitcmp.get_spec(MODELS[family])
    images = np.random.default_rng(0).uniform(-1, 1, (2, *spec.image_size, 3)).astype(np.float32)
    with backend.numerics(numerics):
        model = backend.build(spec, attention=attention)
        model = backend.load(model, vitcmp.init_weights(spec), numerics=numerics)
        return backend.outputs(model, images)["logits"].astype(np.float64)


def check_error(logits, exact, numerics):
    """Not nearer than the logits' own rounding, and no further than the roundings of all layers, added like noise.

    In 16 bits some 20 maps are rounded, and as many kernels: sqrt(40), and 16 for a safe bound. In float32 each of them
    has the rounding of its sums too, up to 24 of a map's own.
    """
    error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    rounding = 2.0 ** -BITS[numerics] / 3**0.5
    assert rounding / 2 < error < rounding * (16 if BITS[numerics] < 24 else 24 * 40**0.5)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("numerics", ["float32", "bfloat16", "bfloat16_mixed", "float16"])
def test_a_model_is_as_far_from_float64_as_its_numerics_say(backend, exact_logits, family, numerics):
    check_error(run_model(backend, family, numerics), exact_logits[family], numerics)


@pytest.mark.parametrize("numerics", ["float32", "bfloat16", "float16"])
def test_chunked_attention_is_as_far_from_float64(backend, exact_logits, numerics):
    logits = run_model(backend, "vitdet", numerics, attention="chunked")
    check_error(logits, exact_logits["vitdet"], numerics)
