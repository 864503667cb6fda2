"""The bytes that a step must move, against those that XLA says its program does."""

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("flax")

import vitcmp
from vitcmp.backend import load_backend
from vitcmp.specs import get_spec
from vitcmp.traffic import count_traffic

MODELS = [
    "vit_ti16:depth=1,image_size=160x224",
    "vitdet_ti16:depth=1,global_blocks=0,image_size=160x224,window_size=7",
    "resnet18:depths=1+1",
]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_xla_moves_no_less_and_not_much_more(model, mode):
    """XLA adds up what each of its fusions reads and writes: 1.4 to 5.6 times the bound where this was written.

    It has the n x n logits, what it does not fuse, and copies; on a CPU, with convolutions in other forms.
    """
    spec, backend = get_spec(model), load_backend("jax", platform="cpu")
    images = np.zeros((2, *spec.image_size, 3), np.float32)
    with backend.numerics("float32"):
        built = backend.load(backend.build(spec), vitcmp.init_weights(spec), numerics="float32")
        step = backend.compile(built, images, np.zeros(2, np.int64), mode=mode, compile="jit")
    moved = step.compiled.cost_analysis()["bytes accessed"]
    assert 1 <= moved / count_traffic(spec, batch_size=2, numerics="float32", mode=mode) < 8
