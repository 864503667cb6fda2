"""Attention kernels of torch: flex, what a step really ran, and eager kernels in a CUDA graph."""

import contextlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_models.attention
import vitcmp
from torch_models.attention import attend
from torch_models.backend import TorchBackend, name_attention
from vitcmp.backend import Unsupported, load_backend, why_unsupported

VIT = vitcmp.get_spec("vit_ti16:depth=2,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=48x80")
# Windows of 3x3 on a grid of 5x7, one global block, and a head of one query: three kernels.
VITDET = vitcmp.get_spec(
    "vitdet_ti16:depth=2,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=80x112,window_size=3,"
    "global_blocks=1,pool=map"
)
LABELS = np.array([1, 7])
# Of two kernels in float32: their sums of up to 400 products in another order differ by a few eps of 6e-8 each, since
# rounding errors mostly cancel; the same sums by way of bfloat16, or a wrong bias, give 1e-3 and more.
BOUND = 3e-6


@pytest.fixture
def backend() -> TorchBackend:
    return load_backend("torch", platform="cpu")


def images_of(spec) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (2, *spec.image_size, 3)).astype(np.float32)


def load(backend, spec, attention, numerics="float32"):
    return backend.load(backend.build(spec, attention=attention), vitcmp.init_weights(spec), numerics=numerics)


def compile_step(backend, spec, attention, *, mode="forward", compile="eager", numerics="float32"):
    model = load(backend, spec, attention, numerics)
    return backend.compile(model, images_of(spec), LABELS, mode=mode, compile=compile)


def relative_error(a, b) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max() / np.abs(np.asarray(b)).max())


@pytest.mark.slow
def test_flex_equals_math_with_a_bias_that_is_never_made_whole():
    rng = np.random.default_rng(0)
    num_heads, rows, columns = 6, 16, 25
    num_tokens = rows * columns
    shapes = [(1, num_tokens, num_heads, 16)] * 3
    shapes += [(1, num_heads, num_tokens, rows), (1, num_heads, num_tokens, columns)]
    q, k, v, *bias = (torch.from_numpy(rng.standard_normal(shape)) for shape in shapes)
    exact = attend(q, k, v, kernel="math", bias=tuple(bias))
    q, k, v, *bias = (x.float() for x in (q, k, v, *bias))
    with torch.inference_mode():
        attend(q, k, v, kernel="flex", bias=tuple(bias))
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
            out = attend(q, k, v, kernel="flex", bias=tuple(bias))
    assert relative_error(out, exact) < BOUND
    allocated = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert 0 < max(allocated) < 4 * num_heads * num_tokens**2 / 2  # inductor's scratch is one head's logits


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "compile"), [(VITDET, "eager"), (VIT, "default")], ids=["vitdet", "vit-compiled"])
def test_a_model_on_flex_is_the_one_on_math_and_says_that_flex_ran(backend, spec, compile):
    step = compile_step(backend, spec, "flex", compile=compile)
    assert step.attention_ran == "flex_attention"
    assert relative_error(step.result(), compile_step(backend, spec, "math").result()) < BOUND


