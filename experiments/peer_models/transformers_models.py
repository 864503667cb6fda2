"""transformers' models. Its ViTDet is a backbone: the last norm, the mean and the head are put on it in torch's layers.

That ViTDet takes square images only (a grid whose position embedding is not square is resampled), and writes its
attention out, so no kernel can be chosen.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    VitDetConfig,
    VitDetModel,
    ViTForImageClassification,
)

from experiments.peer_models.names import rename
from experiments.peer_models.registry import Setting
from experiments.peer_models.torch_module import Foreign, Read, load_state, split_qkv
from vitcmp.backend import Backend, Unsupported
from vitcmp.checkpoints import to_timm
from vitcmp.params import Weights
from vitcmp.specs import ConvNeXtSpec, ResNetSpec, Spec, ViTDetSpec, ViTSpec

GELU = {"erf": "gelu", "tanh": "gelu_pytorch_tanh"}
BLOCK = r"blocks\.(\d+)\."
LAYER = r"vit.layers.\1."
VIT_RULES = (
    (r"cls_token", "vit.embeddings.cls_token"),
    (r"pos_embed", "vit.embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(.+)", r"vit.embeddings.patch_embeddings.projection.\1"),
    (BLOCK + r"norm1\.(.+)", LAYER + r"layernorm_before.\2"),
    (BLOCK + r"norm2\.(.+)", LAYER + r"layernorm_after.\2"),
    (BLOCK + r"attn\.([qkv])\.(.+)", LAYER + r"attention.\2_proj.\3"),
    (BLOCK + r"attn\.proj\.(.+)", LAYER + r"attention.o_proj.\2"),
    (BLOCK + r"mlp\.(.+)", LAYER + r"mlp.\2"),
    (r"norm\.(.+)", r"vit.layernorm.\1"),
    (r"head\.(.+)", r"classifier.\1"),
)
VITDET_RULES = (
    (r"pos_embed", "backbone.embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(.+)", r"backbone.embeddings.projection.\1"),
    (BLOCK + r"attn\.(.+)", r"backbone.encoder.layer.\1.attention.\2"),
    (r"blocks\.(.+)", r"backbone.encoder.layer.\1"),
    (r"neck\.(.+)", r"norm.\1"),  # what timm's names call the last norm
    (r"head\.fc\.(.+)", r"head.\1"),
)
CONVNEXT_BLOCK = r"stages\.(\d+)\.blocks\.(\d+)\."
CONVNEXT_LAYER = r"convnext.encoder.stages.\1.layers.\2."
CONVNEXT_RULES = (
    (r"stem\.0\.(.+)", r"convnext.embeddings.patch_embeddings.\1"),
    (r"stem\.1\.(.+)", r"convnext.embeddings.layernorm.\1"),
    (r"stages\.(\d+)\.downsample\.(.+)", r"convnext.encoder.stages.\1.downsampling_layer.\2"),
    (CONVNEXT_BLOCK + r"gamma", CONVNEXT_LAYER + "layer_scale_parameter"),
    (CONVNEXT_BLOCK + r"conv_dw\.(.+)", CONVNEXT_LAYER + r"dwconv.\3"),
    (CONVNEXT_BLOCK + r"norm\.(.+)", CONVNEXT_LAYER + r"layernorm.\3"),
    (CONVNEXT_BLOCK + r"mlp\.fc([12])\.(.+)", CONVNEXT_LAYER + r"pwconv\3.\4"),
    (r"head\.norm\.(.+)", r"convnext.layernorm.\1"),
    (r"head\.fc\.(.+)", r"classifier.\1"),
)


def load(backend: Backend, spec: Spec, weights: Weights, setting: Setting) -> Foreign:
    state = to_timm(weights, spec)
    read: Read | None = _logits
    model: nn.Module
    match spec:
        case ViTDetSpec():
            model, state, read = VitDetWithHead(spec, setting), rename(_with_token(state, spec), VITDET_RULES), None
        case ViTSpec():
            model, state = ViTForImageClassification(_vit_config(spec)), rename(split_qkv(state), VIT_RULES)
        case ResNetSpec():
            model, state = ResNetForImageClassification(_resnet_config(spec)), rename(state, _resnet_rules())
        case ConvNeXtSpec():
            model, state = ConvNextForImageClassification(_convnext_config(spec)), rename(state, CONVNEXT_RULES)
        case _:
            raise Unsupported(f"no model of transformers is known for {spec.family}")
    return load_state(model, state, spec, library="transformers", backend=backend, setting=setting, read=read)


class VitDetWithHead(nn.Module):
    """`VitDetModel`, a norm over the channels, the mean of the map, and a linear head."""

    def __init__(self, spec: ViTDetSpec, setting: Setting) -> None:
        super().__init__()
        if setting.attention != "math":
            raise Unsupported(f"transformers' VitDetModel writes its attention out: math, not {setting.attention}")
        if spec.image_size[0] != spec.image_size[1]:
            raise Unsupported(f"transformers' VitDetModel resamples positions where {spec.image_size} is not square")
        self.backbone = VitDetModel(_vitdet_config(spec))
        self.norm = nn.LayerNorm(spec.width, eps=spec.neck_eps)
        self.head = nn.Linear(spec.width, spec.num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.backbone(images).last_hidden_state.permute(0, 2, 3, 1)
        return self.head(self.norm(x).mean(dim=(1, 2)))


def _logits(output: Any) -> torch.Tensor:
    return output.logits


def _with_token(state: Weights, spec: ViTDetSpec) -> Weights:
    """Flattens the position embedding and puts a row before it: the class token's, which the model cuts off."""
    flat = state["pos_embed"].reshape(1, -1, spec.width)
    return {**state, "pos_embed": np.concatenate([np.zeros_like(flat[:, :1]), flat], axis=1)}


