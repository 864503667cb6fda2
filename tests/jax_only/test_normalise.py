"""LayerNorm's gradient: that of its formula, and no larger a program for a late block than for an early one."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp

import vitcmp
from jax_models.layers import normalise
from vitcmp.backend import load_backend

SIZE = "num_classes=10,image_size=32x48"
TINY = f"width=32,num_heads=2,mlp_dim=64,{SIZE}"


def plain(x, eps):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_the_gradient_is_that_of_the_formula(eps):
    """In float64; the bound is rounding's, a few hundred times 2e-16."""
    with jax.enable_x64(True):
        x, weights = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5, 7)))
        x = 3 * x + 1
        ours, theirs = (
            jax.value_and_grad(lambda x, f=f: (jnp.tanh(f(x, eps)) * weights).sum())(x) for f in (normalise, plain)
        )
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-13)
        np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=1e-13 * np.abs(theirs[1]).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [f"vit_ti16:{TINY},depth=", f"vitdet_ti16:{TINY},window_size=2,global_blocks=1,depth="]
)
def test_a_block_more_is_as_much_more_of_a_train_step_however_deep_the_model(model):
    """On a CPU; with JAX's own gradient blocks 6 to 9 were 1.2 to 1.3 times as much program as those before."""
    backend, labels = load_backend("jax", platform="cpu"), np.arange(2)
    lines = []
    for depth in (3, 6, 9):
        spec = vitcmp.get_spec(f"{model}{depth}")
        images = np.zeros((2, *spec.image_size, 3), np.float32)
        with backend.numerics("float32"):
            built = backend.load(backend.build(spec), vitcmp.init_weights(spec), numerics="float32")
            step = backend.compile(built, images, labels, mode="train", compile="jit")
        lines.append(step.compiled.as_text().count("\n"))
    assert lines[2] - lines[1] == pytest.approx(lines[1] - lines[0], rel=0.02)