@pytest.mark.slow
def test_a_compiled_bias_is_right_or_the_compilers_refusal_is_unsupported(backend):
    """On a CPU, inductor 2.15 wants the bias as an input of its program, and in a compiled model it is none."""
    with contextlib.suppress(Unsupported):
        step = compile_step(backend, VITDET, "flex", compile="default")
        assert relative_error(step.result(), compile_step(backend, VITDET, "math").result()) < BOUND


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_that_is_not_fused_is_unsupported(backend, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(torch_models.attention, "_compile_flex", lambda: flex_attention)
    with pytest.raises(Unsupported, match=r"attention=flex: aten::_safe_softmax.* ran in its place"):
        compile_step(backend, VIT, "flex")


@pytest.mark.parametrize(
    ("axes", "reason"),
    [({"numerics": "float64"}, "adds up in float32"), ({"mode": "train"}, "no backward on a CPU")],
    ids=str,
)
def test_what_flex_cannot_do_on_a_cpu_is_known_before_any_work(backend, axes, reason):
    known = {"platform": "cpu", "backend": "torch", "numerics": "float32", "attention": "flex", **axes}
    assert reason in why_unsupported(VIT, **known)
    with pytest.raises(Unsupported, match=reason):
        compile_step(backend, VIT, "flex", **axes)


def test_flex_itself_refuses_float64_and_a_backward_on_a_cpu():
    q = torch.ones((1, 4, 1, 16))
    with pytest.raises(Unsupported, match="float64"):
        attend(q.double(), q.double(), q.double(), kernel="flex")
    with pytest.raises(Unsupported, match="backward"):
        attend(q.requires_grad_(), q, q, kernel="flex")


def test_flex_takes_small_heads_on_a_cpu_only():
    axes = {"backend": "torch", "numerics": "bfloat16", "attention": "flex"}
    spec = vitcmp.get_spec("vit_ti16:width=24,num_heads=3")
    assert "head_dim of 16 or more, this model has 8" in why_unsupported(spec, platform="gpu", **axes)
    assert why_unsupported(spec, platform="cpu", **axes) is None


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize(
    ("kernel", "operator"),
    [
        ("math", "aten::_scaled_dot_product_attention_math"),
        ("flash", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    ],
)
def test_a_step_says_which_attention_it_ran(backend, kernel, operator, mode):
    assert compile_step(backend, VIT, kernel, mode=mode).attention_ran == operator


def test_looking_at_the_attention_leaves_the_first_loss_the_one_of_before_any_update(backend, monkeypatch):
    looked = compile_step(backend, VIT, "math", mode="train").result()
    monkeypatch.setattr("torch_models.backend.Step._find_attention", lambda self, attention: "")
    assert np.array_equal(looked, compile_step(backend, VIT, "math", mode="train").result())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("kernel", ["math", "flash"])
def test_a_compiled_step_runs_the_kernel_that_it_names_or_none(backend, kernel, mode):
    """torch 2.15 puts flash in the place of math on a CPU; where a release does not, the math must truly run."""
    with contextlib.suppress(Unsupported) if kernel == "math" else contextlib.nullcontext():
        step = compile_step(backend, VIT, kernel, mode=mode, compile="default")
        assert (
            step.attention_ran
            == {
                "math": "matmul and softmax",
                "flash": "aten::_scaled_dot_product_flash_attention_for_cpu",
            }[kernel]
        )


FLASH, MATH = "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_attention_math"


@pytest.mark.parametrize(
    ("attention", "operators", "named"),
    [
        ("flash", {FLASH, f"{FLASH}_backward", "aten::addmm"}, FLASH),
        ("math", {MATH, "aten::_softmax"}, MATH),
        ("math", {"aten::bmm"}, "matmul and softmax"),
        ("flex", {"aten::addmm"}, "flex_attention"),
        ("cudnn", {FLASH}, None),
        ("cudnn", {"aten::bmm", "aten::_softmax"}, None),
        ("math", {FLASH}, None),
        ("mem_efficient", {"aten::_scaled_dot_product_efficient_attention", FLASH}, None),
        ("flex", {"aten::_safe_softmax"}, None),
        ("flex", {MATH}, None),
    ],
)
def test_an_attention_is_named_by_its_operators_or_refused(attention, operators, named):
    if named:
        assert name_attention(attention, operators) == named
    else:
        with pytest.raises(Unsupported, match=rf"attention={attention}: .* ran in its place"):
            name_attention(attention, operators)


def test_cuda_graphs_need_a_gpu(backend):
    axes = {"backend": "torch", "numerics": "float32", "attention": None, "compile": "cudagraphs"}
    assert "need a GPU" in why_unsupported(VIT, platform="cpu", **axes)
    assert why_unsupported(VIT, platform="gpu", **axes) is None
    with pytest.raises(Unsupported, match="CUDA graphs need a GPU, this is a cpu"):
        compile_step(backend, VIT, "math", compile="cudagraphs")


class FakeCuda:
    """Stands for torch.cuda: a graph keeps what was called while it was open, and calls it again at each replay."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def call(self) -> torch.Tensor:
        self.log.append("call")
        return torch.tensor([float(len(self.log))])

    def patch(self, monkeypatch) -> None:
        fakes = {"current_stream": self.stream, "Stream": self.stream, "CUDAGraph": lambda: self}
        fakes |= {"stream": lambda stream: self.note("side stream"), "graph": lambda graph: self.note("capture")}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def stream(self):
        return self

    def wait_stream(self, stream) -> None:
        self.log.append("wait")

    def replay(self) -> None:
        self.log.append("replay")

    @contextlib.contextmanager
    def note(self, name):
        self.log.append(f"{name} opens")
        yield
        self.log.append(f"{name} closes")


def test_a_captured_step_warms_up_on_a_side_stream_keeps_its_first_output_and_only_replays(monkeypatch):
    from torch_models.backend import Step

    cuda = FakeCuda()
    cuda.patch(monkeypatch)
    step = Step(lambda images: cuda.call(), (torch.zeros(1),), "cudagraphs")
    warm_up = ["side stream opens", "call", "call", "call", "side stream closes"]
    assert cuda.log == ["wait", *warm_up, "wait", "capture opens", "call", "capture closes"]
    assert step.result() == 3  # the first call was the third entry of the log
    step()
    step.queue(2)
    assert cuda.log[-3:] == ["replay"] * 3
    assert step.compile_s is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_cuda_graph_computes_what_eager_kernels_do(mode):
    backend = load_backend("torch", platform="gpu")
    eager, graph = (compile_step(backend, VIT, "math", mode=mode, compile=name) for name in ("eager", "cudagraphs"))
    assert relative_error(graph.result(), eager.result()) < 1e-5
    graph()
    assert np.isfinite(graph.result()).all()
