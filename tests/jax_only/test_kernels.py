"""Each way to attend and to convolve computes the same: equal to the plain one, forward and backward."""

import functools
import math

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp

import vitcmp
from jax_models import attention, layers
from jax_models.attention import attend
from jax_models.backend import JaxBackend
from jax_models.flops import count_flops, count_jaxpr_flops
from jax_models.layers import convolve_expanded, convolve_native
from vitcmp.backend import load_backend

CONVNEXT = "convnext_atto:depths=1+1,widths=8+16,num_classes=10,image_size=48x80"
RESNET = "resnet50:depths=1+1+1+1,width=8,num_classes=10,image_size=33x40"  # ends in maps of 2x2


@pytest.fixture
def backend() -> JaxBackend:
    return load_backend("jax", platform="cpu")


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def draw(*shape, dtype=None):
    """Draws an array; float32, or float64 where that is on, unless another dtype is asked for."""
    array = jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape))
    return array if dtype is None else array.astype(dtype)


def widen(arrays):
    return [jnp.asarray(np.asarray(array, np.float64)) for array in arrays]


def error(ours, exact) -> float:
    """Returns the relative error of all arrays together, by their 2-norm."""
    ours, exact = (
        np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]) for tree in (ours, exact)
    )
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


def run(function, cotangent, *arrays):
    """Returns the function's value and its gradients."""

    @jax.jit
    def forward_and_backward(cotangent, *arrays):
        out, pull = jax.vjp(function, *arrays)
        return out, pull(cotangent)

    return forward_and_backward(cotangent, *arrays)


def draw_attention(num_queries, num_keys, *, grid=None, batch_size=2, heads=3, head_dim=8, dtype=None):
    """Returns a cotangent, q, k, v and, of keys that lie in a grid, the two terms of a bias."""
    shapes = [(n, heads, head_dim) for n in (num_queries, num_queries, num_keys, num_keys)]
    shapes += [(heads, num_queries, length) for length in grid or ()]
    both = draw(batch_size, sum(map(math.prod, shapes)), dtype=dtype)
    arrays = jnp.split(both, np.cumsum([math.prod(shape) for shape in shapes])[:-1], axis=1)
    return [array.reshape(batch_size, *shape) for array, shape in zip(arrays, shapes, strict=True)]


def attend_by(kernel):
    return lambda q, k, v, *terms: attend(q, k, v, kernel=kernel, bias=tuple(terms) or None)


TOKENS = pytest.mark.parametrize(
    ("num_queries", "num_keys", "grid"),
    [
        (1, 35, None),  # a MAP head
        (1, 1, (1, 1)),
        (15, 15, (3, 5)),
        (16, 16, None),  # one chunk
        (17, 17, None),
        (35, 35, (5, 7)),
        (48, 48, (12, 4)),  # whole chunks
    ],
)


@TOKENS
def test_heads_one_after_another_give_what_all_at_once_give(double, monkeypatch, num_queries, num_keys, grid):
    arrays = draw_attention(num_queries, num_keys, grid=grid)
    at_once = run(attend_by("xla"), *arrays)
    monkeypatch.setattr(attention, "MANY_LOGITS", 1)
    assert "scan" in str(jax.make_jaxpr(attend_by("xla"))(*arrays[1:]))
    assert error(run(attend_by("xla"), *arrays), at_once) < 1e-12


def test_16_bits_are_multiplied_for_all_heads_at_once(monkeypatch):
    """Whose gradients are products of 16 bits, see test_16_bit_attention..., which one head alone does not have."""
    monkeypatch.setattr(attention, "MANY_LOGITS", 1)
    arrays = draw_attention(16, 16, dtype="bfloat16")
    assert "scan" not in str(jax.make_jaxpr(attend_by("xla"))(*arrays[1:]))


@TOKENS
def test_chunked_attention_is_exact_forward_and_backward(double, monkeypatch, num_queries, num_keys, grid):
    monkeypatch.setattr(attention, "QUERY_CHUNK", 16)
    arrays = draw_attention(num_queries, num_keys, grid=grid)
    ours, exact = (run(attend_by(kernel), *arrays) for kernel in ("chunked", "xla"))
    assert error(ours, exact) < 1e-12


@pytest.mark.parametrize(
    "model",
    [
        "vit_ti16:depth=1,image_size=80x112",
        "vit_ti16:depth=1,image_size=80x112,pool=map",
        "vitdet_ti16:depth=2,image_size=80x112,window_size=3,global_blocks=1",
    ],
)
def test_no_attention_computes_a_product_in_vain(backend, monkeypatch, model):
    monkeypatch.setattr(attention, "QUERY_CHUNK", 16)
    spec = vitcmp.get_spec(model)
    for kernel, many_logits in (("chunked", 10**6), ("chunked", 1), ("xla", 1)):
        monkeypatch.setattr(attention, "MANY_LOGITS", many_logits)
        assert count_flops(backend.build(spec, attention=kernel), spec) == vitcmp.count_flops(spec).total


