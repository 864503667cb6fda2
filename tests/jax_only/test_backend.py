"""What is particular to the JAX backend: donated train steps, memory, kernels that a CPU lacks."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

from flax import nnx

import vitcmp
from jax_models.backend import JaxBackend
from vitcmp.backend import load_backend

SPECS = {
    "vit": "vit_ti16:depth=2,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=48x80",
    "vitdet": "vitdet_ti16:depth=2,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=48x80,window_size=2,"
    "global_blocks=1",
    "resnet": "resnet18:depths=1+1,width=8,num_classes=10,image_size=48x80",
    "bit": "bit_r50x1:depths=1+1,num_classes=10,image_size=48x80",
    "convnext": "convnext_atto:depths=1+1,widths=8+16,num_classes=10,image_size=48x80",
}
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 48, 80, 3)).astype(np.float32)
LABELS = np.array([1, 7])


@pytest.fixture
def backend() -> JaxBackend:
    return load_backend("jax", platform="cpu")


def load(backend, family, *, numerics="float32", attention=None):
    spec = vitcmp.get_spec(SPECS[family])
    return backend.load(backend.build(spec, attention=attention), vitcmp.init_weights(spec), numerics=numerics)


@pytest.mark.parametrize("family", SPECS)
def test_a_train_step_donates_its_state_and_goes_on(backend, family):
    model = load(backend, family)
    step = backend.compile(model, IMAGES, LABELS, mode="train", compile="jit")
    step()
    step.queue(2)
    assert step.compile_s > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(step.state))
    assert not any(
        leaf.is_deleted() for leaf in jax.tree.leaves(nnx.state(model))
    )  # the model's own arrays are copied first


def test_memory_grows_with_the_batch_and_excludes_the_weights(backend):
    model = load(backend, "vit")
    steps = [
        backend.compile(model, np.repeat(IMAGES, count, axis=0), LABELS.repeat(count), mode="forward", compile="jit")
        for count in (1, 8)
    ]
    small, large = (backend.memory(model, step) for step in steps)
    assert small["parameters_bytes"] == large["parameters_bytes"] == 4 * vitcmp.count_params(SPECS["vit"])
    assert 0 < 4 * small["activation_peak_bytes"] < large["activation_peak_bytes"]
    assert small["process_peak_bytes"] > 2**20


def test_the_cudnn_kernel_raises_on_a_cpu(backend):
    with pytest.raises(Exception, match=r"(?i)cudnn"):
        backend.outputs(load(backend, "vit", attention="cudnn", numerics="bfloat16"), IMAGES)
