"""Fifty training steps in JAX and in torch: losses, gradient norms, final weights and moments; states go across."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("torch")

import vitcmp
from vitcmp.backend import load_backend
from vitcmp.params import Weights, expected_params
from vitcmp.recipe import Recipe, State, StepStats, param_names

STEPS, HALF = 50, 25
VIT = "width=24,depth=1,num_heads=3,mlp_dim=40,patch_size=8,num_classes=10,image_size=27x35"  # a grid of 3x4
MODELS = {  # tiny, because XLA compiles each for seconds
    "vit": f"vit_ti16:{VIT}",
    "vitdet": f"vitdet_ti16:{VIT},window_size=2,global_blocks=0",
    "resnet": "resnet18:depths=1,width=8,num_classes=10,image_size=33x46",
    "convnext": "convnext_atto:depths=1,widths=8,kernel_size=3,num_classes=10,image_size=33x46",
    "bit": "bit_r50x1:depths=1,num_classes=10,image_size=33x46",
}
# Everything at once: two questions an image, two micro-batches a step, and a clip that some steps exceed.
ADAMW = Recipe(
    total_steps=STEPS,
    learning_rate=1e-3,
    weight_decay=0.05,
    warmup_steps=5,
    clip_norm=2.5,
    label_smoothing=0.1,
    accumulate=2,
    num_questions=2,
    numerics="float64",
)
SGD = dataclasses.replace(ADAMW, optimizer="sgd", learning_rate=1e-2, clip_norm=2.0)
CASES = {"vit": ADAMW, "vitdet": SGD, "resnet": ADAMW, "convnext": ADAMW, "bit": SGD}
PERTURBATION = 1e-8  # of every weight, in absolute size


@dataclasses.dataclass
class Run:
    """What one training run leaves behind; its trainer can go on, or back."""

    stats: list[StepStats]
    weights: Weights
    half: State
    state: State
    trainer: Any


def draw_batch(model: str, step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([7, step])
    size = vitcmp.get_spec(MODELS[model]).image_size
    return rng.integers(0, 256, (4, *size, 3), dtype=np.uint8), rng.integers(0, 5, (4, 2))


def train(trainer: Any, model: str, first: int, last: int) -> None:
    for step in range(first, last):
        trainer.train(*draw_batch(model, step))


@functools.cache
def run(backend: str, model: str, *, perturbation: float = 0.0) -> Run:
    spec, engine, recipe = vitcmp.get_spec(MODELS[model]), load_backend(backend, platform="cpu"), CASES[model]
    rng = np.random.default_rng(3)
    weights = {
        name: array + perturbation * rng.choice([-1.0, 1.0], array.shape)
        for name, array in vitcmp.init_weights(spec, seed=5).items()
    }
    with engine.numerics(recipe.numerics):
        trainer = engine.trainer(spec, weights, recipe)
        train(trainer, model, 0, HALF)
        half = trainer.state()
        train(trainer, model, HALF, STEPS)
        return Run(trainer.drain(), trainer.weights(), half, trainer.state(), trainer)


def go_on(backend: str, model: str, state: State) -> Run:
    """Loads the state of half the steps into a trainer that has done all of them, and trains the rest."""
    engine, trainer = load_backend(backend, platform="cpu"), run(backend, model).trainer
    trainer.engine = engine
    with engine.numerics("float64"):
        trainer.load_state(state)
        train(trainer, model, HALF, STEPS)
        return Run(trainer.drain(), trainer.weights(), state, trainer.state(), trainer)


def growth(model: str) -> tuple[float, float]:
    """Returns how many times larger an error in the weights is after all steps: in the weights and in the loss."""
    plain, perturbed = run("torch", model), run("torch", model, perturbation=PERTURBATION)
    moved = max(np.abs(perturbed.weights[name] - plain.weights[name]).max() for name in plain.weights)
    losses = max(abs(a.loss - b.loss) for a, b in zip(perturbed.stats, plain.stats, strict=True))
    return moved / PERTURBATION, losses / PERTURBATION


def stored_error(model: str) -> float:
    """Bounds what rounding adds to a weight in all steps, before it grows: three times half an ulp a step."""
    largest = max(np.abs(array).max() for array in run("torch", model).weights.values())
    return STEPS * 3 * 2.0**-53 * largest


def weight_bound(model: str, name: str) -> np.ndarray | float:
    """Bounds how far two right runs may be apart in a leaf after all steps, in float64.

    Each step rounds each weight (`stored_error`), and moves it by the rate times what the optimizer makes of the
    gradient. A gradient's error is taken as one ulp of the clipped norm of all gradients: its terms are smaller, of
    either sign, and round at random. SGD passes it on, 1 / (1 - momentum) times in all. AdamW divides it by sqrt(v) +
    eps: where a gradient is zero but for rounding (a key's bias, which no softmax feels), by eps = 1e-8, which makes
    3e-9 of it in 50 steps; such weights move no output. All of that grows by what later steps make of an error in the
    weights, which is measured (`growth`): 2 to 34 in these runs, the same for perturbations of 1e-12 and 1e-8, so that
    it is a slope, and the errors of all steps are no more than their sum times it.
    """
    recipe = CASES[model]
    assert recipe.clip_norm is not None
    gradient_error = 2.0**-52 * recipe.clip_norm
    rates = sum(recipe.learning_rate_at(step) for step in range(STEPS))
    slope: np.ndarray | float = 1 / (1 - recipe.momentum)
    if recipe.optimizer == "adamw" and name in param_names(vitcmp.get_spec(MODELS[model])):
        second = run("torch", model).state[f"moment2/{name}"] / (1 - recipe.betas[1] ** STEPS)
        slope = 1 / (np.sqrt(second) + recipe.eps)
    return growth(model)[0] * (stored_error(model) + rates * gradient_error * slope)


def loss_bound(model: str) -> float:
    """The error of the weights as the loss shows it, and 64 roundings of the forward pass and of the softmax."""
    return growth(model)[1] * stored_error(model) + 64 * 2.0**-53 * max(x.loss for x in run("torch", model).stats)


def assert_equal_within_rounding(ours: Run, theirs: Run, model: str) -> None:
    bound = loss_bound(model)
    assert bound < 1e-11
    skipped = STEPS - len(ours.stats)
    for a, b in zip(ours.stats, theirs.stats[skipped:], strict=True):
        assert a.step == b.step
        assert abs(a.loss - b.loss) <= bound
        # a norm of gradients is as exact as they are: its slope in the weights is taken as four times the loss's
        assert abs(a.gradient_norm - b.gradient_norm) <= 4 * bound * max(1, b.gradient_norm)
    assert ours.weights.keys() == theirs.weights.keys() == expected_params(MODELS[model]).keys()
    for name, weight in theirs.weights.items():
        limit = weight_bound(model, name)
        assert np.max(limit) < 1e-8 and np.median(limit) < 1e-11, name
        assert (np.abs(ours.weights[name] - weight) <= limit).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("model", CASES)
def test_fifty_steps_agree(model):
    ours, theirs = run("jax", model), run("torch", model)
    assert 1 < growth(model)[0] < 50
    assert_equal_within_rounding(ours, theirs, model)
    before = vitcmp.init_weights(MODELS[model], seed=5)
    assert all(np.abs(theirs.weights[name] - before[name]).max() > 1e-4 for name in before if "rel_pos" not in name)
    recipe = CASES[model]
    assert 3 <= sum(x.gradient_norm > recipe.clip_norm for x in theirs.stats) <= STEPS - 3
    assert ours.state.keys() == theirs.state.keys() and ours.state["step"] == theirs.state["step"] == STEPS
    for name, moment in theirs.state.items():  # a moment that is zero but for rounding is held against 1e-3
        assert np.abs(ours.state[name] - moment).max() <= 1e-9 * max(np.abs(moment).max(), 1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", "resnet", "vitdet"])
@pytest.mark.parametrize(("saved", "loaded"), [("jax", "torch"), ("torch", "jax")])
def test_a_state_goes_on_in_the_other_framework(model, saved, loaded):
    whole = run(saved, model)
    assert_equal_within_rounding(go_on(loaded, model, whole.half), whole, model)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", "resnet", "vitdet"])
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_state_goes_on_bit_exactly_in_its_own(model, backend):
    whole, rest = run(backend, model), go_on(backend, model, run(backend, model).half)
    assert rest.stats == whole.stats[HALF:]
    assert all(np.array_equal(rest.state[name], array) for name, array in whole.state.items())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", "resnet"])
def test_predictions_agree_and_read_the_running_statistics(model):
    images = draw_batch(model, 99)[0][:3]
    logits = []
    for backend in ("jax", "torch"):
        engine, trainer = load_backend(backend, platform="cpu"), run(backend, model).trainer
        trainer.engine = engine
        with engine.numerics("float64"):
            trainer.load_state(run("torch", model).state)
            logits.append(trainer.predict(images))
    weights = run("torch", model).weights
    plain = vitcmp.forward("torch", MODELS[model], weights, images / 127.5 - 1, numerics="float64")["logits"]
    assert logits[0].shape == (3, 2, 5) and logits[0].dtype == np.float64
    for ours in logits:
        np.testing.assert_allclose(ours.reshape(3, 10), plain, rtol=0, atol=1e-12)


FAULTS = [
    {"learning_rate": 1.001e-3},
    {"betas": (0.9, 0.998)},
    {"eps": 2e-8},
    {"weight_decay": 0.051},
    {"clip_norm": 2.501},
    {"label_smoothing": 0.101},
    {"warmup_steps": 6},
    {"accumulate": 1},
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_in_the_recipe_is_far_beyond_the_bound(fault):
    """ResNet, whose BatchNorm sees the micro-batches; in the first eight steps already."""
    model, engine = "resnet", load_backend("torch", platform="cpu")
    spec = vitcmp.get_spec(MODELS[model])
    with engine.numerics("float64"):
        trainer = engine.trainer(spec, vitcmp.init_weights(spec, seed=5), dataclasses.replace(CASES[model], **fault))
        train(trainer, model, 0, 8)
        losses = [x.loss for x in trainer.drain()]
    right = [x.loss for x in run("torch", model).stats[:8]]
    assert max(abs(a - b) for a, b in zip(losses, right, strict=True)) > 1e-9 > 1e3 * loss_bound(model)
