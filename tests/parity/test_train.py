"""One training step in JAX and in torch: loss, gradients, and weights after one SGD and one AdamW update."""

import functools
import math

import numpy as np
import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

import jax.numpy as jnp
from flax import nnx

import jax_models.layers
import jax_models.params
import jax_models.train
import torch_models.params
import torch_models.train
import vitcmp
from tests.parity.helpers import Arrays, draw_images, relative_error
from vitcmp.backend import load_backend
from vitcmp.params import expected_params

BOUND = 1e-9  # float64
VIT = "width=24,depth=2,num_heads=3,mlp_dim=40,patch_size=16,num_classes=10,image_size=75x106"  # a grid of 4x6
MODELS = {
    "vit": f"vit_ti16:{VIT}",
    "vit-map": f"vit_ti16:{VIT},pool=map,gelu=tanh,rep_size=20",
    "vitdet": f"vitdet_ti16:{VIT},window_size=3,global_blocks=1",
    "vitdet-no-rel-pos": f"vitdet_ti16:{VIT},window_size=4,global_blocks=0,rel_pos=off",
    "resnet-basic": "resnet18:depths=1x1,width=8,num_classes=10,image_size=75x106",
    "resnet-bottleneck": "resnet50:depths=1x2,width=8,num_classes=10,image_size=75x106",
    "bit": "bit_r50x1:depths=1,num_classes=10,image_size=33x46",
    "convnext": "convnext_atto:depths=1x1,widths=8x12,num_classes=10,image_size=75x106",
}
LEARNING_RATE, WEIGHT_DECAY, ADAM_EPS = 1e-3, 1e-4, 1e-8  # the defaults of make_optimizer
STATISTICS = ("mean", "var")


def draw_batch(model: str) -> tuple[np.ndarray, np.ndarray]:
    return draw_images(vitcmp.get_spec(model).image_size, batch_size=3), np.array([1, 9, 1])


def is_param(model: str, name: str) -> bool:
    return expected_params(model)[name].kind not in STATISTICS


@functools.cache
def jax_gradients(model: str, numerics: str) -> tuple[float, Arrays]:
    """Returns the loss, the gradients by canonical name, and the statistics that the pass keeps."""
    spec, engine = vitcmp.get_spec(model), load_backend("jax", platform="cpu")
    images, labels = draw_batch(model)
    with engine.numerics(numerics):
        net = engine.load(engine.build(spec), vitcmp.init_weights(spec, seed=5), numerics=numerics)
        net.train()
        graph, params, statistics = nnx.split(net, nnx.Param, ...)

        def loss(params, images):
            net = nnx.merge(graph, params, statistics, copy=True)
            return jax_models.train.loss_fn(net, images, jnp.asarray(labels)), nnx.state(net, nnx.Not(nnx.Param))

        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, statistics), gradients = run(params, jnp.asarray(images, net.compute_dtype))
        nnx.update(net, gradients, statistics)
        return float(value), engine.export(net)


@functools.cache
def torch_gradients(model: str, numerics: str) -> tuple[float, Arrays]:
    spec, engine = vitcmp.get_spec(model), load_backend("torch", platform="cpu")
    images, labels = draw_batch(model)
    with engine.numerics(numerics):
        net = engine.load(engine.build(spec), vitcmp.init_weights(spec, seed=5), numerics=numerics).train()
        nchw = torch.from_numpy(images.transpose(0, 3, 1, 2)).to(net.compute_dtype)
        loss = torch_models.train.loss_fn(net, nchw, torch.from_numpy(labels))
        loss.backward()
        for param in net.parameters():
            param.data = param.grad
        return loss.item(), engine.export(net)


