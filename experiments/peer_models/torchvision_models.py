"""torchvision's models. Its ViT is square, and of its ResNet and ConvNeXt the classes behind the named models are used.

In evaluation nn.MultiheadAttention has a fast path, with attention of its own and not SDPA. It is off here: both sides
run one kernel. On a CPU at ViT-B/16, 224 px, batch 1, it is 8.5 % faster than flash by SDPA, theirs or ours.
"""

import torch
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.vision_transformer import VisionTransformer

from experiments.peer_models.names import rename
from experiments.peer_models.registry import Setting
from experiments.peer_models.torch_module import Foreign, load_state
from vitcmp.backend import Backend, Unsupported
from vitcmp.checkpoints import to_timm
from vitcmp.params import Weights
from vitcmp.specs import ConvNeXtSpec, ResNetSpec, Spec, ViTSpec

BLOCK = r"blocks\.(\d+)\."
LAYER = r"encoder.layers.encoder_layer_\1."
VIT_RULES = (
    (r"cls_token", "class_token"),
    (r"pos_embed", "encoder.pos_embedding"),
    (r"patch_embed\.proj\.(.+)", r"conv_proj.\1"),
    (BLOCK + r"norm([12])\.(.+)", LAYER + r"ln_\2.\3"),
    (BLOCK + r"attn\.qkv\.(.+)", LAYER + r"self_attention.in_proj_\2"),
    (BLOCK + r"attn\.proj\.(.+)", LAYER + r"self_attention.out_proj.\2"),
    (BLOCK + r"mlp\.fc1\.(.+)", LAYER + r"mlp.0.\2"),
    (BLOCK + r"mlp\.fc2\.(.+)", LAYER + r"mlp.3.\2"),
    (r"norm\.(.+)", r"encoder.ln.\1"),
    (r"head\.(.+)", r"heads.head.\1"),
)


def load(backend: Backend, spec: Spec, weights: Weights, setting: Setting) -> Foreign:
    """Loads the model; the fast path of nn.MultiheadAttention is off in this process, so that both sides run SDPA."""
    state = to_timm(weights, spec)
    match spec:
        case ViTSpec(family="vit"):
            torch.backends.mha.set_fastpath_enabled(False)
            model, state = _vit(spec), rename(state, VIT_RULES)
        case ResNetSpec():  # timm's names are torchvision's
            model = ResNet(Bottleneck, spec.depths, num_classes=spec.num_classes)
        case ConvNeXtSpec():
            model, state = _convnext(spec), rename(state, _convnext_rules(spec))
        case _:
            raise Unsupported(f"torchvision has no {spec.family}")
    return load_state(model, state, spec, library="torchvision", backend=backend, setting=setting)


def _vit(spec: ViTSpec) -> nn.Module:
    if spec.image_size[0] != spec.image_size[1]:
        raise Unsupported(f"torchvision's ViT takes square images only, not {spec.image_size}")
    return VisionTransformer(
        image_size=spec.image_size[0],
        patch_size=spec.patch_size,
        num_layers=spec.depth,
        num_heads=spec.num_heads,
        hidden_dim=spec.width,
        mlp_dim=spec.mlp_dim,
        num_classes=spec.num_classes,
    )


def _convnext(spec: ConvNeXtSpec) -> nn.Module:
    stages = zip(spec.widths, [*spec.widths[1:], None], spec.depths, strict=True)
    return ConvNeXt([CNBlockConfig(*stage) for stage in stages], num_classes=spec.num_classes)


def _convnext_rules(spec: ConvNeXtSpec) -> list[tuple[str, str]]:
    rules = [(r"stem\.([01])\.(.+)", r"features.0.\1.\2")]
    for stage in range(len(spec.depths)):
        ours, theirs = rf"stages\.{stage}\.", f"features.{2 * stage + 1}."
        rules += [
            (ours + r"downsample\.([01])\.(.+)", rf"features.{2 * stage}.\1.\2"),
            (ours + BLOCK + r"gamma", theirs + r"\1.layer_scale"),
            (ours + BLOCK + r"conv_dw\.(.+)", theirs + r"\1.block.0.\2"),
            (ours + BLOCK + r"norm\.(.+)", theirs + r"\1.block.2.\2"),
            (ours + BLOCK + r"mlp\.fc1\.(.+)", theirs + r"\1.block.3.\2"),
            (ours + BLOCK + r"mlp\.fc2\.(.+)", theirs + r"\1.block.5.\2"),
        ]
    return [*rules, (r"head\.norm\.(.+)", r"classifier.0.\1"), (r"head\.fc\.(.+)", r"classifier.2.\1")]
