"""The study that runs without flags: both kinds of drawn data, a small ViT and a small ConvNeXt, on a CPU.

Passes and learning rates by what was tried (experiments/LOG.md): of the glyphs every arm that can learn its task has
learnt it at the end. Of the digits none has: a ViT's arms are still learning.
"""

from typing import Any

from experiments.capacity.plan import Setting

VIT = "vit_ti16:depth=2,width=128,num_heads=4,mlp_dim=256,pool=gap,pos_embed=sincos2d"
VIT_32 = "vit_ti16:patch_size=32,depth=3,width=64,num_heads=2,mlp_dim=128,pool=gap"
CONVNEXT = "convnext_atto:depths=1x1x2,widths=16x32x64"
DIGITS = "digit_canvas/sklearn:num_train=8192"


def _recipe(learning_rate: float) -> dict[str, Any]:
    return {"learning_rate": learning_rate, "weight_decay": 0.05, "warmup_steps": 20, "clip_norm": 1.0}


def _setting(dataset: str, model: str, *, epochs: int, learning_rate: float, low: int = 32, high: int = 64) -> Setting:
    sizes: dict[str, Any] = {"low": low, "high": high}
    return Setting(
        dataset=dataset, model=model, **sizes, seeds=3, epochs=epochs, batch_size=64, recipe=_recipe(learning_rate)
    )


STUDY: tuple[Setting, ...] = (
    _setting("glyphs/fine", VIT, epochs=4, learning_rate=1e-3),
    _setting("glyphs/fine", CONVNEXT, epochs=4, learning_rate=4e-3),
    _setting("glyphs/coarse", VIT, epochs=4, learning_rate=1e-3),
    _setting("glyphs/coarse", CONVNEXT, epochs=4, learning_rate=4e-3),
    _setting("glyphs/crowded", VIT_32, epochs=8, learning_rate=1e-3, low=64, high=128),
    _setting(DIGITS, VIT, epochs=12, learning_rate=1e-3),
    _setting(DIGITS, CONVNEXT, epochs=5, learning_rate=4e-3),
)
SMOKE: tuple[Setting, ...] = (
    Setting(
        dataset="glyphs/fine:num_train=256,num_test=128",
        model="vit_ti16:patch_size=8,depth=1,width=32,num_heads=2,mlp_dim=64,pool=gap",
        low=32,
        high=64,
        seeds=2,
        epochs=1,
        batch_size=64,
        recipe={"learning_rate": 1e-3},
    ),
)
