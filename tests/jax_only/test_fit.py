"""JAX's trainer against optax' own full optimizers; numerics, several devices, and published first weights."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp
import optax
from flax import nnx, traverse_util

import vitcmp
from jax_models.foreign import _isolated
from vitcmp.backend import load_backend
from vitcmp.big_vision import from_big_vision
from vitcmp.initial import fit_patch_size, initial_weights
from vitcmp.parity import tolerance
from vitcmp.recipe import Diverged, Recipe, Trainer

ROOT = Path(__file__).parents[2]
SPEC = vitcmp.get_spec("convnext_atto:depths=1,widths=8,kernel_size=3,num_classes=10,image_size=33x46")
CNN = vitcmp.get_spec("resnet18:depths=1,width=8,num_classes=10,image_size=33x46")
FIELDS = {"learning_rate": 3e-3, "weight_decay": 0.1, "warmup_steps": 3, "label_smoothing": 0.2, "numerics": "float64"}


@pytest.fixture(scope="module", autouse=True)
def unoptimised():
    """Has XLA compile in half the time; tests/parity trains what it makes of everything."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def engine():
    return load_backend("jax", platform="cpu")


def draw_batch(step: int, *, spec=SPEC, num_images: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([5, step])
    return rng.integers(0, 256, (num_images, *spec.image_size, 3), np.uint8), rng.integers(0, 10, (num_images, 1))


def train(trainer: Trainer, first: int, last: int) -> list[float]:
    for step in range(first, last):
        trainer.train(*draw_batch(step, spec=trainer.spec))
    return [x.loss for x in trainer.drain()]


def test_the_learning_rate_is_optax():
    recipe = Recipe(total_steps=50, warmup_steps=7, learning_rate=0.3)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.3, warmup_steps=7, decay_steps=50)
    with jax.enable_x64(True):
        theirs = [float(schedule(step)) for step in range(51)]
    np.testing.assert_allclose([recipe.learning_rate_at(step) for step in range(51)], theirs, rtol=0, atol=1e-15)


