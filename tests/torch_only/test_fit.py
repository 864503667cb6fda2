"""torch's trainer against plain numpy updates; numerics, compiling, and the processes of data parallelism."""

import math
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import vitcmp
from vitcmp.backend import Unsupported, load_backend
from vitcmp.initial import fit_patch_size, initial_weights
from vitcmp.parity import tolerance
from vitcmp.recipe import Diverged, Recipe, Trainer

SPEC = vitcmp.get_spec("vit_ti8:width=24,depth=1,num_heads=3,mlp_dim=40,num_classes=10,image_size=27x35")
CNN = vitcmp.get_spec("resnet18:depths=1,width=8,num_classes=10,image_size=33x46")
FIELDS = {"learning_rate": 3e-3, "weight_decay": 0.1, "warmup_steps": 3, "label_smoothing": 0.2, "numerics": "float64"}


@pytest.fixture(scope="module")
def engine():
    return load_backend("torch", platform="cpu")


def draw_batch(step: int, *, spec=SPEC, num_images: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([5, step])
    return rng.integers(0, 256, (num_images, *spec.image_size, 3), np.uint8), rng.integers(0, 10, (num_images, 1))


def train(trainer: Trainer, first: int, last: int) -> list[float]:
    for step in range(first, last):
        trainer.train(*draw_batch(step, spec=trainer.spec))
    return [x.loss for x in trainer.drain()]


def reference(engine, recipe: Recipe, num_steps: int) -> tuple[list[float], vitcmp.params.Weights, list[float]]:
    """The losses, weights and gradient norms of training as the papers write it, in numpy; gradients by torch."""
    weights = {name: array.astype(np.float64) for name, array in vitcmp.init_weights(SPEC, 5).items()}
    first, second = ({name: np.zeros_like(array) for name, array in weights.items()} for _ in range(2))
    losses, norms = [], []
    for step in range(num_steps):
        loss, gradients = loss_and_gradients(engine, weights, *draw_batch(step), recipe.label_smoothing)
        norms.append(math.sqrt(sum((g**2).sum() for g in gradients.values())))
        losses.append(loss)
        warm, left = step / recipe.warmup_steps, recipe.total_steps - recipe.warmup_steps
        rate = recipe.learning_rate * min(warm, (1 + math.cos(math.pi * max(step - recipe.warmup_steps, 0) / left)) / 2)
        for name, weight in weights.items():
            g = gradients[name]
            if recipe.clip_norm is not None and norms[-1] > recipe.clip_norm:
                g = g * recipe.clip_norm / norms[-1]
            decay = recipe.weight_decay if name.endswith("kernel") else 0.0
            if recipe.optimizer == "sgd":  # L2 first, then Polyak's momentum
                first[name] = recipe.momentum * first[name] + g + decay * weight
                weights[name] = weight - rate * first[name]
                continue
            b1, b2 = recipe.betas  # arXiv:1711.05101, Algorithm 2
            first[name] = b1 * first[name] + (1 - b1) * g
            second[name] = b2 * second[name] + (1 - b2) * g**2
            m, v = first[name] / (1 - b1 ** (step + 1)), second[name] / (1 - b2 ** (step + 1))
            weights[name] = weight - rate * (m / (np.sqrt(v) + recipe.eps) + decay * weight)
    return losses, weights, norms


def loss_and_gradients(engine, weights, images, labels, smoothing):
    """Mean of -sum(q log p) with q = (1 - s) x one-hot + s / classes (arXiv:1512.00567, section 7)."""
    model = engine.load(engine.build(SPEC), weights, numerics="float64").train()
    logits = model(torch.from_numpy((images / 127.5 - 1).transpose(0, 3, 1, 2).copy()))
    log_p = logits - logits.exp().sum(dim=1, keepdim=True).log()
    q = torch.full_like(log_p, smoothing / 10)
    q[torch.arange(len(labels)), torch.from_numpy(labels[:, 0])] += 1 - smoothing
    loss = -(q * log_p).sum(dim=1).mean()
    loss.backward()
    for param in model.parameters():
        param.data = param.grad
    return loss.item(), engine.export(model)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_ten_steps_equal_plain_numpy_updates(engine, optimizer):
    """In float64, to 1e-10: a key's bias has no gradient but rounding, of which AdamW makes 1e-17 / eps x rate."""
    recipe = Recipe(total_steps=12, optimizer=optimizer, clip_norm=3.4, momentum=0.8, betas=(0.8, 0.99), **FIELDS)
    losses, weights, norms = reference(engine, recipe, 10)
    assert min(norms) < recipe.clip_norm < max(norms)
    with engine.numerics("float64"):
        for accumulate in (1, 2):  # without BatchNorm micro-batches change nothing
            trainer = engine.trainer(
                SPEC, vitcmp.init_weights(SPEC, 5), Recipe(**{**vars(recipe), "accumulate": accumulate})
            )
            for step in range(10):
                trainer.train(*draw_batch(step))
            stats = trainer.drain()
            np.testing.assert_allclose([x.loss for x in stats], losses, rtol=1e-12)
            np.testing.assert_allclose([x.gradient_norm for x in stats], norms, rtol=1e-11)
            assert [x.step for x in stats] == list(range(10)) and trainer.step == 10 and trainer.drain() == []
            for name, array in trainer.weights().items():
                np.testing.assert_allclose(array, weights[name], rtol=0, atol=1e-10, err_msg=name)


def test_a_step_past_the_last_and_another_numerics_are_refused(engine):
    recipe = Recipe(total_steps=1)
    with pytest.raises(ValueError, match="inside `with backend.numerics"):
        engine.trainer(SPEC, initial_weights(SPEC), recipe)
    with engine.numerics("float32"):
        trainer = engine.trainer(SPEC, initial_weights(SPEC), recipe)
        trainer.train(*draw_batch(0))
        with pytest.raises(ValueError, match="total_steps=1"):
            trainer.train(*draw_batch(1))
    with engine.numerics("float64"), pytest.raises(ValueError, match="open is float64"):
        trainer.predict(draw_batch(0)[0])


@pytest.mark.parametrize(
    ("spec", "options", "fields", "message"),
    [
        (SPEC, {}, {"numerics": "fp32"}, "unknown numerics 'fp32'"),
        (SPEC, {}, {"num_questions": 3}, "num_classes=10 must be a multiple of num_questions=3"),
        (SPEC, {"compile": "fast"}, {}, "unknown compile 'fast'"),
        (SPEC, {"attention": "xla"}, {}, "unknown attention 'xla'"),
        (CNN, {"attention": "math"}, {}, "a resnet has none"),
        (SPEC, {"num_devices": 0}, {}, "num_devices=0 must be 1 or more"),
        ("timm:resnet18", {}, {}, "another library"),
        ("resnet18:is_folded=true", {}, {}, "folded"),
        ("vit_ti8", {}, {}, "do not fit"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_said_before_anything_is_built(engine, spec, options, fields, message):
    spec, recipe = vitcmp.get_spec(spec), Recipe(total_steps=1, **fields)
    with engine.numerics("float32"), pytest.raises(ValueError, match=message):
        engine.trainer(spec, initial_weights(SPEC), recipe, **options)


def test_what_the_cpu_cannot_train_is_unsupported(engine):
    for spec, options, numerics, message in (
        (SPEC, {"compile": "cudagraphs"}, "float32", "GPU"),
        (CNN, {"num_devices": 2}, "float32", "SyncBatchNorm"),
        (SPEC, {}, "float16", "eps of 1e-8 is 0"),
    ):
        with engine.numerics("float32"), pytest.raises(Unsupported, match=message):
            engine.trainer(spec, initial_weights(spec), Recipe(total_steps=1, numerics=numerics), **options)


def test_a_run_that_diverges_is_found_at_its_step(engine):
    spec_weights = initial_weights(CNN)
    with engine.numerics("float32"):
        trainer = engine.trainer(CNN, spec_weights, Recipe(total_steps=9, learning_rate=1e30, optimizer="sgd"))
        with pytest.raises(Diverged, match=r"learning_rate=1e\+30") as error:
            train(trainer, 0, 6)
    assert 1 <= error.value.step < 6


@pytest.mark.parametrize("spec", [SPEC, CNN], ids=["vit", "resnet"])
def test_mixed_precision_follows_the_exact_curve_within_its_rounding(engine, spec):
    """Ten steps of SGD, because AdamW makes whole steps of a gradient that is mere rounding.

    The loss moves no more than twice the largest logit's error, which `tolerance` bounds, and each step is taken to add
    as much by the error that it leaves in the weights.
    """
    losses = {}
    for numerics in ("float64", "float32", "bfloat16_mixed"):
        with engine.numerics(numerics):
            recipe = Recipe(total_steps=10, optimizer="sgd", learning_rate=1e-2, numerics=numerics)
            trainer = engine.trainer(spec, vitcmp.init_weights(spec, 5), recipe)
            losses[numerics] = train(trainer, 0, 10)
            largest = np.abs(trainer.predict(draw_batch(0, spec=spec)[0])).max()
            assert trainer.params["conv1/kernel" if spec is CNN else "head/kernel"].dtype == {
                "float64": torch.float64}.get(numerics, torch.float32)  # fmt: skip
    for numerics in ("float32", "bfloat16_mixed"):
        steps = 1 + np.arange(10)
        bound = 2 * steps * tolerance(numerics, spec) * largest
        apart = np.abs(np.subtract(losses[numerics], losses["float64"]))
        assert (apart <= bound).all() and apart.max() > 0, (apart, bound)


def test_a_state_shares_no_memory_with_the_run(engine):
    with engine.numerics("float32"):
        trainer = engine.trainer(SPEC, initial_weights(SPEC), Recipe(total_steps=5))
        train(trainer, 0, 2)
        state, weights = trainer.state(), trainer.weights()
        kept = {name: array.copy() for name, array in (state | weights).items()}
        train(trainer, 2, 4)
        assert all(np.array_equal(array, kept[name]) for name, array in (state | weights).items())
        assert any(not np.array_equal(array, weights[name]) for name, array in trainer.weights().items())


def test_memory_counts_weights_and_moments(engine):
    with engine.numerics("float32"):
        adamw, sgd = (
            engine.trainer(CNN, initial_weights(CNN), Recipe(total_steps=1, optimizer=optimizer)).memory()
            for optimizer in ("adamw", "sgd")
        )
    num_params = vitcmp.params.count_params(CNN)
    statistics = sum(array.size for name, array in initial_weights(CNN).items() if name.endswith(("/mean", "/var")))
    assert adamw["parameters_bytes"] == sgd["parameters_bytes"] == 4 * (num_params + statistics)
    assert sgd["optimizer_bytes"] == 4 * num_params
    assert 0 <= adamw["optimizer_bytes"] - 8 * num_params <= 4 * len(initial_weights(CNN))  # and the counts of steps
    assert adamw["process_peak_bytes"] > 2**20 and adamw["activation_peak_bytes"] is None


@pytest.mark.slow
def test_a_compiled_model_trains_alike(engine):
    losses = []
    for compile in ("eager", "lite"):
        with engine.numerics("float64"):
            trainer = engine.trainer(
                SPEC, vitcmp.init_weights(SPEC, 5), Recipe(total_steps=5, **FIELDS), compile=compile
            )
            losses.append(train(trainer, 0, 5))
            assert trainer.weights().keys() == vitcmp.expected_shapes(SPEC).keys()
    np.testing.assert_allclose(*losses, rtol=1e-9)


@pytest.mark.slow
def test_two_processes_train_as_one(engine):
    """Their gradients are added in another order: a few roundings of float64, which grow as in tests/parity."""
    recipe = Recipe(total_steps=9, clip_norm=3.0, accumulate=2, **FIELDS)
    runs = []
    with engine.numerics("float64"):
        for num_devices in (1, 2):
            trainer = engine.trainer(SPEC, vitcmp.init_weights(SPEC, 5), recipe, num_devices=num_devices)
            losses = train(trainer, 0, 3)
            half = trainer.state()
            losses += train(trainer, 3, 6)
            weights = trainer.weights()
            trainer.load_state(half)
            assert train(trainer, 3, 6) == losses[3:]  # all processes went back
            assert all(np.array_equal(array, weights[name]) for name, array in trainer.weights().items())
            runs.append((losses, weights, trainer.predict(draw_batch(0)[0][:3])))  # 3 images for 2 processes
        (one, two) = runs
        assert two[2].shape == (3, 1, 10)
        np.testing.assert_allclose(two[0], one[0], rtol=1e-12)
        np.testing.assert_allclose(two[2], one[2], rtol=0, atol=1e-9)
        for name, array in one[1].items():
            np.testing.assert_allclose(two[1][name], array, rtol=0, atol=1e-9, err_msg=name)
        with pytest.raises(ValueError, match="num_devices=2 x accumulate=2; allowed: a multiple of 4"):
            trainer.train(*(array[:3] for array in draw_batch(0)))
        with pytest.raises(ValueError, match="already"):
            engine.trainer(SPEC, vitcmp.init_weights(SPEC, 5), recipe, num_devices=2)
    (child,) = trainer.group.children
    trainer.close()
    trainer.close()  # twice is once
    assert child.returncode == 0 and not torch.distributed.is_initialized()


def test_a_process_that_died_is_an_error_with_its_exit_code():
    from torch_models.processes import Processes

    child = subprocess.Popen([sys.executable, "-c", "exit(3)"], stdin=subprocess.PIPE, bufsize=0)
    child.wait()
    processes = object.__new__(Processes)  # the part that speaks to the others
    processes.children = [child]
    with child.stdin, pytest.raises(RuntimeError, match="the process of device 1 ended with exit code 3"):
        processes.call("train_share", [np.zeros((2, 5))])


def test_a_process_that_cannot_start_is_an_error_at_once(monkeypatch):
    from torch_models import processes

    monkeypatch.setattr(processes.sys, "executable", "/bin/false")
    monkeypatch.setattr(processes, "_write_line", lambda pipe, value: None)  # into a pipe that no one reads any more
    with pytest.raises(RuntimeError, match="the process of device 1 ended with exit code 1 at its start"):
        processes.Processes(2, platform="cpu", job={})


def test_synchronised_batch_norm_stands_on_the_same_arrays(engine):
    from torch_models.processes import share_statistics

    model = engine.load(engine.build(CNN), vitcmp.init_weights(CNN, 5), numerics="float32")
    before, images = engine.export(model), draw_batch(0, spec=CNN)[0] / 127.5 - 1
    outputs = engine.outputs(model, images)["logits"]
    share_statistics(model)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.SyncBatchNorm)]
    assert len(norms) == sum(name.endswith("/mean") for name in before)
    assert {norm.eps for norm in norms} == {CNN.norm_eps} and {norm.momentum for norm in norms} == {CNN.norm_momentum}
    assert all(np.array_equal(array, before[name]) for name, array in engine.export(model).items())
    np.testing.assert_array_equal(engine.outputs(model, images)["logits"], outputs)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_first_weights_are_drawn_as_timm_draws_them(name):
    """By each array's spread: n values tell a deviation to 1 / sqrt(2n), in each of two, of which 5 are allowed."""
    timm = pytest.importorskip("timm")
    from tests.parity.helpers import timm_weights

    torch.manual_seed(0)
    theirs, ours = timm_weights(timm.create_model(name, num_classes=10)), initial_weights(f"{name}:num_classes=10")
    assert theirs.keys() == ours.keys()
    for leaf, array in theirs.items():
        spread = np.sqrt((array**2).mean())
        assert abs(np.sqrt((ours[leaf] ** 2).mean()) - spread) <= 5 * spread / np.sqrt(array.size), leaf
    assert not ours["head/fc/bias" if name == "convnext_atto" else "bn1/bias"].any()


@pytest.mark.parametrize("new", [4, 6, 13, 16])
def test_the_patch_embedding_is_resampled_as_timm_does(new, monkeypatch):
    """With big_vision's bilinear resize instead of timm's bicubic, and in float64 instead of float32."""
    patch_embed = pytest.importorskip("timm.layers.patch_embed")
    monkeypatch.setattr(patch_embed, "DTYPE_INTERMEDIATE", torch.float64)
    kernel = np.random.default_rng(0).standard_normal((8, 8, 3, 24))
    oihw = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    options = {"interpolation": "bilinear", "antialias": False}
    theirs = patch_embed.resample_patch_embed(oihw, [new, new], **options).numpy().transpose(2, 3, 1, 0)
    spec = f"vit_ti{new}:width=24,num_heads=3,mlp_dim=40,depth=1"
    ours = fit_patch_size({"patch_embed/proj/kernel": kernel}, spec)["patch_embed/proj/kernel"]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * np.abs(theirs).max())
