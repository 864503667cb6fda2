"""equimo's ViT and ConvNeXt (Equinox modules of one image, mapped over the batch), channels first inside.

Its norms and softmax compute in float32 whatever the input's dtype, so it equals ours in float32 and not beyond.
"""

from typing import Any

import equimo.models
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.peer_models.jax_module import Foreign
from experiments.peer_models.names import check_names, rename
from experiments.peer_models.registry import Setting
from vitcmp.backend import Backend, Unsupported
from vitcmp.checkpoints import to_timm
from vitcmp.params import Weights
from vitcmp.specs import ConvNeXtSpec, Spec, ViTDetSpec, ViTSpec

GELU = {"erf": "exactgelu", "tanh": "gelu"}
BLOCK = r"blocks\.(\d+)\."
LAYER = r"blocks.0.blocks.\1."  # one chunk of blocks
VIT_RULES = (
    (r"cls_token|patch_embed\..+", r"\g<0>"),
    (r"pos_embed", "global_pos_embed.weight"),
    (BLOCK + r"norm1\.(.+)", LAYER + r"prenorm.\2"),
    (BLOCK + r"norm2\.(.+)", LAYER + r"norm.\2"),
    (BLOCK + r"(attn|mlp)\.(.+)", LAYER + r"\2.\3"),
    (r"(norm|head)\..+", r"\g<0>"),
)
CONVNEXT_BLOCK = r"stages\.(\d+)\.blocks\.(\d+)\."
CONVNEXT_LAYER = r"blocks.\1.blocks.\2."
CONVNEXT_RULES = (
    (r"stem\.0\.(.+)", r"blocks.0.downsample.conv.\1"),
    (r"stem\.1\.(.+)", r"blocks.0.downsample.norm.\1"),
    (r"stages\.(\d+)\.downsample\.0\.(.+)", r"blocks.\1.downsample.norm.\2"),
    (r"stages\.(\d+)\.downsample\.1\.(.+)", r"blocks.\1.downsample.conv.\2"),
    (CONVNEXT_BLOCK + r"gamma", CONVNEXT_LAYER + "ls.gamma"),
    (CONVNEXT_BLOCK + r"conv_dw\.(.+)", CONVNEXT_LAYER + r"dwconv.\3"),
    (CONVNEXT_BLOCK + r"norm\.(.+)", CONVNEXT_LAYER + r"norm.\3"),
    (CONVNEXT_BLOCK + r"mlp\.fc([12])\.(.+)", CONVNEXT_LAYER + r"pwconv\3.\4"),
    (r"head\.norm\.(.+)", r"norm.\1"),
    (r"head\.fc\.(.+)", r"head.\1"),
)


def load(backend: Backend, spec: Spec, weights: Weights, setting: Setting) -> Foreign:
    state = to_timm(weights, spec)
    match spec:
        case ViTSpec() if not isinstance(spec, ViTDetSpec):
            model, state = eqx.filter_eval_shape(_vit, spec), rename(state, VIT_RULES)
        case ConvNeXtSpec():
            model, state = eqx.filter_eval_shape(_convnext, spec), rename(state, CONVNEXT_RULES)
        case _:
            raise Unsupported(f"equimo has no {spec.family}")
    shapes, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    paths, structure = jax.tree_util.tree_flatten_with_path(shapes)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): shape for path, shape in paths}
    check_names(state, named, library="equimo")
    params = structure.unflatten([_fit(state[name], shape.shape) for name, shape in named.items()])
    key = jax.random.key(0)  # for dropout, whose rate is 0

    def apply(params: Any, statistics: Any, images: jax.Array, train: bool) -> tuple[jax.Array, Any]:
        model = eqx.combine(params, static)
        run = jax.vmap(lambda image: model(image, key=key, inference=not train))
        return run(jnp.moveaxis(images, 3, 1)), statistics

    return Foreign(apply, params, {}, spec, setting=setting)


def _fit(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Gives the array its shape there, which differs in axes of length 1 only: a bias is (d, 1, 1)."""
    if [size for size in array.shape if size > 1] != [size for size in shape if size > 1]:
        raise ValueError(f"an array of shape {array.shape} is to be one of shape {shape}")
    return array.reshape(shape)


def _vit(spec: ViTSpec) -> Any:
    if spec.image_size[0] != spec.image_size[1]:
        raise Unsupported(f"equimo's ViT takes square images only, not {spec.image_size}")
    return equimo.models.VisionTransformer(
        img_size=spec.image_size[0],
        in_channels=3,
        dim=spec.width,
        patch_size=spec.patch_size,
        num_heads=[spec.num_heads],
        depths=[spec.depth],
        mlp_ratio=spec.mlp_dim / spec.width,
        reg_tokens=0,
        act_layer=GELU[spec.gelu],
        global_pool="token",
        num_classes=spec.num_classes,
        eps=spec.norm_eps,
        key=jax.random.key(0),
    )


def _convnext(spec: ConvNeXtSpec) -> Any:
    return equimo.models.ConvNeXt(
        depths=list(spec.depths),
        dims=list(spec.widths),
        act_layer=GELU[spec.gelu],
        num_classes=spec.num_classes,
        eps=spec.norm_eps,
        key=jax.random.key(0),
    )