def full_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Clip, rule, masked decay and schedule, all of optax."""
    rounded = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, warmup_steps=recipe.warmup_steps, decay_steps=recipe.total_steps
    )

    def schedule(count: jax.Array) -> jax.Array:
        return rounded(count.astype(jnp.float64))  # of an int32, optax computes it in float32

    def is_kernel(params: nnx.State) -> nnx.State:
        return jax.tree.map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)

    b1, b2 = recipe.betas
    rule = optax.adamw(schedule, b1, b2, eps=recipe.eps, weight_decay=recipe.weight_decay, mask=is_kernel)
    return optax.chain(optax.clip_by_global_norm(recipe.clip_norm), rule)


@pytest.mark.slow
def test_ten_steps_equal_optax_own_adamw(engine):
    recipe = Recipe(total_steps=12, clip_norm=3.0, betas=(0.8, 0.99), **FIELDS)
    with engine.numerics("float64"):
        model = engine.load(engine.build(SPEC), vitcmp.init_weights(SPEC, 5), numerics="float64")
        graph, params = nnx.split(model)
        rule = full_optimizer(recipe)
        moments = rule.init(params)

        @jax.jit
        def step(params, moments, images, labels):
            def loss(params):
                log_p = jax.nn.log_softmax(nnx.merge(graph, params)(images))
                return -(0.8 * log_p[jnp.arange(4), labels] + 0.2 * log_p.mean(axis=1)).mean()

            value, gradients = jax.value_and_grad(loss)(params)
            updates, moments = rule.update(gradients, moments, params)
            return optax.apply_updates(params, updates), moments, value, optax.tree.norm(gradients)

        figures = []
        for i in range(10):
            images, labels = draw_batch(i)
            params, moments, *figure = step(params, moments, images / 127.5 - 1, labels[:, 0])
            figures.append([float(x) for x in figure])
        nnx.update(model, params)
        weights = engine.export(model)
        trainer = engine.trainer(SPEC, vitcmp.init_weights(SPEC, 5), recipe)
        for i in range(10):
            trainer.train(*draw_batch(i))
        stats, ours = trainer.drain(), trainer.weights()
    losses, norms = zip(*figures, strict=True)
    assert min(norms) < recipe.clip_norm < max(norms)
    np.testing.assert_allclose([x.loss for x in stats], losses, rtol=1e-12)
    np.testing.assert_allclose([x.gradient_norm for x in stats], norms, rtol=1e-11)
    assert [x.step for x in stats] == list(range(10)) and trainer.step == 10 and trainer.drain() == []
    for name, array in ours.items():
        np.testing.assert_allclose(array, weights[name], rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.slow
def test_mixed_precision_keeps_float32_weights_and_follows_the_curve(engine):
    """The loss moves no more than twice the largest logit's error, which `tolerance` bounds, and each step is taken to
    add as much by the error that it leaves in the weights."""
    losses, largest = {}, {}
    for numerics in ("float32", "bfloat16_mixed"):
        with engine.numerics(numerics):
            recipe = Recipe(total_steps=6, optimizer="sgd", learning_rate=1e-2, numerics=numerics)
            trainer = engine.trainer(CNN, vitcmp.init_weights(CNN, 5), recipe)
            losses[numerics] = train(trainer, 0, 6)
            assert {str(x.dtype) for x in jax.tree.leaves(trainer.values)} == {"float32"}
            largest[numerics] = np.abs(trainer.predict(draw_batch(0, spec=CNN)[0])).max()
    apart = np.abs(np.subtract(*losses.values()))
    bound = 2 * (1 + np.arange(6)) * tolerance("bfloat16_mixed", CNN) * max(largest.values())
    assert (apart <= bound).all() and apart.max() > 0, (apart, bound)
    with engine.numerics("float64"), pytest.raises(ValueError, match="open is float64"):
        trainer.predict(draw_batch(0, spec=CNN)[0])
    with pytest.raises(ValueError, match="open is None"):
        trainer.train(*draw_batch(0, spec=CNN))


@pytest.mark.slow
def test_a_trainer_owns_its_arrays_counts_them_and_finds_where_it_diverges(engine):
    with engine.numerics("float32"):
        trainer = engine.trainer(CNN, vitcmp.init_weights(CNN, 5), Recipe(total_steps=9))
        images, labels = draw_batch(0, spec=CNN)
        trainer.train(images, labels)
        images[:] = 0  # the step may not have begun: it has a copy
        loss, state, weights = trainer.drain()[0].loss, trainer.state(), trainer.weights()
        kept = {name: array.copy() for name, array in (state | weights).items()}
        rest = train(trainer, 1, 9)
        assert all(np.array_equal(array, kept[name]) for name, array in (state | weights).items())
        with pytest.raises(ValueError, match="total_steps=9"):
            trainer.train(*draw_batch(0, spec=CNN))
        trainer.load_state({**state, "params/fc/kernel": state["params/fc/kernel"] * np.float32(1e38)})
        with pytest.raises(Diverged, match="step 1: ") as error:
            train(trainer, 1, 5)
        assert error.value.step == 1
        trainer.load_state(state)
        assert train(trainer, 1, 9) == rest  # a divergence leaves nothing behind
        first = engine.trainer(CNN, vitcmp.init_weights(CNN, 5), Recipe(total_steps=9)).weights()
        assert all(np.array_equal(array, first[name]) for name, array in vitcmp.init_weights(CNN, 5).items())
    memory, num_params = trainer.memory(), vitcmp.params.count_params(CNN)
    statistics = sum(array.size for name, array in weights.items() if name.endswith(("/mean", "/var")))
    assert memory["parameters_bytes"] == 4 * (num_params + statistics) and loss > 0
    assert memory["optimizer_bytes"] == 8 * num_params + 4  # and the count of steps
    assert memory["activation_peak_bytes"] > 4 * num_params and memory["process_peak_bytes"] > 2**20


@pytest.mark.parametrize(
    ("spec", "options", "fields", "message"),
    [
        (SPEC, {"num_devices": 99}, {}, "num_devices=99 must be 1 to the 1 that jax finds"),
        (SPEC, {"attention": "math"}, {}, "unknown attention 'math'"),
        (SPEC, {"compile": "eager"}, {}, "unknown compile 'eager'"),
        (SPEC, {}, {"num_questions": 3}, "num_classes=10 must be a multiple of num_questions=3"),
        (vitcmp.get_spec("big_vision:vit/Ti"), {}, {}, "another library"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_said_before_anything_is_built(engine, spec, options, fields, message):
    recipe = Recipe(total_steps=1, **fields)
    with engine.numerics("float32"), pytest.raises(ValueError, match=message):
        engine.trainer(spec, initial_weights(SPEC), recipe, **options)


TWO_DEVICES = """
import json
import numpy as np, vitcmp
from tests.jax_only.test_fit import CNN, draw_batch
from vitcmp.backend import load_backend
from vitcmp.recipe import Recipe

