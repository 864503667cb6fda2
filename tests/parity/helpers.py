"""What the parity tests share: an error measure, runs of our models and timm's, timm's weights under canonical names.

The names are written apart from `vitcmp/checkpoints.py` on purpose: two readings of timm's layout that must agree.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

import vitcmp
from vitcmp.backend import load_backend
from vitcmp.specs import Spec

Arrays = dict[str, np.ndarray]


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """Returns max |a - b| / max |b|; raises where the shapes differ, so that nothing is broadcast unseen."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if a.shape != b.shape:
        raise ValueError(f"shapes {a.shape} and {b.shape} differ")
    return float(np.abs(a - b).max() / np.abs(b).max())


def worst_error(ours: Arrays, theirs: Arrays) -> float:
    """Compares every array that `theirs` has."""
    return max(relative_error(ours[name], theirs[name]) for name in theirs)


def draw_images(image_size: tuple[int, int], *, batch_size: int = 2) -> np.ndarray:
    """Draws (b h w 3) in [-1, 1] that float32 holds exactly."""
    images = np.random.default_rng(1).uniform(-1, 1, (batch_size, *image_size, 3))
    return images.astype(np.float32).astype(np.float64)


def run(backend: str, spec: Spec | str, weights: Arrays, images: np.ndarray, *, numerics: str = "float64") -> Arrays:
    """Returns our model's named outputs, on the CPU."""
    return vitcmp.forward(backend, spec, weights, images, numerics=numerics, device="cpu")


def run_timm(model: nn.Module, images: np.ndarray, names: dict[str, str]) -> Arrays:
    """Returns a timm model's logits, and the outputs of its modules under our names (by module path); maps are NHWC."""
    out = {}

    def keep(path: str, x: torch.Tensor) -> None:
        out[names[path]] = (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).numpy().copy()

    hooks = [
        model.get_submodule(path).register_forward_hook(lambda module, args, x, path=path: keep(path, x))
        for path in names
    ]
    with torch.inference_mode():
        out["logits"] = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    for hook in hooks:
        hook.remove()
    return out


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Makes the model float64, in evaluation mode, and fills it so that no layer is without effect."""
    rng = np.random.default_rng(seed)
    model = model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            for name, param in module.named_parameters(recurse=False):
                noise = _spread(module, name) * rng.standard_normal(param.shape)
                param.copy_(torch.from_numpy(_centre(module, name) + noise))
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.from_numpy(0.1 * rng.standard_normal(module.num_features)))
                module.running_var.copy_(torch.from_numpy(np.exp(0.2 * rng.standard_normal(module.num_features))))
    return model


def model_shapes(backend: str, spec: Spec) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each of our model's arrays, canonically named and laid out; takes no memory for them."""
    model = load_backend(backend, platform="cpu").build(spec)
    if backend == "jax":
        from flax import nnx  # here, because torch and timm alone can run some of the tests

        return {"/".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model))}
    return {name: x.shape for name, x in canonical(model, lambda tensor: np.broadcast_to(0.0, tensor.shape)).items()}


def canonical(model: nn.Module, to_numpy: Callable[[torch.Tensor], np.ndarray]) -> Arrays:
    """Returns a torch model's arrays by their canonical names, in canonical layouts."""
    arrays: Arrays = {}
    for path, module in model.named_modules():
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for name, tensor in tensors.items():
            if name != "num_batches_tracked":
                leaf, array = _canonical(module, path, name, to_numpy(tensor))
                arrays[f"{path.replace('.', '/')}/{leaf}".lstrip("/")] = array
    return arrays


def timm_weights(model: nn.Module) -> Arrays:
    """Returns a timm model's weights by their canonical names, in canonical layouts.

    The class token's position is folded into the token, the others are cut into the grid: (1 n+1 d) -> (1 h w d).
    """
    weights = canonical(model, lambda tensor: tensor.detach().double().numpy())
    if "pos_embed" in weights and weights["pos_embed"].ndim == 3:
        _fold_position(weights, model.patch_embed.grid_size)
    return weights


def _centre(module: nn.Module, name: str) -> float:
    if name == "gamma":
        return 0.5
    return 1.0 if name == "weight" and _is_norm(module) else 0.0


def _spread(module: nn.Module, name: str) -> float:
    if name == "weight" and not _is_norm(module):
        return 1 / math.sqrt(math.prod(module.weight.shape[1:]))  # unit gain
    return 0.1


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm)


def _canonical(module: nn.Module, path: str, name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    if isinstance(module, nn.Linear) and name == "weight":
        return "kernel", array.T
    if isinstance(module, nn.Conv2d) and name == "weight":
        if path.endswith(("mlp.fc1", "mlp.fc2", "head.fc")):  # timm's conv_mlp, use_conv: a linear layer as a 1x1 one
            return "kernel", array[:, :, 0, 0].T
        return "kernel", array.transpose(2, 3, 1, 0)
    return {"weight": "scale", "running_mean": "mean", "running_var": "var"}.get(name, name), array


def _fold_position(weights: Arrays, grid_size: tuple[int, int]) -> None:
    pos_embed = weights["pos_embed"]
    if pos_embed.shape[1] == math.prod(grid_size) + 1:
        weights["cls_token"] = weights["cls_token"] + pos_embed[:, :1]
        pos_embed = pos_embed[:, 1:]
    weights["pos_embed"] = pos_embed.reshape(1, *grid_size, -1)
