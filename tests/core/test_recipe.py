"""Recipes and their faults, batches and states that do not fit, first weights, and patch embeddings of another size."""

import dataclasses
import json
import math

import numpy as np
import pytest

import vitcmp
from vitcmp.initial import fit_patch_size, initial_weights
from vitcmp.params import count_params, expected_params
from vitcmp.recipe import (
    Diverged,
    Recipe,
    StepStats,
    check_batch,
    check_finite,
    check_state,
    param_names,
)

VIT = "width=48,depth=2,num_heads=3,mlp_dim=96,num_classes=10"
SPEC = vitcmp.get_spec(f"vit_ti8:{VIT},image_size=27x35")
MODELS = {
    "vit": f"vit_ti8:{VIT},pool=map,rep_size=64",
    "vitdet": f"vitdet_ti8:{VIT},neck_dim=12,global_blocks=1",
    "resnet-basic": "resnet18:num_classes=10",
    "resnet-bottleneck": "resnet50:depths=1x1,num_classes=10",
    "bit": "bit_r50x1:depths=1,num_classes=10",
    "bit_v1": "bit_v1_r50x1:depths=1,num_classes=10",
    "convnext": "convnext_atto:num_classes=10",
}


def test_the_learning_rate_warms_up_from_zero_and_falls_as_a_cosine_to_zero():
    recipe = Recipe(total_steps=110, warmup_steps=10, learning_rate=0.4)
    rates = [recipe.learning_rate_at(step) for step in range(111)]
    assert rates[0] == 0 and rates[5] == 0.2 and rates[10] == 0.4
    assert math.isclose(rates[60], 0.2) and math.isclose(rates[35], 0.2 * (1 + math.sqrt(0.5))) and rates[110] == 0
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_without_warm_up_the_first_step_has_the_highest_rate():
    assert Recipe(total_steps=3, learning_rate=0.5).learning_rate_at(0) == 0.5


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": "adam"},
        {"total_steps": 0},
        {"total_steps": 2.5},
        {"total_steps": True},
        {"warmup_steps": 100},
        {"warmup_steps": -1},
        {"accumulate": 0},
        {"num_questions": 0},
        {"learning_rate": -1.0},
        {"learning_rate": math.nan},
        {"learning_rate": "0.1"},
        {"betas": (0.9, 1.0)},
        {"betas": (0.9,)},
        {"eps": 0.0},
        {"momentum": 1.0},
        {"weight_decay": math.inf},
        {"clip_norm": 0.0},
        {"label_smoothing": 1.0},
    ],
    ids=str,
)
def test_a_bad_field_is_named_with_its_value_and_what_is_allowed(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError) as error:
        Recipe(**{"total_steps": 100, **fields})
    assert f"{name}={value!r}, expected " in str(error.value)


def test_all_bad_fields_are_in_one_message():
    with pytest.raises(ValueError, match=r"accumulate=0.*momentum=2"):
        Recipe(total_steps=1, momentum=2, accumulate=0)


