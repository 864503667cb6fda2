"""Models of the JAX libraries with our weights equal ours; both sides' steps come from one code.

big_vision in float64, to 1e-9. The others have layers that compute in float32 whatever the input is (Keras' norms and
softmax, equimo's norms and softmax, flaxmodels' BatchNorm): bound by what float32 leaves, `tolerance("float32", spec)`.
"""

import dataclasses
import functools
import importlib.util
import os

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

import jax.numpy as jnp

from experiments.peer_models.child import draw_batch, make_step
from experiments.peer_models.registry import (
    PEERS,
    Setting,
    choose_keras_backend,
    default_attention,
    load_peer,
    prepare_images,
)
from vitcmp.backend import Unsupported, load_backend
from vitcmp.params import init_weights
from vitcmp.parity import tolerance
from vitcmp.specs import Spec, get_spec

choose_keras_backend("jax")  # before any test imports a library that imports Keras

BOUND = 1e-9
VIT = "depth=2,width=48,num_heads=3,mlp_dim=96,num_classes=10"
VITDET = f"{VIT},depth=4,global_blocks=2,window_size=4"  # on a grid of 7x7: padded
RESNET = "depths=1x2x1x1,num_classes=10"
CONVNEXT = "depths=1x2x1x1,widths=8x12x16x20,num_classes=10"
# By library and model: sizes that it can have, and an image that is not square where it takes one.
TINY = {
    ("big_vision", "vit_ti16"): "depth=1,width=32,num_heads=2,mlp_dim=128,num_classes=10,image_size=80x112",
    ("big_vision", "bit_r50x1"): "depths=2x2x2x2,num_classes=10,image_size=48x64",
    ("keras_hub", "vit_ti16"): f"{VIT},image_size=80x112",
    ("keras_hub", "vitdet_b16"): f"{VITDET},num_classes=0,image_size=112",
    ("keras_hub", "resnet50"): f"{RESNET},image_size=48x64",
    ("keras", "convnext_tiny"): "num_classes=10,image_size=48x64",
    ("equimo", "vit_ti16"): f"{VIT},image_size=112",
    ("equimo", "convnext_tiny"): f"{CONVNEXT},image_size=80x112",
    ("flaxmodels", "resnet50"): "num_classes=10,image_size=96x128",
}
FAULTS = {
    ("big_vision", "vit_ti16"): "gelu=erf",
    ("big_vision", "bit_r50x1"): "stem_pad=zero",
    ("keras_hub", "vit_ti16"): "gelu=tanh",
    ("keras_hub", "vitdet_b16"): "norm_eps=1e-4",
    ("equimo", "vit_ti16"): "gelu=erf",
    ("equimo", "convnext_tiny"): "gelu=erf",
}
backend = functools.cache(lambda: load_backend("jax", platform="cpu"))


def require(peer: str) -> None:
    if peer == "big_vision":
        if not os.environ.get("BIG_VISION_PATH"):
            pytest.skip("BIG_VISION_PATH is not set")
    elif importlib.util.find_spec(peer) is None:  # not importorskip: importing Keras warns
        pytest.skip(f"{peer} is not installed")


def make_spec(peer: str, model: str, sizes: str) -> Spec:
    return get_spec(f"{model}:{','.join(filter(None, (PEERS[peer].models[model], sizes)))}")


def compare(peer: str, spec: Spec, mode: str, *, ours: Spec | None = None) -> float:
    """Returns how far the outputs are apart: logits, and in training half of the first loss."""
    require(peer)
    attention = default_attention(spec, peer=peer, platform="cpu", mode=mode)
    setting = Setting(numerics="float64", attention=attention)
    weights, (images, labels) = init_weights(spec), draw_batch(spec, 2)
    with backend().numerics("float64"):
        model = backend().load(backend().build(ours or spec, attention=attention), weights, numerics="float64")
        theirs = load_peer(peer, backend(), spec, weights, setting)
        batches = (images, labels), (prepare_images(peer, spec, images), labels)
        a, b = (
            make_step(backend(), side, batch, mode=mode, compile="jit")[1]
            for side, batch in zip((model, theirs), batches, strict=True)
        )
    return float(np.abs(a - b).max() / np.abs(a).max())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries, which are not ours to mend