def _vit_sizes(spec: ViTSpec) -> dict[str, Any]:
    return {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.num_heads,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "hidden_act": GELU[spec.gelu],
        "layer_norm_eps": spec.norm_eps,
    }


def _vit_config(spec: ViTSpec) -> ViTConfig:
    return ViTConfig(
        **_vit_sizes(spec),
        intermediate_size=spec.mlp_dim,
        num_labels=spec.num_classes,
        attn_implementation="sdpa",
    )


def _vitdet_config(spec: ViTDetSpec) -> VitDetConfig:
    assert isinstance(spec.global_blocks, tuple)
    return VitDetConfig(
        **_vit_sizes(spec) | {"image_size": spec.image_size[0]},
        pretrain_image_size=spec.image_size[0],
        mlp_ratio=spec.mlp_dim // spec.width,
        use_relative_position_embeddings=spec.rel_pos,
        window_size=spec.window_size,
        window_block_indices=[i for i in range(spec.depth) if i not in spec.global_blocks],
    )


def _resnet_config(spec: ResNetSpec) -> ResNetConfig:
    return ResNetConfig(
        embedding_size=spec.width,
        hidden_sizes=[spec.width * 2**stage * spec.expansion for stage in range(len(spec.depths))],
        depths=list(spec.depths),
        layer_type=spec.block,
        num_labels=spec.num_classes,
    )


def _convnext_config(spec: ConvNeXtSpec) -> ConvNextConfig:
    return ConvNextConfig(
        depths=list(spec.depths),
        hidden_sizes=list(spec.widths),
        num_stages=len(spec.depths),
        hidden_act=GELU[spec.gelu],
        layer_norm_eps=spec.norm_eps,  # of the last norm; the others have 1e-6
        num_labels=spec.num_classes,
    )


def _resnet_rules() -> list[tuple[str, str]]:
    """Units count from 1 in timm's names and from 0 in transformers', so each index has a rule."""
    rules = []
    for ours, theirs in (("conv", "convolution"), ("bn", "normalization")):
        rules.append((rf"{ours}1\.(.+)", rf"resnet.embedder.embedder.{theirs}.\1"))
        for stage in range(4):
            units = rf"layer{stage + 1}\.(\d+)\."
            layer = rf"resnet.encoder.stages.{stage}.layers.\1."
            rules += [(rf"{units}{ours}{j + 1}\.(.+)", rf"{layer}layer.{j}.{theirs}.\2") for j in range(3)]
            rules.append((rf"{units}downsample\.{int(ours == 'bn')}\.(.+)", rf"{layer}shortcut.{theirs}.\2"))
    return [*rules, (r"fc\.(.+)", r"classifier.1.\1")]
