"""The study that runs without flags: both kinds of drawn data, a small ViT and a small ConvNeXt, on a CPU."""

import itertools

from experiments.capacity.plan import Setting

VIT = "vit_ti16:patch_size=8,depth=3,width=64,num_heads=2,mlp_dim=128,pool=gap"
CONVNEXT = "convnext_atto:depths=1x1x2,widths=32x64x128"
DATASETS = ("glyphs/fine", "glyphs/coarse", "glyphs/crowded", "digit_canvas")
RECIPE = {"learning_rate": 1e-3, "weight_decay": 0.05, "warmup_steps": 20, "clip_norm": 1.0}

STUDY = tuple(
    Setting(dataset=dataset, model=model, low=32, high=64, seeds=3, epochs=4, batch_size=64, recipe=RECIPE)
    for dataset, model in itertools.product(DATASETS, (VIT, CONVNEXT))
)
SMOKE = (
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
