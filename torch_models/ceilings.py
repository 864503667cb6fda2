"""A large matmul and a large copy, for vitcmp.ceilings to time."""

from collections.abc import Callable

import numpy as np
import torch


def make_matmul(side: int, *, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Returns a call that multiplies a matrix by itself and returns when the device is idle.

    Of noise: on constants a GPU draws less power, and clocks higher than it does on any model.
    """
    noise = np.random.default_rng(0).standard_normal((256, 256), dtype=np.float32)
    a = torch.from_numpy(np.tile(noise, (side // 256, side // 256))).to(device, dtype)
    out = torch.empty_like(a)

    def call() -> None:
        torch.matmul(a, a, out=out)
        _wait(device)

    return call


def make_copy(num_bytes: int, *, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Returns a call that copies an array of `num_bytes` and returns when the device is idle."""
    source = torch.ones(num_bytes // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)

    def call() -> None:
        target.copy_(source)
        _wait(device)

    return call


# torch: a call on a GPU returns when its kernel is queued; jax: an array can be waited for
def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
