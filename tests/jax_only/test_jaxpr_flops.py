"""The walk over the jaxpr, on functions whose FLOPs are plain."""

import pytest

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")

MATRIX = (8, 8)
MATMUL = 2 * 8**3


def count(function, *shapes):
    from jax_models.flops import count_jaxpr_flops

    return count_jaxpr_flops(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)))


def convolve(x, kernel, **options):
    options = {"window_strides": (1, 1), "padding": "VALID", "dimension_numbers": ("NHWC", "HWIO", "NHWC")} | options
    return jax.lax.conv_general_dilated(x, kernel, **options)


@pytest.mark.parametrize(
    ("einsum", "shapes", "multiply_adds"),
    [
        ("ij,jk->ik", [(2, 3), (3, 5)], 2 * 3 * 5),
        ("bij,bjk->bik", [(7, 2, 3), (7, 3, 5)], 7 * 2 * 3 * 5),
        ("bnke,bmke->bknm", [(2, 4, 3, 6), (2, 5, 3, 6)], 2 * 3 * 4 * 5 * 6),
        ("ij,ij->", [(2, 3), (2, 3)], 2 * 3),
        ("ij,kl->ijkl", [(2, 3), (4, 5)], 2 * 3 * 4 * 5),
        ("ij,jk->ik", [(2, 0), (0, 5)], 0),
    ],
)
def test_a_dot_counts_its_batch_and_both_sizes_and_what_it_contracts(einsum, shapes, multiply_adds):
    assert count(lambda a, b: jnp.einsum(einsum, a, b), *shapes) == 2 * multiply_adds


@pytest.mark.parametrize(
    ("kernel", "options", "multiply_adds"),
    [
        ((3, 2, 4, 6), {}, 2 * (7 * 8) * 6 * (3 * 2 * 4)),
        ((3, 2, 4, 6), {"window_strides": (2, 3)}, 2 * (4 * 3) * 6 * (3 * 2 * 4)),
        ((3, 3, 4, 6), {"padding": ((1, 1), (1, 1))}, 2 * (9 * 9) * 6 * (3 * 3 * 4)),  # with the taps on the padding
        ((3, 3, 2, 6), {"feature_group_count": 2}, 2 * (7 * 7) * 6 * (3 * 3 * 2)),
        ((3, 3, 1, 4), {"feature_group_count": 4}, 2 * (7 * 7) * 4 * (3 * 3)),  # depthwise
        ((3, 3, 4, 6), {"rhs_dilation": (2, 1)}, 2 * (5 * 7) * 6 * (3 * 3 * 4)),  # the holes in the kernel are no taps
        (
            (2, 2, 4, 6),
            {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))},
            2 * (9 * 9) * 6 * (2 * 2 * 4),
        ),  # nor those
    ],
)
def test_a_convolution_counts_its_outputs_times_its_taps(kernel, options, multiply_adds):
    assert count(lambda x, k: convolve(x, k, **options), (2, 9, 9, 4), kernel) == 2 * multiply_adds


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("kernel_size", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0), (7, 2, 3), (2, 2, 0)])
def test_each_gradient_of_a_convolution_costs_what_the_convolution_does(kernel_size, stride, padding, groups):
    def total(x, kernel):
        pads = ((padding, padding), (padding, padding))
        return convolve(x, kernel, window_strides=(stride, stride), padding=pads, feature_group_count=groups).sum()

    shapes = (2, 13, 10, 4), (kernel_size, kernel_size, 4 // groups, 8)
    assert count(jax.value_and_grad(total, argnums=(0, 1)), *shapes) == 3 * count(total, *shapes)


def test_a_scan_counts_as_often_as_it_runs():
    assert count(lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, length=5)[0], MATRIX) == 5 * MATMUL
    assert count(lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, length=0)[0], MATRIX) == 0


def test_scans_within_scans_multiply():
    def inner(c, _):
        return jax.lax.scan(lambda d, _: (d @ d, None), c, length=3)[0], None

    assert count(lambda a: jax.lax.scan(inner, a, length=4)[0] @ a, MATRIX) == (3 * 4 + 1) * MATMUL


def test_a_loop_of_a_fixed_number_of_rounds_counts_as_often_as_it_runs():
    assert count(lambda a: jax.lax.fori_loop(0, 6, lambda _, c: c @ a, a), MATRIX) == 6 * MATMUL


def test_a_cond_counts_its_dearest_branch():
    def branch(p, a):
        return jax.lax.cond(p > 0, lambda a: a @ a @ a, lambda a: a @ a, a)

    assert count(branch, (), MATRIX) == 2 * MATMUL


def test_a_switch_counts_its_dearest_branch():
    def branch(p, a):
        return jax.lax.switch(p.astype(int), [lambda a: a, lambda a: a @ a, lambda a: a + 1], a)

    assert count(branch, (), MATRIX) == MATMUL


@jax.custom_jvp
def custom_jvp(a):
    return a @ a


custom_jvp.defjvp(lambda primals, tangents: (primals[0] @ primals[0], tangents[0] @ primals[0]))


@jax.custom_vjp
def custom_vjp(a):
    return a @ a


custom_vjp.defvjp(lambda a: (a @ a, a), lambda a, g: (g @ a,))


@pytest.mark.parametrize(
    "wrapped",
    [
        jax.jit(lambda a: a @ a),
        jax.jit(jax.jit(lambda a: a @ a)),
        jax.checkpoint(lambda a: a @ a),
        custom_jvp,
        custom_vjp,
    ],
)
def test_a_matmul_counts_once_in_whatever_it_is_wrapped(wrapped):
    assert count(lambda a: jax.nn.gelu(wrapped(a)), MATRIX) == MATMUL


def test_what_is_recomputed_is_counted_as_often_as_it_runs():
    def loss(a):
        return jax.checkpoint(lambda a: jnp.sin(a @ a) @ a)(a).sum()

    # Forward two; backward one again, for the sine's argument, and two for each.
    assert count(jax.grad(loss), MATRIX) == (2 + 1 + 4) * MATMUL


def test_nothing_but_matmuls_and_convolutions_counts():
    def rest(x):
        pooled = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        return jax.nn.softmax(jax.nn.gelu(pooled)).mean() + jnp.cumsum(jnp.sort(x))[0]

    assert count(rest, (2, 9, 9, 4)) == 0


def test_matmuls_in_a_while_loop_are_refused():
    def loop(a):
        return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ a, a)

    with pytest.raises(ValueError, match="a while loop runs matmuls a number of times"):
        count(loop, MATRIX)


def test_a_while_loop_without_matmuls_costs_nothing():
    assert count(lambda a: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, a) @ a, MATRIX) == MATMUL


def test_a_kernel_whose_matmuls_are_out_of_sight_is_refused():
    from jax.experimental import pallas

    def kernel(a, out):
        out[...] = a[...] @ a[...]

    def matmul(a):
        return pallas.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(MATRIX, jnp.float32), interpret=True)(a)

    with pytest.raises(ValueError, match="pallas_call are not in the jaxpr"):
        count(matmul, MATRIX)
