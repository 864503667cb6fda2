"""vitcmp compares vision backbones across JAX and PyTorch: the same models, the same weights, one sweep."""

from vitcmp.api import forward, make_step
from vitcmp.backend import Unsupported
from vitcmp.checkpoints import load_weights, save_weights
from vitcmp.compare import compare
from vitcmp.flops import count_flops
from vitcmp.params import count_params, expected_shapes, init_weights
from vitcmp.specs import get_spec
from vitcmp.timing import PairRule

__version__ = "0.1.0"
__all__ = [
    "PairRule",
    "Unsupported",
    "compare",
    "count_flops",
    "count_params",
    "expected_shapes",
    "forward",
    "get_spec",
    "init_weights",
    "load_weights",
    "make_step",
    "save_weights",
]
