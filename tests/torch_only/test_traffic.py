"""The arrays behind vitcmp.traffic against those that torch's own operators are given."""

import math

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode

from torch_models.flops import run_on_meta
from vitcmp.backend import load_backend
from vitcmp.products import list_products
from vitcmp.specs import get_spec

# Not bit_v1, which pads its maps in copies of their own: its walk is that of bit.
MODELS = [
    "vit_ti16:depth=2,image_size=79x95",
    "vit_ti16:depth=1,pool=map,rep_size=true,image_size=64x96",
    "vitdet_ti16:depth=2,global_blocks=1,window_size=3,rel_pos=off,neck_dim=64,image_size=80x176",
    "resnet18:image_size=63x95",
    "resnet50:image_size=64x96",
    "bit_r26x1:image_size=63x95",
    "convnext_atto:image_size=67x99",
]


class Arrays(TorchDispatchMode):
    """Keeps (inputs, weights, outputs) of every product that runs: how many values each array has."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.logits = [], None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm"):
            x, weight = args[-2:]
            self.products.append((x.numel(), weight.numel(), out.numel()))
        elif name == "convolution":
            self.products.append((self.covered(args[0], args[1], out), args[1].numel(), out.numel()))
        elif name == "bmm":
            self.attention(*args, out)
        return out

    @staticmethod
    def covered(x, weight, out):
        sides = zip(x.shape[2:], out.shape[2:], weight.shape[2:], strict=True)
        return x.shape[1] * math.prod(min(side, place * kernel) for side, place, kernel in sides)

    def attention(self, a, b, out):
        """Of the two matmuls of an attention: q and k of the first, v and the output of the second."""
        if self.logits is None:
            self.logits = a.numel() + b.numel()
        else:
            self.products.append((self.logits + b.numel(), 0, out.numel()))
            self.logits = None


@pytest.mark.parametrize("model", MODELS)
def test_the_arrays_are_those_that_torchs_operators_read_and_write(model):
    spec = get_spec(model)
    built = load_backend("torch", platform="cpu").build(spec)
    with Arrays() as arrays:
        run_on_meta(built, spec.image_size)
    counted = [(product.inputs, product.weights, product.outputs) for product in list_products(spec)]
    assert sorted(arrays.products) == sorted(counted)
