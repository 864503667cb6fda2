"""The large matmul and copy are what their names say, in each numerics of the CPU, and their rates are plausible."""

import pytest

torch = pytest.importorskip("torch")

from torch_models.ceilings import make_copy, make_matmul
from vitcmp.backend import NUMERICS, load_backend
from vitcmp.ceilings import measure_copy, measure_matmul

CPU_NUMERICS = [name for name in NUMERICS if name != "tensorfloat32"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("numerics", CPU_NUMERICS)
def test_calls_run_in_the_numerics_own_dtype(numerics):
    backend = load_backend("torch", platform="cpu")
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen.append((str(function), getattr(out, "dtype", None), getattr(out, "shape", None)))
            return out

    with backend.numerics(numerics):
        calls = backend.make_matmul(256, numerics=numerics), backend.make_copy(2**20, numerics=numerics)
        with Watch():
            for call in calls:
                call()
    dtype = getattr(torch, NUMERICS[numerics][1])
    assert seen == [
        ("aten.mm.out", dtype, (256, 256)),
        ("aten.copy_.default", dtype, (2**20 // dtype.itemsize,)),
    ]


def test_the_matrix_is_noise_that_no_dtype_overflows_on():
    call = make_matmul(8192 // 8, dtype=torch.float16, device=CPU)
    cells = dict(zip(call.__code__.co_freevars, (cell.cell_contents for cell in call.__closure__), strict=True))
    call()
    assert cells["out"].isfinite().all() and cells["a"].float().std() == pytest.approx(1, abs=0.02)
    assert cells["a"].unique().numel() > 1000


def test_a_copy_moves_every_value():
    call = make_copy(4096, dtype=torch.float32, device=CPU)
    cells = dict(zip(call.__code__.co_freevars, (cell.cell_contents for cell in call.__closure__), strict=True))
    cells["target"].zero_()
    call()
    assert cells["target"].nbytes == 4096 and (cells["target"] == 1).all()


@pytest.mark.slow
def test_the_ceilings_of_this_cpu_are_measured():
    backend = load_backend("torch", platform="cpu")
    with backend.numerics("float32"):
        matmul, copy = measure_matmul(backend, "float32"), measure_copy(backend, "float32")
    assert 1e8 < matmul.rate < 1e15 and "matmul, best of" in matmul.how
    assert 1e7 < copy.rate < 1e13 and "copy of" in copy.how