def temporaries(function, *arrays) -> int:
    return jax.jit(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def test_chunked_attention_never_holds_all_logits_forward_or_backward():
    n, heads = 1025, 4
    arrays = [jax.ShapeDtypeStruct((1, n, heads, 16), jnp.float32)] * 3
    all_logits = 4 * heads * n * n
    forward = {kernel: temporaries(attend_by(kernel), *arrays) for kernel in ("chunked", "xla")}
    assert forward["chunked"] < all_logits / heads <= forward["xla"] <= all_logits / 2  # xla: of one head, on a CPU
    both = {kernel: temporaries(functools.partial(run, attend_by(kernel)), arrays[0], *arrays) for kernel in forward}
    assert both["chunked"] < all_logits / 2 < all_logits <= both["xla"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kernel", ["xla", "chunked"])
def test_the_gradient_in_16_bits_is_as_near_as_the_forward_pass(monkeypatch, kernel, dtype):
    """Each rounding adds u; forward rounds probabilities and output; a gradient those of dv, dp, ds and its own.

    So the gradients' error is at most sqrt(4 / 2) of the forward's, however many chunks are summed: that in float32.
    """
    monkeypatch.setattr(attention, "QUERY_CHUNK", 8)
    arrays = draw_attention(512, 512, heads=2, head_dim=64, dtype=dtype)
    ours, gradients = run(attend_by(kernel), *arrays)
    with jax.enable_x64(True):
        exact, exact_gradients = run(attend_by("xla"), *widen(arrays))
    rounding = 2 ** (-8 if dtype == "bfloat16" else -11)
    assert rounding / 4 < error(ours, exact) < rounding
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert error(gradient, exact_gradient) < 1.5 * error(ours, exact)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "grid"),
    [(130, 130, (10, 13)), (1, 64, None), (1, 128, None), (128, 128, None)],
)
def test_the_pallas_kernel_equals_xla_at_any_number_of_tokens(num_queries, num_keys, grid):
    """In the interpreter of TPU kernels, on the CPU; padded queries and keys have no part, and the bias is not scaled.

    16 is not 4: a head_dim whose root is not 1 shows a bias that the kernel has scaled with the logits.
    """
    from jax.experimental.pallas import tpu

    arrays = draw_attention(num_queries, num_keys, grid=grid, batch_size=1, heads=1, head_dim=16)
    exact = run(attend_by("xla"), *arrays)
    with tpu.force_tpu_interpret_mode():
        assert error(run(attend_by("pallas"), *arrays), exact) < 1e-6


@pytest.mark.parametrize(("num_queries", "num_keys"), [(4, 6), (5, 5), (1, 6), (1, 7)])
def test_the_cudnn_kernel_trains_at_odd_numbers_of_tokens(monkeypatch, num_queries, num_keys):
    """What is given to cuDNN, given to XLA: there is no GPU here. JAX refuses to train cuDNN's at odd numbers."""
    plain, lengths = jax.nn.dot_product_attention, []

    def attend_by_xla(q, k, v, *, implementation, **masks):
        lengths.append((q.shape[1], k.shape[1]))
        return plain(q, k, v, implementation="xla", **masks)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend_by_xla)
    arrays = draw_attention(num_queries, num_keys)
    assert error(run(attend_by("cudnn"), *arrays), run(attend_by("xla"), *arrays)) < 1e-6
    assert lengths == [(num_queries + num_queries % 2, num_keys + num_keys % 2)]
    attend_by("cudnn")(*arrays[1:])
    assert lengths[1:] == [(num_queries, num_keys)]


CONVOLUTIONS = [  # map, kernel (h w in out), stride, padding, groups
    ((1, 1), (7, 7, 1, 6), 1, 3, 6),
    ((1, 5), (7, 7, 1, 6), 1, 3, 6),
    ((7, 4), (7, 7, 1, 6), 1, 3, 6),
    ((10, 13), (3, 3, 1, 6), 1, 1, 6),
    ((10, 13), (7, 7, 1, 6), 1, 2, 6),  # the map shrinks: XLA's own
    ((10, 13), (7, 7, 1, 6), 2, 3, 6),
    ((10, 13), (3, 3, 1, 12), 1, 1, 6),  # two outputs a channel
    ((10, 13), (3, 3, 2, 6), 1, 1, 3),
    ((10, 13), (1, 1, 6, 5), 1, 0, 1),
    ((10, 13), (1, 1, 6, 5), 2, 0, 1),
    ((10, 13), (1, 1, 6, 5), 2, 1, 1),
    ((2, 2), (3, 3, 6, 5), 1, 1, 1),
    ((2, 3), (3, 3, 6, 5), 2, 1, 1),
    ((3, 2), (7, 7, 6, 5), 2, 3, 1),
    ((10, 13), (3, 3, 6, 5), 2, 1, 1),
]


@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "groups"), CONVOLUTIONS)
def test_an_expanded_convolution_is_exact_forward_and_backward(double, size, kernel, stride, padding, groups):
    options = {"stride": stride, "padding": padding, "groups": groups}
    x, kernel = draw(2, *size, 6), draw(*kernel)
    cotangent = draw(*convolve_native(x, kernel, **options).shape)
    ours, exact = (
        run(functools.partial(convolve, **options), cotangent, x, kernel)
        for convolve in (convolve_expanded, convolve_native)
    )
    assert error(ours, exact) < 1e-12


