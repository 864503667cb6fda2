"""The effective precision is what the name says, and which library multiplies matrices on a CPU is said and true."""

import contextlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_models.matmul
import vitcmp
from torch_models.backend import TorchBackend
from torch_models.matmul import prefer_onednn
from vitcmp.backend import MAX_ERROR, NUMERICS, Unsupported, load_backend

CPU_NUMERICS = [name for name in NUMERICS if name != "tensorfloat32"]
SIZES = "width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=80x112"
MODELS = {
    "vit": f"vit_ti16:depth=2,{SIZES}",
    "vitdet": f"vitdet_ti16:depth=2,{SIZES},window_size=3,global_blocks=1",
    "resnet": "resnet18:depths=1+1,width=8,num_classes=10,image_size=80x112",
    "convnext": "convnext_atto:depths=1x1x2x1,widths=16x24x32x40,num_classes=10,image_size=80x112",
}


@pytest.fixture
def backend() -> TorchBackend:
    return load_backend("torch", platform="cpu")


@pytest.fixture(autouse=True)
def settings():
    """Sets what a program that calls us may have set, and demands it back."""
    flags = torch.backends.cudnn
    kept = torch.get_float32_matmul_precision(), flags.allow_tf32, flags.benchmark
    torch.set_float32_matmul_precision("high")
    flags.allow_tf32, flags.benchmark = True, False
    yield
    left = torch.get_float32_matmul_precision(), flags.allow_tf32, flags.benchmark
    torch.set_float32_matmul_precision(kept[0])
    flags.allow_tf32, flags.benchmark = kept[1:]
    assert left == ("high", True, False)


def eps_of(numerics: str) -> float:
    return torch.finfo(getattr(torch, NUMERICS[numerics][1])).eps


@pytest.mark.parametrize("numerics", CPU_NUMERICS)
def test_a_matmul_and_a_convolution_have_the_error_that_the_name_says(backend, numerics):
    """Rounding to a spacing of eps leaves eps / sqrt(12) of the leading bit, 0.2 eps of a typical value: never less.

    16 bits are rounded once, after sums in float32. In float32 each of the up to 576 terms of a sum is rounded, which
    grows like a random walk: sqrt(576) / 2 eps is twice that. The next numerics is a factor of 8 or more away.
    """
    eps = eps_of(numerics)
    low = 0 if numerics == "float64" else 0.1 * eps  # float64 is what is compared with
    high = 0.5 * 576**0.5 * eps if eps < 1e-6 else eps
    with backend.numerics(numerics) as effective:
        for name in ("matmul_error", "conv_error"):
            assert low <= effective[name] < high < MAX_ERROR[numerics]


@pytest.mark.parametrize("model", MODELS)
def test_a_model_has_the_error_that_the_name_says(backend, model):
    """The logits are rounded themselves, 0.2 eps; some 50 roundings before them grow like a random walk, to a few eps.

    A float32 that is called bfloat16 is 1e4 times too good, a TF32 or bfloat16 that is called float32 as much too bad.
    """
    spec = vitcmp.get_spec(MODELS[model])
    weights = vitcmp.init_weights(spec)
    images = np.random.default_rng(0).uniform(-1, 1, (4, *spec.image_size, 3))

    def logits(numerics: str) -> np.ndarray:
        with backend.numerics(numerics):
            return backend.outputs(backend.load(backend.build(spec), weights, numerics=numerics), images)["logits"]

    exact = logits("float64")
    for numerics in CPU_NUMERICS[:-1]:
        error = np.linalg.norm(logits(numerics) - exact) / np.linalg.norm(exact)
        assert 0.1 * eps_of(numerics) < error < 10 * eps_of(numerics), numerics


@pytest.mark.parametrize("numerics", NUMERICS)
def test_on_a_gpu_tensorfloat32_is_on_where_it_is_asked_for_and_off_elsewhere(backend, numerics, monkeypatch):
    backend.platform = "gpu"  # torch takes these settings without one, too
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with backend.numerics(numerics):
        is_on = numerics == "tensorfloat32"
        assert torch.backends.cuda.matmul.allow_tf32 is is_on
        assert torch.backends.cudnn.allow_tf32 is is_on
        for setting in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
            assert (setting.fp32_precision == "tf32") is is_on


