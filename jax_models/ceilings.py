"""A large matmul and a large copy, for vitcmp.ceilings to time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def make_matmul(side: int, *, dtype: jnp.dtype, device: jax.Device) -> Callable[[], None]:
    """Returns a call that multiplies a matrix by itself and returns when the device is idle.

    Of noise: on constants a GPU draws less power, and clocks higher than it does on any model.
    """
    noise = np.random.default_rng(0).standard_normal((256, 256), dtype=np.float32)
    a = jax.device_put(np.tile(noise, (side // 256, side // 256)).astype(dtype), device)
    out = jnp.empty_like(a)
    multiply = _into(lambda a: a @ a)

    def call() -> None:
        nonlocal out
        out = multiply(out, a)
        out.block_until_ready()

    return call


def make_copy(num_bytes: int, *, dtype: jnp.dtype, device: jax.Device) -> Callable[[], None]:
    """Returns a call that copies an array of `num_bytes` and returns when the device is idle."""
    source = jnp.ones(num_bytes // dtype.itemsize, dtype, device=device)
    target = jnp.empty_like(source)
    copy = _into(jnp.copy)

    def call() -> None:
        nonlocal target
        target = copy(target, source)
        target.block_until_ready()

    return call


# jax: an array is written in place by donating it; new memory from Linux makes a copy 7 times as slow (1.6 for 12 GB/s)
def _into(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Compiles `function` so that its result is written into the first argument."""
    return jax.jit(lambda out, x: function(x), donate_argnums=0, keep_unused=True)