def test_what_is_expanded_is_what_xla_is_slow_at():
    """No convolution is left of those: XLA would take the kernel for the input, or loop over each channel."""
    is_native = []
    for size, kernel, stride, padding, groups in CONVOLUTIONS:
        options = {"stride": stride, "padding": padding, "groups": groups}
        text = str(
            jax.make_jaxpr(lambda x, k, o=options: convolve_expanded(x, k, **o))(draw(2, *size, 6), draw(*kernel))
        )
        is_native.append("conv_general_dilated" in text)
    assert is_native == [False] * 4 + [True] * 4 + [False] * 2 + [True] + [False] * 3 + [True]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_depthwise_sum_in_16_bits_is_rounded_once(dtype):
    """49 products summed in 16 bits would be 4 times as far off."""
    arrays = [draw(*shape, dtype=dtype) for shape in ((1, 11, 13, 8), (1, 11, 13, 8), (7, 7, 1, 8))]
    options = {"stride": 1, "padding": 3, "groups": 8}
    ours = run(functools.partial(convolve_expanded, **options), *arrays)
    with jax.enable_x64(True):
        exact = run(functools.partial(convolve_native, **options), *widen(arrays))
    assert error(ours, exact) < 2 ** (-9 if dtype == "bfloat16" else -12)


def test_the_gradient_of_a_depthwise_kernel_is_as_good_over_many_positions():
    """In float32 each addition errs by up to u = 6e-8 of the sum so far, and n in a row, which mostly cancel, by
    sqrt(n) u / 2: 5e-6 for these 32,768 positions; 64 of a row and then 512 rows 7e-7.
    """
    arrays = [draw(8, 64, 64, 2) for _ in range(2)] + [draw(7, 7, 1, 2)]
    options = {"stride": 1, "padding": 3, "groups": 2}
    gradient = run(functools.partial(convolve_expanded, **options), *arrays)[1][1]
    with jax.enable_x64(True):
        exact = run(functools.partial(convolve_expanded, **options), *widen(arrays))[1][1]
    assert error(gradient, exact) < 1e-6


@pytest.mark.parametrize("model", [CONVNEXT, RESNET])
def test_a_model_on_a_cpu_is_expanded_and_equals_the_native_one(backend, model):
    images = np.random.default_rng(0).uniform(-1, 1, (2, *vitcmp.get_spec(model).image_size, 3))
    assert backend.convolution == "expanded"
    outputs, counts = {}, {}
    for backend.convolution in ("expanded", "native"):
        with backend.numerics("float64") as effective:
            assert effective["convolution"] == backend.convolution
            built = backend.build(vitcmp.get_spec(model))
            loaded = backend.load(built, vitcmp.init_weights(model), numerics="float64")
            outputs[backend.convolution] = backend.outputs(loaded, images)
            graph, state = jax.tree.flatten(loaded)[1], jax.tree.leaves(loaded)
            jaxpr = jax.make_jaxpr(lambda state, x, g=graph: jax.tree.unflatten(g, state)(x))(state, images)
            counts[backend.convolution] = str(jaxpr).count("conv_general_dilated[")
        assert backend.count_flops(vitcmp.get_spec(model)) == vitcmp.count_flops(model).total
    assert counts["expanded"] < counts["native"]
    assert error(outputs["expanded"], outputs["native"]) < 1e-12


def test_a_depthwise_convolution_has_no_matmul_to_count_once_expanded():
    """Which is why FLOPs are counted in the native form."""
    jaxpr = jax.make_jaxpr(lambda x, k: convolve_expanded(x, k, stride=1, padding=3, groups=8))
    assert count_jaxpr_flops(jaxpr(draw(1, 10, 13, 8), draw(7, 7, 1, 8))) == 0


@pytest.mark.parametrize("kind", ["erf", "tanh"])
def test_gelu_is_computed_wide_and_rounded_once(kind):
    x = draw(4, 257, dtype="bfloat16")
    with jax.enable_x64(True):
        exact = jax.nn.gelu(widen([x])[0], approximate=kind == "tanh")
        assert error(layers.gelu(widen([x])[0], kind), exact) < 1e-15
    rounded = np.asarray(exact).astype(jnp.bfloat16)
    assert (np.asarray(layers.gelu(x, kind)) == rounded).mean() > 0.99  # the rest are ties, but for float32


@pytest.mark.parametrize("kernel", ["xla", "chunked"])
def test_float16_does_not_overflow_where_many_tokens_attend_alike(kernel):
    q, v = jnp.zeros((1, 1025, 1, 8), jnp.float16), jnp.full((1, 1025, 1, 8), 100, jnp.float16)  # 102,500 in sum
    np.testing.assert_allclose(np.asarray(attend(q, q, v, kernel=kernel)), 100, rtol=2e-3)
