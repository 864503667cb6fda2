# torch: has more than one library for a matmul on a CPU, and XLA has its own
"""Which library multiplies matrices on the CPU: chosen by its measured error, named by what it prints of itself."""

import contextlib
import ctypes
import functools
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn


def prefer_onednn() -> dict[str, float]:
    """Sends the CPU's float32 matmuls to oneDNN where its error there is float32's; elsewhere they stay with the BLAS.

    The BLAS of torch's packages is MKL, which takes twice oneDNN's time on AMD (experiments/LOG.md). The name for it is
    `medium`, which lets oneDNN compute in bfloat16, as it does on CPUs with AMX: so its measured error decides. (The
    newer torch.backends.mkldnn.matmul.fp32_precision reads as a mixture to torch's own compiler, which then raises.)
    Returns both errors.
    """
    errors = {}
    for name in ("highest", "medium"):
        torch.set_float32_matmul_precision(name)
        errors[f"{name}_float32_error"] = measure_float32_error()
    if errors["medium_float32_error"] > min(4 * errors["highest_float32_error"], 1e-5):
        torch.set_float32_matmul_precision("highest")
    return errors


def measure_float32_error() -> float:
    """Returns the greatest relative error of a linear layer, of its gradients' matmuls and of a batched matmul."""
    rng = np.random.default_rng(0)
    x, weight, dy = (torch.from_numpy(rng.standard_normal(n)).float() for n in ((197, 512), (256, 512), (197, 256)))
    q, k = (torch.from_numpy(rng.standard_normal((6, 197, 64))).float() for _ in range(2))
    products = (x, weight.T), (dy, weight), (dy.T, x), (q, k.transpose(1, 2))
    return max(relative_error(a @ b, a.double() @ b.double()) for a, b in products)


@functools.cache
def find_matmul_library(dtype: torch.dtype, precision: str) -> str | None:
    """Returns which library runs a linear layer on the CPU, by what each prints of itself; None where none does.

    `precision` is float32's at the time of the call: it is here because the answer is kept.
    """
    x, weight, bias = (torch.ones(shape, dtype=dtype) for shape in ((197, 512), (256, 512), (256,)))
    with contextlib.ExitStack() as stack:
        for library in (torch.backends.mkldnn, torch.backends.mkl):
            if library.is_available():
                stack.enter_context(library.verbose(library.VERBOSE_ON))
        printed = _printed(lambda: nn.functional.linear(x, weight, bias))
    if "onednn_verbose" in printed and ",matmul," in printed:
        return "oneDNN"
    return "MKL" if "MKL_VERBOSE" in printed else None


def _printed(call: Callable[[], Any]) -> str:
    """Returns what C code writes to standard output during the call; nothing where there is no standard output."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    try:
        kept = os.dup(1)
    except OSError:
        return ""
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            call()
            libc.fflush(None)
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        return file.read().decode(errors="replace")


def relative_error(approximate: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns the norm of the difference over the norm of what is exact."""
    return float((approximate.cpu().double() - exact).norm() / exact.norm())