def test_settings_are_put_back_after_an_error(backend):
    with pytest.raises(KeyError), backend.numerics("float32"):
        raise KeyError  # the fixture looks at what is left


def test_an_error_that_the_name_does_not_allow_is_unsupported(backend, monkeypatch):
    monkeypatch.setattr(backend, "_errors", lambda dtype: {"matmul_error": 1e-7, "conv_error": 3e-4})
    with pytest.raises(Unsupported, match="numerics=float32: .*0.0003.* at most 1e-05"), backend.numerics("float32"):
        pass
    with backend.numerics("float16") as effective:
        assert effective["conv_error"] == 3e-4


@pytest.mark.parametrize(
    ("blas", "onednn", "chosen"),
    [
        (2.4e-7, 4.0e-7, "medium"),  # measured on an AMD EPYC
        (2.4e-7, 9.5e-7, "medium"),
        (3.0e-7, 2.3e-3, "highest"),  # bfloat16, measured on an Intel Xeon with AMX
        (2.4e-7, 3.0e-4, "highest"),  # TF32
        (2.4e-7, 9.7e-7, "highest"),
        (4e-6, 1.1e-5, "highest"),
    ],
)
def test_onednn_is_chosen_by_its_measured_error(backend, monkeypatch, blas, onednn, chosen):
    def measure() -> float:
        return {"highest": blas, "medium": onednn}[torch.get_float32_matmul_precision()]

    monkeypatch.setattr(torch_models.matmul, "measure_float32_error", measure)
    monkeypatch.setattr(backend, "_errors", lambda dtype: {"matmul_error": blas})  # not of this CPU
    with backend.numerics("float32") as effective:
        assert torch.get_float32_matmul_precision() == effective["float32_matmul_precision"] == chosen
        assert (effective["highest_float32_error"], effective["medium_float32_error"]) == (blas, onednn)
    prefer_onednn()
    assert torch.get_float32_matmul_precision() == chosen
    torch.set_float32_matmul_precision("high")


@pytest.mark.parametrize("numerics", ["float64", "bfloat16", "float16", "bfloat16_mixed"])
def test_other_numerics_leave_float32_at_its_highest(backend, numerics):
    with backend.numerics(numerics) as effective:
        assert effective["float32_matmul_precision"] == "highest"


def test_finding_the_library_leaves_standard_output_alone(backend, capfd):
    torch_models.matmul.find_matmul_library.cache_clear()
    print("before")
    with backend.numerics("float32") as effective:
        print("inside")
    assert capfd.readouterr().out == "before\ninside\n"
    assert effective["matmul_library"] in ("oneDNN", "MKL", None)


@pytest.mark.parametrize("numerics", CPU_NUMERICS)
@pytest.mark.parametrize("operation", ["matmul", "batched", "backward"])
def test_the_library_that_runs_a_linear_layer_runs_batches_and_gradients_too(backend, numerics, operation):
    """oneDNN and MKL print what they run; where the record names neither, nothing is printed."""
    dtype = getattr(torch, NUMERICS[numerics][1])
    x, weight = torch.randn((2, 197, 96), dtype=dtype), torch.randn((288, 96), dtype=dtype, requires_grad=True)
    run = {
        "matmul": lambda: x[0] @ weight.detach().T,
        "batched": lambda: x @ x.mT,
        "backward": torch.nn.functional.linear(x, weight).sum().backward,
    }[operation]
    with backend.numerics(numerics) as effective, contextlib.ExitStack() as stack:
        for library in (torch.backends.mkldnn, torch.backends.mkl):
            if library.is_available():
                stack.enter_context(library.verbose(library.VERBOSE_ON))
        printed = torch_models.matmul._printed(run)
    marks = {"oneDNN": "onednn_verbose,", "MKL": "MKL_VERBOSE "}
    ran = [name for name, mark in marks.items() if mark in printed]
    assert ran == ([effective["matmul_library"]] if effective["matmul_library"] else [])
