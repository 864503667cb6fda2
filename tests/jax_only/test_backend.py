"""What is particular to the JAX backend: precision, donated train steps, memory, and lowering for GPU and TPU."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp
from flax import nnx

import vitcmp
from jax_models.backend import JaxBackend
from vitcmp.backend import Unsupported, load_backend

SPECS = {
    "vit": "vit_ti16:depth=2,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=48x80",
    "vitdet": "vitdet_ti16:depth=2,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=48x80,window_size=2,"
    "global_blocks=1",
    "resnet": "resnet18:depths=1+1,width=8,num_classes=10,image_size=48x80",
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
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("numerics", ["float32", "bfloat16"])
def test_every_model_lowers_for_accelerators_from_a_cpu_host(backend, family, platform, numerics):
    model = load(backend, family, numerics=numerics)
    graph, state = nnx.split(model)
    images = jnp.asarray(IMAGES, model.compute_dtype)
    with backend.numerics(numerics):
        traced = jax.jit(lambda state, images: nnx.merge(graph, state)(images)).trace(state, images)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line or "stablehlo.convolution" in line]
    assert products
    if numerics == "float32":  # a default precision would be TF32 on GPU and bfloat16 on TPU
        assert all("HIGHEST" in line for line in products)


def test_tensorfloat32_is_asked_for_by_its_name_when_lowered_for_a_gpu():
    with jax.default_matmul_precision("TF32_TF32_F32"):
        traced = jax.jit(lambda x: x @ x).trace(jnp.ones((8, 8)))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("tf32") == 2


@pytest.mark.parametrize(
    "numerics, low, high",
    [("float64", 0, 1e-14), ("float32", 1e-9, 2e-6), ("bfloat16", 1e-4, 5e-3), ("float16", 1e-5, 1e-3)],
)
def test_the_effective_precision_is_what_the_name_says(backend, numerics, low, high):
    with backend.numerics(numerics) as effective:
        assert low <= effective["matmul_error"] < high
        assert low <= effective["conv_error"] < high
    assert jnp.ones(1).dtype == jnp.float32  # float64 does not outlast its context


def test_what_the_cpu_does_not_have_is_unsupported(backend):
    with pytest.raises(Unsupported, match="tensorfloat32"), backend.numerics("tensorfloat32"):
        pass
    with pytest.raises(Unsupported, match="tpu"):
        load_backend("jax", platform="tpu")


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


def test_the_pallas_kernel_lowers_for_a_tpu(backend):
    spec = vitcmp.get_spec("vit_s16:depth=1,pool=gap,image_size=256")  # 256 tokens, two blocks of the kernel
    model = backend.load(backend.build(spec, attention="pallas"), vitcmp.init_weights(spec), numerics="bfloat16")
    graph, state = nnx.split(model)
    images = jnp.zeros((1, 256, 256, 3), jnp.bfloat16)
    traced = jax.jit(lambda state, images: nnx.merge(graph, state)(images)).trace(state, images)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