def test_a_recipe_goes_through_json():
    recipe = Recipe(total_steps=5, clip_norm=1.0, betas=(0.8, 0.95))
    assert Recipe(**json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe


def batch_faults(images: np.ndarray, labels: np.ndarray, *, num_devices: int = 1, **fields: object) -> str:
    recipe = Recipe(total_steps=1, **fields)
    with pytest.raises(ValueError) as error:
        check_batch(images, labels, spec=SPEC, recipe=recipe, num_devices=num_devices)
    return str(error.value)


def test_a_batch_that_fits_is_taken():
    images = np.zeros((12, 27, 35, 3), np.uint8)
    for labels, fields in ((np.full((12, 1), 9), {}), (np.full((12, 2), 4), {"num_questions": 2})):
        for pixels in (images, images.astype(np.float32)):
            recipe = Recipe(total_steps=1, accumulate=3, **fields)
            check_batch(pixels, labels, spec=SPEC, recipe=recipe, num_devices=2)


def test_every_fault_of_a_batch_is_said():
    images, labels = np.zeros((12, 27, 35, 3), np.uint8), np.zeros((12, 1), int)
    assert "num_devices=4 x accumulate=2; allowed: a multiple of 8" in batch_faults(
        images, labels, num_devices=4, accumulate=2
    )
    assert "labels run from 0 to 5, expected 0 to 4" in batch_faults(images, labels + np.array([0, 5]), num_questions=2)
    assert "labels run from -1" in batch_faults(images, labels - 1)
    assert "labels are int64 of shape (12,), expected ints of (12, 1)" in batch_faults(images, labels[:, 0])
    assert "labels are float64" in batch_faults(images, labels.astype(float))
    assert "images are uint8 of shape (12, 35, 27, 3)" in batch_faults(images.swapaxes(1, 2), labels)
    assert "images are int64" in batch_faults(images.astype(int), labels)
    faults = batch_faults(images[:0, 1:], labels)
    assert faults.count(";") == 3 and "a batch of 0 images" in faults


def state_of(recipe: Recipe) -> dict[str, np.ndarray]:
    weights = vitcmp.init_weights(SPEC)
    state = {"step": np.array(1), **{f"params/{name}": array for name, array in weights.items()}}
    kinds = ["moment1", "moment2"] if recipe.optimizer == "adamw" else ["moment1"]
    return state | {f"{kind}/{name}": array for kind in kinds for name, array in weights.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_state_of_the_model_and_the_optimizer_is_taken(optimizer):
    recipe = Recipe(total_steps=2, optimizer=optimizer)
    check_state(state_of(recipe), spec=SPEC, recipe=recipe)


def test_a_state_that_does_not_fit_is_refused_with_all_that_is_wrong():
    recipe = Recipe(total_steps=2)
    state = state_of(recipe)
    state["params/norm/scale"] = np.zeros(3)
    state["moment1/norm/bias"] = np.full(48, np.nan)
    del state["moment2/head/bias"]
    with pytest.raises(ValueError) as error:
        check_state(state, spec=SPEC, recipe=recipe)
    for fault in ("params/norm/scale has shape (3,)", "moment1/norm/bias has values", "missing moment2/head/bias"):
        assert fault in str(error.value)
    with pytest.raises(ValueError, match="unexpected moment2/"):
        check_state(state_of(recipe), spec=SPEC, recipe=dataclasses.replace(recipe, optimizer="sgd"))
    with pytest.raises(ValueError, match="step=3 must be from 0 to total_steps=2"):
        check_state({**state_of(recipe), "step": np.array(3)}, spec=SPEC, recipe=recipe)


def test_running_statistics_are_no_parameters():
    names = param_names(vitcmp.get_spec(MODELS["resnet-basic"]))
    assert names and not [name for name in names if name.endswith(("/mean", "/var"))]


@pytest.mark.parametrize("figures", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_the_first_step_that_is_not_finite_is_named(figures):
    stats = [StepStats(4, 1.0, 1.0), StepStats(5, *figures), StepStats(6, math.nan, math.nan)]
    with pytest.raises(Diverged, match=r"^step 5: .*learning_rate=0.001.*warmup_steps=7") as error:
        check_finite(stats, Recipe(total_steps=10, warmup_steps=7))
    assert error.value.step == 5
    assert check_finite(stats[:1], Recipe(total_steps=10)) == stats[:1]


@pytest.mark.parametrize("name", MODELS)
def test_first_weights_fit_the_model_and_are_the_seeds(name):
    weights = initial_weights(MODELS[name], 3)
    vitcmp.params.check_weights(weights, MODELS[name])
    assert all(array.dtype == np.float32 for array in weights.values())
    again, other = initial_weights(MODELS[name], 3), initial_weights(MODELS[name], 4)
    assert all(np.array_equal(weights[leaf], again[leaf]) for leaf in weights)
    drawn = [leaf for leaf in weights if np.ptp(weights[leaf]) > 0]
    assert len(drawn) > len(weights) / 6 and not any(np.array_equal(weights[leaf], other[leaf]) for leaf in drawn)


def test_first_weights_of_one_shape_are_the_same_at_every_image_and_patch_size():
    a, b = (initial_weights(f"vit_ti{patch}:{VIT},image_size={size}", 1) for patch, size in ((8, 32), (16, 96)))
    differing = {name for name in a if a[name].shape != b[name].shape or not np.array_equal(a[name], b[name])}
    assert differing == {"patch_embed/proj/kernel", "pos_embed"}


def test_norms_biases_and_classifiers_start_as_published():
    for model in MODELS.values():
        weights = initial_weights(model)
        for name, leaf in expected_params(model).items():
            if leaf.kind in ("norm_bias", "mean", "rel_pos"):
                assert not weights[name].any(), name
            if leaf.kind in ("norm_scale", "var"):
                assert set(np.unique(weights[name])) <= {0.0, 1.0}, name
    for name in ("vit", "vitdet", "bit", "bit_v1"):
        weights = initial_weights(MODELS[name])
        assert not any(array.any() for leaf, array in weights.items() if leaf.startswith("head"))
    gammas = [array for leaf, array in initial_weights(MODELS["convnext"]).items() if leaf.endswith("gamma")]
    assert gammas and all((array == np.float32(1e-6)).all() for array in gammas)


@pytest.mark.parametrize("name", ["resnet-basic", "resnet-bottleneck", "bit_v1"])
def test_the_last_norm_of_each_residual_branch_starts_at_zero_unless_told_not_to(name):
    def zeros(**options: bool) -> list[str]:
        weights = initial_weights(MODELS[name], **options)
        return [leaf for leaf, array in weights.items() if leaf.endswith("/scale") and not array.any()]

    last = {"resnet-basic": "bn2", "resnet-bottleneck": "bn3", "bit_v1": "norm3"}[name]
    num_blocks = sum(vitcmp.get_spec(MODELS[name]).depths)
    assert len(zeros()) == num_blocks and all(leaf.endswith(f"/{last}/scale") for leaf in zeros())
    assert zeros(zero_init_residual=False) == []


def test_bad_seeds_and_models_of_others_are_refused():
    for seed in (-1, 1.5):
        with pytest.raises(ValueError, match="seed="):
            initial_weights(SPEC, seed)
    with pytest.raises(ValueError, match="timm"):
        initial_weights("timm:resnet18")


def patches_of(images: np.ndarray, size: int) -> np.ndarray:
    """Cuts (h w c) into (patches, size, size, c)."""
    h, w, c = images.shape
    return images.reshape(h // size, size, w // size, size, c).swapaxes(1, 2).reshape(-1, size, size, c)


@pytest.mark.parametrize("new", [9, 12, 16, 24])
def test_patches_made_larger_give_the_same_tokens(new):
    weights = {"patch_embed/proj/kernel": np.random.default_rng(0).standard_normal((8, 8, 3, 48))}
    patches = patches_of(np.random.default_rng(1).standard_normal((16, 24, 3)), 8)
    larger = vitcmp.resample.resize(patches, (new, new), antialias=False)
    fitted = fit_patch_size(weights, f"vit_ti{new}:{VIT}")["patch_embed/proj/kernel"]
    tokens = np.tensordot(patches, weights["patch_embed/proj/kernel"], 3)
    np.testing.assert_allclose(np.tensordot(larger, fitted, 3), tokens, rtol=0, atol=1e-12)


def test_the_resized_kernel_solves_equation_5_by_least_squares():
    """Smaller patches cannot have all that larger ones had: B^T w' = w is solved as nearly as can be."""
    kernel = np.random.default_rng(0).standard_normal((8, 8, 3, 48))
    eye = np.eye(64).reshape(64, 8, 8, 1)
    resize = vitcmp.resample.resize(eye, (5, 5), antialias=False).reshape(64, 25)  # B^T: a row for each old pixel
    expected = np.linalg.lstsq(resize, kernel.reshape(64, -1), rcond=None)[0].reshape(5, 5, 3, 48)
    fitted = fit_patch_size({"patch_embed/proj/kernel": kernel}, f"vit_ti5:{VIT}")["patch_embed/proj/kernel"]
    np.testing.assert_allclose(fitted, expected, rtol=0, atol=1e-12)


def test_only_the_patch_embedding_is_touched_and_keeps_its_dtype():
    weights = initial_weights(f"vit_ti8:{VIT},image_size=32")
    same, fitted = fit_patch_size(weights, f"vit_ti8:{VIT}"), fit_patch_size(weights, f"vit_ti16:{VIT},image_size=64")
    assert all(same[name] is weights[name] for name in weights)
    assert {name for name in weights if fitted[name] is not weights[name]} == {"patch_embed/proj/kernel"}
    vitcmp.params.check_weights(fitted, f"vit_ti16:{VIT},image_size=64")
    assert fitted["patch_embed/proj/kernel"].dtype == np.float32
    assert count_params(f"vit_ti16:{VIT},image_size=64") == sum(array.size for array in fitted.values())
    with pytest.raises(ValueError, match="no patch size"):
        fit_patch_size(weights, "resnet18")