@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize(("peer", "model"), TINY)
def test_a_library_equals_ours(peer, model, mode):
    spec = make_spec(peer, model, TINY[peer, model])
    assert compare(peer, spec, mode) < (BOUND if peer == "big_vision" else tolerance("float32", spec))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("peer", "model"), FAULTS)
def test_a_wrong_numeric_of_ours_shows(peer, model):
    spec = make_spec(peer, model, TINY[peer, model])
    faulty = make_spec(peer, model, f"{TINY[peer, model]},{FAULTS[peer, model]}")
    assert compare(peer, spec, "forward", ours=faulty) > 3 * tolerance("float32", spec)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_keras_resnet50_is_another_model_and_its_outputs_say_so():
    spec = make_spec("keras", "resnet50", "num_classes=10,image_size=48x64")
    assert compare("keras", spec, "forward") > 1e3 * tolerance("float32", spec)


def make_foreign(**options: str):
    """A library's model in small: y = w (x - mean) with a statistic that training replaces."""
    from experiments.peer_models.jax_module import Foreign

    def apply(params, statistics, images, train):
        pooled = images.mean(axis=(1, 2))
        mean = pooled.mean(axis=0) if train else statistics["mean"]
        return (pooled - mean) @ params["w"], {"mean": mean}

    setting = Setting(numerics="float32", **options)
    arrays = {"w": np.ones((3, 7)), "unused": np.ones((2,))}
    return Foreign(apply, arrays, {"mean": np.full((3,), 0.25)}, get_spec("resnet50"), setting=setting)


def test_a_library_s_weights_are_arguments_of_the_program_and_not_constants():
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 6, 3)).astype(np.float32)
    step, logits = make_step(backend(), make_foreign(), (images, np.zeros(4, int)), mode="forward", compile="jit")
    shapes = [leaf.shape for leaf in jax.tree.leaves(step.inputs)]
    assert sorted(shapes) == sorted([(3, 7), (2,), (3,), images.shape])
    expected = (images.mean(axis=(1, 2)) - 0.25) @ np.ones((3, 7))
    np.testing.assert_allclose(logits, expected.ravel(), rtol=1e-5, atol=1e-6)


def test_a_library_s_model_is_trained_and_its_statistics_replaced():
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 6, 3)).astype(np.float32)
    step, output = make_step(backend(), make_foreign(), (images, np.arange(4)), mode="train", compile="jit")
    assert output.shape == (4 * 7 + 1,)
    assert output[-1] == pytest.approx(np.log(7) / 2, rel=1e-6)  # equal columns of w: equal logits
    for _ in range(20):
        step()
    assert step.result() < np.log(7) - 1e-4
    params, statistics, _ = step.state
    means = [leaf for leaf in jax.tree.leaves(statistics) if leaf.shape == (3,)]
    np.testing.assert_allclose(means[0], images.mean(axis=(0, 1, 2)), rtol=1e-4, atol=1e-6)
    assert not jnp.allclose(jax.tree.leaves(params)[-1], 1) or not jnp.allclose(jax.tree.leaves(params)[0], 1)


def test_a_kernel_that_cannot_be_forced_on_a_library_is_said():
    with pytest.raises(Unsupported, match="attention=pallas"):
        make_foreign(attention="pallas")


def test_big_vision_without_its_path_is_said(monkeypatch):
    monkeypatch.delenv("BIG_VISION_PATH", raising=False)
    spec = get_spec("vit_ti16:gelu=tanh")
    with pytest.raises(Unsupported, match="BIG_VISION_PATH"):
        load_peer("big_vision", backend(), spec, init_weights(spec), Setting(numerics="float32", attention="xla"))


def test_keras_hubs_vitdet_gets_images_that_it_turns_into_ours():
    spec, images = get_spec("vitdet_b16"), np.random.default_rng(0).uniform(-1, 1, (1, 4, 4, 3))
    theirs = prepare_images("keras_hub", spec, images)
    normalised = (theirs - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(normalised, images, rtol=0, atol=1e-15)
    assert prepare_images("keras_hub", dataclasses.replace(get_spec("resnet50")), images) is images