def jax_step(model: str, optimizer: str) -> tuple[float, Arrays]:
    """Returns the loss, and the weights after one step, in float64."""
    spec, engine = vitcmp.get_spec(model), load_backend("jax", platform="cpu")
    images, labels = draw_batch(model)
    with engine.numerics("float64"):
        net = engine.load(engine.build(spec), vitcmp.init_weights(spec, seed=5), numerics="float64")
        step, state = jax_models.train.make_train_step(net, optimizer=optimizer)
        (params, statistics, _), loss = jax.jit(step)(state, jnp.asarray(images), jnp.asarray(labels))
        nnx.update(net, params, statistics)
        return float(loss), engine.export(net)


def torch_step(model: str, optimizer: str) -> tuple[float, Arrays]:
    spec, engine = vitcmp.get_spec(model), load_backend("torch", platform="cpu")
    images, labels = draw_batch(model)
    with engine.numerics("float64"):
        net = engine.load(engine.build(spec), vitcmp.init_weights(spec, seed=5), numerics="float64")
        step = torch_models.train.make_train_step(net, optimizer=optimizer)
        loss = step(torch.from_numpy(images.transpose(0, 3, 1, 2)), torch.from_numpy(labels))
        return loss.item(), engine.export(net)


def errors(ours: Arrays, theirs: Arrays) -> dict[str, float]:
    """Returns each array's error; a gradient that is zero but for rounding is measured against the greatest."""
    largest = max(np.abs(array).max() for array in theirs.values())
    return {
        name: np.abs(ours[name] - array).max() / max(np.abs(array).max(), 1e-3 * largest)
        for name, array in theirs.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_loss_gradients_and_statistics_agree(name):
    jax_loss, jax_arrays = jax_gradients(MODELS[name], "float64")
    torch_loss, torch_arrays = torch_gradients(MODELS[name], "float64")
    assert math.isclose(jax_loss, torch_loss, rel_tol=BOUND)
    assert jax_arrays.keys() == torch_arrays.keys() == vitcmp.expected_shapes(MODELS[name]).keys()
    assert all(np.abs(array).max() > 0 for array in torch_arrays.values())
    worst = errors(jax_arrays, torch_arrays)
    assert max(worst.values()) < BOUND, worst


@pytest.mark.parametrize("name", MODELS)
def test_one_sgd_step_agrees_and_is_minus_the_gradient(name):
    jax_loss, jax_weights = jax_step(MODELS[name], "sgd")
    torch_loss, torch_weights = torch_step(MODELS[name], "sgd")
    assert math.isclose(jax_loss, torch_loss, rel_tol=BOUND)
    before, (_, gradients) = vitcmp.init_weights(MODELS[name], seed=5), torch_gradients(MODELS[name], "float64")
    for leaf, weight in torch_weights.items():
        assert relative_error(jax_weights[leaf], weight) < BOUND, leaf
        if is_param(MODELS[name], leaf):
            moved = weight - before[leaf].astype(np.float64)
            # the difference of two weights keeps their rounding: 2^-52 of a weight, in a step 1e-3 of a gradient
            assert np.allclose(moved, -LEARNING_RATE * gradients[leaf], rtol=BOUND, atol=1e-15), leaf
        else:
            assert relative_error(weight, gradients[leaf]) < BOUND, leaf


def adamw_bound(gradient: np.ndarray, difference: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Bounds, for each weight, how far two first steps of AdamW may be apart whose gradients differ by `difference`.

    The first step moves by lr * g / (|g| + eps), whose slope lr * eps / (|g| + eps)^2 is lr / eps = 1e5 at g = 0 and
    1e-11 at |g| = 1: rounding in a gradient that should be zero (the key's bias) is magnified, any other is forgotten.
    Between two gradients the slope is greatest at the one nearest to zero. To that add the rounding of the step itself:
    a dozen operations on lr, a few on the weight.
    """
    difference = 2 * np.abs(difference).max()  # the step is compiled anew and may round anew
    nearest = np.maximum(np.abs(gradient) - difference, 0)
    rounding = 2.0**-52 * (16 * LEARNING_RATE + 4 * np.abs(weight))
    return LEARNING_RATE * ADAM_EPS / (nearest + ADAM_EPS) ** 2 * difference + rounding


@pytest.mark.parametrize("name", MODELS)
def test_one_adamw_step_agrees(name):
    (jax_loss, jax_weights), (torch_loss, torch_weights) = (
        run(MODELS[name], "adamw") for run in (jax_step, torch_step)
    )
    assert math.isclose(jax_loss, torch_loss, rel_tol=BOUND)
    before = vitcmp.init_weights(MODELS[name], seed=5)
    _, jax_grads = jax_gradients(MODELS[name], "float64")
    _, torch_grads = torch_gradients(MODELS[name], "float64")
    for leaf, weight in torch_weights.items():
        if not is_param(MODELS[name], leaf):
            assert relative_error(jax_weights[leaf], weight) < BOUND, leaf
            continue
        bound = adamw_bound(torch_grads[leaf], jax_grads[leaf] - torch_grads[leaf], weight)
        assert (np.abs(jax_weights[leaf] - weight) <= bound).all(), leaf
        # the formula itself, decay included: p - lr * (g / (|g| + eps) + decay * p)
        old, gradient = before[leaf].astype(np.float64), torch_grads[leaf]
        expected = old - LEARNING_RATE * (gradient / (np.abs(gradient) + ADAM_EPS) + WEIGHT_DECAY * old)
        assert np.allclose(weight, expected, rtol=0, atol=1e-12), leaf


def float32_bound(model: str) -> float:
    """Bounds float32's relative error: 2^-24 x (2 x layers x sqrt(fan_in / 2) + sqrt(positions / 2)).

    A sum of n terms of either sign rounds n partial sums that grow as sqrt(k): the errors' squares add up to n^2 / 2 of
    (u x a term)^2, u = 2^-24, which is sqrt(n / 2) x u of a result of sqrt(n) terms; kernels that sum in blocks stay
    below. An error keeps its relative size through the following layers (their gains are about one), so at worst
    `layers` of them add up; twice, because a gradient comes through the layers forward and back. Last, a weight's
    gradient is a sum over every position of the batch.
    """
    leaves = expected_params(model)
    layers = len({name.rpartition("/")[0] for name in leaves})
    fan_in = max(math.prod(leaf.shape[:-1]) for leaf in leaves.values() if leaf.kind in ("linear", "conv"))
    positions = 3 * math.prod(vitcmp.get_spec(model).image_size) / 4  # after the stem, a stride of 2 at least
    return 2.0**-24 * (2 * layers * math.sqrt(fan_in / 2) + math.sqrt(positions / 2))


@pytest.mark.parametrize("run", [jax_gradients, torch_gradients])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "bit"])
def test_float32_stays_within_its_rounding(name, run):
    """Left out: ResNet's gradients, which jump where rounding flips a ReLU or which of two values is the maximum.

    So do BiT's, and it has no statistics beside them.
    """
    loss, arrays = run(MODELS[name], "float32")
    exact_loss, exact = torch_gradients(MODELS[name], "float64")
    bound = float32_bound(MODELS[name])
    assert 1e-6 < bound < 1e-4
    assert math.isclose(loss, exact_loss, rel_tol=bound)
    names = [leaf for leaf in exact if "resnet" not in name or not is_param(MODELS[name], leaf)]
    worst = errors({leaf: arrays[leaf] for leaf in names}, {leaf: exact[leaf] for leaf in names})
    assert max(worst.values()) < bound, worst


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("vit", {"gelu": "tanh"}),
        ("vitdet", {"norm_eps": 1e-5}),
        ("resnet-bottleneck", {"norm_eps": 1e-6}),
        ("convnext", {"norm_eps": 1e-5}),
    ],
)
def test_a_fault_moves_the_gradients(name, fault):
    faulty = MODELS[name] + "".join(f",{field}={value}" for field, value in fault.items())
    _, right = torch_gradients(MODELS[name], "float64")
    _, wrong = jax_gradients(faulty, "float64")
    assert max(errors(wrong, right).values()) > 1e3 * BOUND
