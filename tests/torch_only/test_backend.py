"""What is particular to the torch backend: forced kernels, compilers, layouts, memory, restored settings."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import vitcmp
from torch_models.backend import TorchBackend
from vitcmp.backend import ATTENTION, COMPILE, LAYOUT, Unsupported, load_backend

SPEC = vitcmp.get_spec("vit_ti16:depth=2,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=48x80")
CNN = vitcmp.get_spec("resnet18:depths=1+1,width=8,num_classes=10,image_size=48x80")
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 48, 80, 3)).astype(np.float32)
LABELS = np.array([1, 7])


@pytest.fixture
def backend() -> TorchBackend:
    return load_backend("torch", platform="cpu")


def load(backend, spec, **options):
    model = backend.build(spec, attention=options.pop("attention", None))
    return backend.load(model, vitcmp.init_weights(spec), **{"numerics": "float32", **options})


def operators(model, images) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.inference_mode():
        model(images)
    return {event.name for event in profile.events()}


@pytest.mark.parametrize("spec", [SPEC, CNN])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_parameters_are_aligned_as_torchs_own(backend, spec, layout):
    model = load(backend, spec, layout=layout)
    assert {tensor.data_ptr() % 64 for tensor in model.state_dict().values()} == {0}


@pytest.mark.parametrize(
    "kernel, operator",
    [
        ("math", "aten::_scaled_dot_product_attention_math"),
        ("flash", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    ],
)
def test_an_attention_kernel_is_forced_and_no_other_runs(backend, kernel, operator):
    model = load(backend, SPEC, attention=kernel)
    names = operators(model, torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()))
    ran = {name for name in names if name.startswith("aten::_scaled_dot_product")}
    assert ran == {operator}


@pytest.mark.parametrize("kernel", ["mem_efficient", "cudnn"])
@pytest.mark.filterwarnings("ignore")  # torch warns why each kernel cannot run, and then raises
def test_a_kernel_that_the_device_does_not_have_raises(backend, kernel):
    with pytest.raises(RuntimeError, match="No available kernel|No viable backend"):
        backend.outputs(load(backend, SPEC, attention=kernel), IMAGES)


@pytest.mark.parametrize("kernel", ["math", "flash"])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_every_kernel_of_the_cpu_computes_the_same(backend, kernel, mode):
    outputs = backend.outputs(load(backend, SPEC, attention=kernel), IMAGES)
    expected = backend.outputs(load(backend, SPEC, attention="math"), IMAGES)
    np.testing.assert_allclose(
        outputs["logits"], expected["logits"], rtol=0, atol=2e-6 * np.abs(expected["logits"]).max()
    )
    step = backend.compile(load(backend, SPEC, attention=kernel), IMAGES, LABELS, mode=mode, compile="eager")
    step()
    step.queue(2)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [SPEC, CNN], ids=["vit", "resnet"])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_the_compiler_runs_and_says_how_long_it_took(backend, spec, mode):
    model = load(backend, spec, attention="flash" if spec is SPEC else None)
    step = backend.compile(model, IMAGES, LABELS, mode=mode, compile="default")
    step()
    assert step.compile_s > 0 and step.compile_cache in ("cold", "warm")


@pytest.mark.slow
def test_the_first_loss_of_a_compiled_train_step_is_of_before_the_first_update(backend):
    losses = [
        backend.compile(load(backend, CNN), IMAGES, LABELS, mode="train", compile=mode).result()
        for mode in ("eager", "default")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_eager_compiles_nothing_and_says_so(backend):
    step = backend.compile(load(backend, CNN), IMAGES, LABELS, mode="forward", compile=COMPILE["torch"][0])
    assert step.compile_s is None and step.compile_cache is None


def test_channels_last_changes_the_memory_format_and_not_the_outputs(backend):
    plain, last = (load(backend, CNN, layout=layout) for layout in LAYOUT["torch"])
    assert last.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not plain.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    a, b = (backend.outputs(model, IMAGES)["logits"] for model in (plain, last))
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(a).max())


@pytest.mark.parametrize("spec", [SPEC, CNN], ids=["vit", "resnet"])
def test_a_train_step_changes_the_parameters_and_a_forward_step_does_not(backend, spec):
    for mode in ("forward", "train"):
        model = load(backend, spec)
        before = backend.export(model)
        backend.compile(model, IMAGES, LABELS, mode=mode, compile="eager")()
        changed = {name for name, array in backend.export(model).items() if not np.array_equal(array, before[name])}
        assert changed == (set() if mode == "forward" else set(before))


def test_memory_of_a_known_step_is_what_it_allocates(backend):
    class OneMatmul(torch.nn.Module):
        def forward(self, x):
            return (x @ x) @ x  # two results of 512 x 512, the first freed after the second

    x = torch.ones(512, 512)
    step = type("Step", (), {"__call__": lambda self: OneMatmul()(x)})()
    memory = backend.memory(torch.nn.Linear(3, 5), step)
    assert memory["parameters_bytes"] == 4 * (15 + 5)
    assert memory["activation_peak_bytes"] == 2 * 4 * 512**2
    assert memory["process_peak_bytes"] > 2**20


def test_what_the_cpu_does_not_have_is_unsupported(backend):
    with pytest.raises(Unsupported, match="tensorfloat32"), backend.numerics("tensorfloat32"):
        pass
    with pytest.raises(Unsupported, match="tpu"):
        load_backend("torch", platform="tpu")


def test_every_kernel_name_is_known_to_torch():
    from torch_models.attention import SDPA_BACKENDS

    assert (*SDPA_BACKENDS, "flex") == ATTENTION["torch"]
