"""The large matmul and copy are what their names say, in each numerics of the CPU, and their rates are plausible."""

import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp
import numpy as np

from vitcmp.backend import NUMERICS, load_backend
from vitcmp.ceilings import measure_copy, measure_matmul

CPU_NUMERICS = [name for name in NUMERICS if name != "tensorfloat32"]


@pytest.mark.parametrize("numerics", CPU_NUMERICS)
def test_calls_run_in_the_numerics_own_dtype_and_precision(numerics, monkeypatch):
    """By what is handed to XLA: a dot of that dtype at the precision of the numerics, and a copy of as many bytes."""
    backend, traced = load_backend("jax", platform="cpu"), []
    jit = jax.jit

    def watch(function, **options):
        compiled = jit(function, **options)

        def run(*arrays):
            traced.append((jax.make_jaxpr(function)(*arrays), arrays[-1].nbytes))
            return compiled(*arrays)

        return run

    with backend.numerics(numerics) as effective:
        monkeypatch.setattr(jax, "jit", watch)
        backend.make_matmul(256, numerics=numerics)()
        backend.make_copy(2**20, numerics=numerics)()
        monkeypatch.undo()
    (matmul, _), (copy, num_bytes) = traced
    dtype = jnp.dtype(NUMERICS[numerics][1])
    (dot,) = (equation for equation in matmul.eqns if equation.primitive.name == "dot_general")
    assert dot.outvars[0].aval.dtype == dtype and dot.outvars[0].aval.shape == (256, 256)
    assert {str(precision) for precision in dot.params["precision"]} == {
        effective["jax_default_matmul_precision"].upper()
    }
    assert copy.out_avals[0].dtype == dtype and num_bytes == 2**20


def test_a_matmul_of_noise_is_finite_in_every_numerics():
    noise = np.random.default_rng(0).standard_normal((256, 256), dtype=np.float32)
    assert 32 * np.abs(noise @ noise).max() < np.finfo(np.float16).max  # at the largest side, 32 blocks are added


@pytest.mark.slow
def test_the_ceilings_of_this_cpu_are_measured():
    backend = load_backend("jax", platform="cpu")
    with backend.numerics("float32"):
        matmul, copy = measure_matmul(backend, "float32"), measure_copy(backend, "float32")
    assert 1e8 < matmul.rate < 1e15 and "matmul, best of" in matmul.how
    assert 1e7 < copy.rate < 1e13 and "copy of" in copy.how
