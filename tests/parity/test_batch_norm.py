"""BatchNorm against torch's own nn.BatchNorm2d: outputs, gradients and running statistics, in both modes."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

import jax.numpy as jnp
from flax import nnx

import jax_models.layers
import torch_models.layers
from tests.parity.helpers import Arrays, relative_error, worst_error

BOUND = 1e-9  # float64
EPS, MOMENTUM, DIM = 1e-5, 0.1, 4
SHAPES = [(2, 1, 1, DIM), (1, 1, 2, DIM), (3, 5, 7, DIM)]


def draw_case(shape: tuple[int, ...], dtype: str = "float64") -> Arrays:
    """Draws activations, the gradient of the output and the layer's arrays, all exact in `dtype`."""
    rng = np.random.default_rng(0)
    case = {"x": 3 + 2 * rng.standard_normal(shape), "cotangent": rng.standard_normal(shape)}
    case |= {"scale": 1 + 0.3 * rng.standard_normal(DIM), "bias": 0.3 * rng.standard_normal(DIM)}
    case |= {"mean": 1 + rng.standard_normal(DIM), "var": np.exp(rng.standard_normal(DIM))}
    rounded = {name: torch.from_numpy(array).to(getattr(torch, dtype)) for name, array in case.items()}
    return {name: array.double().numpy() for name, array in rounded.items()}


def fill(norm: torch.nn.Module, case: Arrays) -> torch.nn.Module:
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    norm.load_state_dict({name: torch.from_numpy(case[leaf]) for name, leaf in names.items()}, strict=False)
    return norm


def run_torch(norm: torch.nn.Module, case: Arrays, *, is_training: bool, dtypes=("float64", "float64")) -> Arrays:
    """Returns the output, every gradient and the running statistics; dtypes: of the parameters and of x."""
    param_dtype, x_dtype = (getattr(torch, dtype) for dtype in dtypes)
    norm = fill(norm.double(), case).to(param_dtype).train(is_training)
    x = torch.from_numpy(case["x"].transpose(0, 3, 1, 2).copy()).to(x_dtype).requires_grad_()
    y = norm(x)
    y.backward(torch.from_numpy(case["cotangent"].transpose(0, 3, 1, 2).copy()).to(y.dtype))
    assert y.dtype == x_dtype
    arrays = {"y": y.permute(0, 2, 3, 1), "d_x": x.grad.permute(0, 2, 3, 1), "d_scale": norm.weight.grad}
    arrays |= {"d_bias": norm.bias.grad, "mean": norm.running_mean, "var": norm.running_var}
    return {name: array.detach().double().numpy() for name, array in arrays.items()}


def run_jax(case: Arrays, *, is_training: bool, dtypes=("float64", "float64"), momentum=MOMENTUM) -> Arrays:
    with jax.enable_x64(True):
        norm = jax_models.layers.BatchNorm(DIM, eps=EPS, momentum=momentum)
        for leaf in ("scale", "bias", "mean", "var"):
            getattr(norm, leaf)[...] = jnp.asarray(case[leaf], dtypes[0])
        norm.train() if is_training else norm.eval()
        graph, params, statistics = nnx.split(norm, nnx.Param, nnx.BatchStat)
        x, cotangent = (jnp.asarray(case[name], dtypes[1]) for name in ("x", "cotangent"))

        def apply(params, x):
            norm = nnx.merge(graph, params, statistics, copy=True)
            return norm(x), nnx.state(norm, nnx.BatchStat)

        y, pull, kept = jax.vjp(apply, params, x, has_aux=True)
        d_params, d_x = pull(cotangent)
        assert y.dtype == x.dtype
        arrays = {"y": y, "d_x": d_x, "d_scale": d_params["scale"][...], "d_bias": d_params["bias"][...]}
        arrays |= {"mean": kept["mean"][...], "var": kept["var"][...]}
        return {name: np.asarray(array, np.float64) for name, array in arrays.items()}


def reference(case: Arrays, *, is_training: bool) -> Arrays:
    return run_torch(torch.nn.BatchNorm2d(DIM, eps=EPS, momentum=MOMENTUM), case, is_training=is_training)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
def test_both_equal_torchs_own_layer(shape, is_training):
    case = draw_case(shape)
    theirs = reference(case, is_training=is_training)
    ours = torch_models.layers.BatchNorm(DIM, eps=EPS, momentum=MOMENTUM)
    assert worst_error(run_torch(ours, case, is_training=is_training), theirs) < BOUND
    assert worst_error(run_jax(case, is_training=is_training), theirs) < BOUND
    assert (relative_error(theirs["mean"], case["mean"]) > 1e-3) == is_training


def test_the_biased_variance_and_the_other_momentum_convention_are_told_apart(monkeypatch):
    case = draw_case((3, 5, 7, DIM))
    theirs = reference(case, is_training=True)
    assert relative_error(run_jax(case, is_training=True, momentum=1 - MOMENTUM)["mean"], theirs["mean"]) > 1e-3
    keep = jax_models.layers.BatchNorm._keep
    n = 3 * 5 * 7
    monkeypatch.setattr(
        jax_models.layers.BatchNorm,
        "_keep",
        lambda self, mean, var, num_values: keep(self, mean, var * (n - 1) / n, num_values=n),
    )
    assert relative_error(run_jax(case, is_training=True)["var"], theirs["var"]) > 1e-4


@pytest.mark.parametrize("dtypes", [(param, x) for x in ("bfloat16", "float16") for param in ("float32", x)], ids=str)
@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
def test_sixteen_bit_activations_lose_one_rounding(dtypes, is_training):
    """Outputs are computed in float32 and rounded once: half an ulp, plus float32's own error of a sum of 105 terms.

    Half an ulp is eps / 2 of the largest value; 105 additions of float32 stay below 105 x 2^-24 = 6e-6, and subtracting
    a mean three times as large as the rest leaves less than 5 times that. The same holds for the statistics.
    """
    case = draw_case((3, 5, 7, DIM), dtypes[1])
    theirs = reference(case, is_training=is_training)
    bound = torch.finfo(getattr(torch, dtypes[1])).eps / 2 + 3e-5
    ours = torch_models.layers.BatchNorm(DIM, eps=EPS, momentum=MOMENTUM)
    for out in (
        run_torch(ours, case, is_training=is_training, dtypes=dtypes),
        run_jax(case, is_training=is_training, dtypes=dtypes),
    ):
        assert {name: relative_error(out[name], theirs[name]) < bound for name in ("y", "mean", "var")} == {
            "y": True, "mean": True, "var": True
        }  # fmt: skip


def test_one_value_per_channel_is_refused_in_training_and_taken_in_evaluation():
    case = draw_case((1, 1, 1, DIM))
    for run in (
        lambda **kwargs: run_jax(case, **kwargs),
        lambda **kwargs: run_torch(torch_models.layers.BatchNorm(DIM, eps=EPS, momentum=MOMENTUM), case, **kwargs),
    ):
        with pytest.raises(ValueError, match=r"[Ee]xpected more than 1 value per channel when training"):
            run(is_training=True)
        assert worst_error(run(is_training=False), reference(case, is_training=False)) < BOUND