engine, runs = load_backend("jax", platform="cpu"), []
recipe = Recipe(total_steps=9, accumulate=2, clip_norm=1.0, numerics="float64", learning_rate=1e-2, optimizer="sgd")
with engine.numerics("float64"):
    for num_devices in (1, 2):
        trainer = engine.trainer(CNN, vitcmp.init_weights(CNN, 5), recipe, num_devices=num_devices)
        for step in range(4):
            trainer.train(*draw_batch(step, spec=CNN))
            if step == 1:
                trainer.load_state(trainer.state())
        logits = trainer.predict(draw_batch(0, spec=CNN)[0][:3])
        figures = [[x.loss, x.gradient_norm] for x in trainer.drain()]
        runs.append((figures, logits.tolist(), {name: x.tolist() for name, x in trainer.weights().items()}))
    shares = {len(x.sharding.device_set) for x in trainer.values[0].values()}
    try:
        trainer.train(*(array[:3] for array in draw_batch(0, spec=CNN)))
    except ValueError as error:
        message = str(error)
print(json.dumps([runs, sorted(shares), message]))
"""


@pytest.mark.slow
def test_two_devices_train_as_one_batch_norm_included():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    child = subprocess.run([sys.executable, "-W", "error", "-c", TWO_DEVICES], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    (one, two), shares, message = json.loads(child.stdout)
    assert shares == [2] and "num_devices=2 x accumulate=2; allowed: a multiple of 4" in message
    assert np.shape(two[1]) == (3, 1, 10)
    for a, b in zip(one[:2], two[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)
    assert any(name.endswith("/mean") for name in one[2])
    for name, array in one[2].items():
        np.testing.assert_allclose(two[2][name], array, rtol=0, atol=1e-12, err_msg=name)


def test_first_weights_are_drawn_as_big_vision_draws_them():
    """By each array's spread and extremes: n values tell a deviation to 1 / sqrt(2n), of which 5 are allowed."""
    if not os.environ.get("BIG_VISION_PATH"):
        pytest.skip("BIG_VISION_PATH names no checkout of big_vision")
    spec = vitcmp.get_spec("vit_ti8:width=96,depth=1,num_heads=3,mlp_dim=192,num_classes=10,image_size=64,pool=map")
    sizes = {"width": 96, "depth": 1, "num_heads": 3, "mlp_dim": 192, "patch_size": (8, 8), "pool_type": "map"}
    with _isolated(os.environ["BIG_VISION_PATH"]):
        model = importlib.import_module("big_vision.models.vit").Model(10, **sizes)
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    flat = {"/".join(path): np.asarray(x) for path, x in traverse_util.flatten_dict(params).items()}
    theirs, ours = from_big_vision(flat, spec), initial_weights(spec, 0)
    for name, array in theirs.items():
        n, spread = array.size, np.sqrt((array**2).mean())
        assert abs(np.sqrt((ours[name] ** 2).mean()) - spread) <= 5 * spread / np.sqrt(2 * n), name
        if n > 1000 and name != "pos_embed":  # all but that are cut off somewhere
            assert np.abs(ours[name]).max() == pytest.approx(np.abs(array).max(), rel=0.02), name


def test_the_patch_embedding_is_resampled_as_big_vision_does():
    """Its own function, by source: the file wants TensorFlow for one call, which jax.image.resize equals."""
    if not os.environ.get("BIG_VISION_PATH"):
        pytest.skip("BIG_VISION_PATH names no checkout of big_vision")
    path = Path(os.environ["BIG_VISION_PATH"], "big_vision/models/proj/flexi/vit.py")
    functions = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    theirs = {"np": np, "jax": jax, "logging": type("logging", (), {"info": print}), "tf": find_tensorflow()}
    exec(compile(ast.Module([functions["resample_patchemb"]], []), path, "exec"), theirs)
    kernel = np.random.default_rng(0).standard_normal((8, 8, 3, 48))
    with jax.enable_x64(True):
        for new in (4, 6, 13, 16):
            expected = np.asarray(theirs["resample_patchemb"](kernel, (new, new)))
            spec = f"vit_ti{new}:width=48,num_heads=3,mlp_dim=96,depth=1"
            ours = fit_patch_size({"patch_embed/proj/kernel": kernel}, spec)["patch_embed/proj/kernel"]
            # TensorFlow resizes in float32, and the pseudo-inverse magnifies that
            np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


def find_tensorflow():
    try:
        import tensorflow
    except ModuleNotFoundError:

        class Tensor(np.ndarray):
            def numpy(self):
                return np.asarray(self)

        class Image:
            @staticmethod
            def resize(image, size, method):
                resized = jax.image.resize(image, (1, *size, 1), method, antialias=False)
                return np.asarray(resized).view(Tensor)

        return type("tensorflow", (), {"constant": staticmethod(jnp.asarray), "image": Image})
    return tensorflow
