"""ViT against timm and against big_vision's own outputs, and JAX against torch, all in float64.

Bound: 1e-9 of the largest value. Float64 rounding leaves about 1e-15; the smallest fault tried here gives 2e-4.
"""

import dataclasses
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

import vitcmp
from tests.parity.helpers import draw_images, randomise, relative_error, run, run_timm, timm_weights, worst_error
from vitcmp.specs import ViTSpec

BOUND = 1e-9
FAULT = 1e3 * BOUND  # what a fault must exceed
# big_vision's MAPHead leaves its MLP at dtype_mm="float32" while all else ran in float64: its two layers round their
# inputs and outputs, 4 roundings of eps / 2 each, doubled for the sums between them. Measured: 0.8 eps.
MAP_BOUND = 4 * np.finfo(np.float32).eps
FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "big_vision"
TINY = "vit_ti16:depth=2,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=80x176"
TIMM_TINY = {"img_size": (80, 176), "depth": 2, "embed_dim": 48, "num_heads": 3, "mlp_ratio": 2, "num_classes": 10}
FRAMEWORKS = ["jax", "torch"]


def compare_with_timm(spec: ViTSpec, model: torch.nn.Module, *, batch_size: int = 2) -> float:
    """Returns the worst error of any output of ours on torch, with the weights of a timm ViT."""
    images = draw_images(spec.image_size, batch_size=batch_size)
    names = {"pos_drop": "stem", "norm": "features", **{f"blocks.{i}": f"block/{i}" for i in range(spec.depth)}}
    if spec.pool == "map":
        names["attn_pool"] = "pooled"
    return worst_error(run("torch", spec, timm_weights(model), images), run_timm(model, images, names))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("vit_ti16", "vit_tiny_patch16_224"), pytest.param("vit_b16", "vit_base_patch16_224", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("image_size", [(224, 224), (80, 176)])
def test_torch_equals_timm_at_every_block(ours, theirs, image_size):
    model = randomise(timm.create_model(theirs, img_size=image_size), seed=0)
    spec = dataclasses.replace(vitcmp.get_spec(ours), image_size=image_size)
    assert compare_with_timm(spec, model, batch_size=1) < BOUND


@pytest.mark.parametrize(("gelu", "act_layer"), [("erf", "gelu"), ("tanh", "gelu_tanh")])
@pytest.mark.parametrize(
    ("pool", "options"),
    [
        ("tok", {}),
        ("gap", {"global_pool": "avg", "class_token": False, "fc_norm": False}),
        ("map", {"global_pool": "map", "class_token": False}),
    ],
)
def test_torch_equals_timm_for_every_pooling_and_gelu(pool, options, gelu, act_layer):
    model = timm.create_model("vit_tiny_patch16_224", act_layer=act_layer, **TIMM_TINY, **options)
    randomise(model, seed=0)
    spec = dataclasses.replace(vitcmp.get_spec(TINY), pool=pool, gelu=gelu)
    assert compare_with_timm(spec, model) < BOUND


@pytest.mark.parametrize("fault", [{"norm_eps": 1e-5}, {"gelu": "tanh"}], ids=str)
def test_timm_tells_a_wrong_eps_and_a_wrong_gelu_apart(fault):
    model = randomise(timm.create_model("vit_tiny_patch16_224", **TIMM_TINY), seed=0)
    spec = dataclasses.replace(vitcmp.get_spec(TINY), **fault)
    assert compare_with_timm(spec, model) > FAULT


@pytest.mark.parametrize(
    "options",
    [
        "pool=tok",
        "pool=gap,gelu=tanh",
        "pool=map,gelu=tanh,rep_size=20",
        "pool=gap,pos_embed=sincos2d,rep_size=true",
        "pool=tok,num_classes=0,patch_size=14",
        "pool=map,num_heads=1,image_size=16x16",
    ],
)
def test_jax_equals_torch_layer_by_layer(options):
    pytest.importorskip("jax")
    spec = vitcmp.get_spec(f"{TINY},{options}")
    weights, images = vitcmp.init_weights(spec, seed=3), draw_images(spec.image_size)
    jax_out, torch_out = (run(backend, spec, weights, images) for backend in FRAMEWORKS)
    assert jax_out.keys() == torch_out.keys()
    assert {"stem", "block/0", "block/1", "features", "pooled", "pre_logits"} <= set(jax_out)
    assert ("logits" in jax_out) == (spec.num_classes > 0)
    assert worst_error(jax_out, torch_out) < BOUND


@pytest.mark.parametrize("spec", ["vit_ti16:image_size=80x176", "vitdet_ti16:image_size=80x176", TINY])
def test_float32_outputs_differ_by_rounding_only(spec):
    """A sum of K products drifts by sqrt(K) eps / 2, and the errors of 2 depth + 2 branches add up as independent ones.

    Twice that for two frameworks. The longest sum, in the stem, has K = 768; measured: 8 to 14 eps at every output.
    """
    pytest.importorskip("jax")
    spec = vitcmp.get_spec(spec)
    weights, images = vitcmp.init_weights(spec), draw_images(spec.image_size)
    jax_out, torch_out = (run(backend, spec, weights, images, numerics="float32") for backend in FRAMEWORKS)
    drift = np.sqrt(3 * spec.patch_size**2) * np.finfo(np.float32).eps / 2
    assert 1e-8 < worst_error(jax_out, torch_out) < 2 * np.sqrt(2 * spec.depth + 2) * drift


@pytest.mark.parametrize("backend", FRAMEWORKS)
@pytest.mark.parametrize(
    ("fixture", "options"),
    [
        ("tok", "depth=3,mlp_dim=128,num_heads=4,pool=tok"),
        ("gap", "depth=3,mlp_dim=128,num_heads=4,pool=gap"),
        ("gap_sincos_rep", "depth=2,mlp_dim=192,num_heads=2,pool=gap,pos_embed=sincos2d,rep_size=true"),
        ("map", "depth=2,mlp_dim=128,num_heads=4,pool=map"),
    ],
)
def test_outputs_are_those_of_big_vision(backend, fixture, options):
    pytest.importorskip(backend)
    with np.load(FIXTURES / f"vit_{fixture}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    images = arrays["image"].astype(np.float64)
    spec = vitcmp.get_spec(f"vit_ti8:width=64,gelu=tanh,num_classes=10,{options}")
    spec = dataclasses.replace(spec, image_size=images.shape[1:3])
    weights = vitcmp.load_weights(FIXTURES / f"vit_{fixture}.npz", spec)
    params = {name.removeprefix("params/"): x for name, x in arrays.items() if name.startswith("params/")}
    second_reading = from_big_vision(params, spec)
    assert weights.keys() == second_reading.keys()
    assert all(np.array_equal(weights[name], array) for name, array in second_reading.items())
    ours = run(backend, spec, weights, images)
    encoder = {f"block/{i}": arrays[f"out/encoder/block{i:02}"] for i in range(spec.depth)}
    head = {name: arrays[f"out/{name}"] for name in ("pre_logits", "logits")}
    stem = ours["stem"][:, 1:] if spec.pool == "tok" else ours["stem"]
    assert relative_error(stem, arrays["out/with_posemb"]) < BOUND
    assert worst_error(ours, encoder | {"features": arrays["out/encoded"]}) < BOUND
    assert worst_error(ours, head) < (MAP_BOUND if spec.pool == "map" else BOUND)


BIG_VISION_NAMES = {  # replaced in this order
    "MAPHead_0/MultiHeadDotProductAttention_0": "attn_pool",
    "MAPHead_0/LayerNorm_0": "attn_pool/norm",
    "MAPHead_0": "attn_pool",
    "probe": "latent",
    "Transformer/encoderblock_": "blocks/",
    "Transformer/encoder_norm": "norm",
    "LayerNorm_0": "norm1",
    "LayerNorm_1": "norm2",
    "MultiHeadDotProductAttention_0": "attn",
    "MlpBlock_0/Dense_0": "mlp/fc1",
    "MlpBlock_0/Dense_1": "mlp/fc2",
    "out/": "proj/",
    "pos_embedding": "pos_embed",
    "embedding/": "patch_embed/proj/",
    "cls": "cls_token",
}


def from_big_vision(params: dict[str, np.ndarray], spec: ViTSpec) -> dict[str, np.ndarray]:
    """Names big_vision's arrays canonically; heads are joined, and query, key and value become one matrix.

    Written apart from `vitcmp/big_vision.py` on purpose: two readings of the layout that must agree.
    """
    weights = {}
    for name, array in params.items():
        for old, new in BIG_VISION_NAMES.items():
            name = name.replace(old, new)
        if "attn" in name and name.endswith("kernel") and "mlp" not in name:
            array = array.reshape(spec.width, spec.width)
        weights[name] = array.reshape(-1) if name.endswith("bias") else array
    for leaf in ("kernel", "bias"):
        for i in range(spec.depth):
            weights[f"blocks/{i}/attn/qkv/{leaf}"] = join(weights, f"blocks/{i}/attn", leaf, ["query", "key", "value"])
        if spec.pool == "map":
            weights[f"attn_pool/q/{leaf}"] = weights.pop(f"attn_pool/query/{leaf}")
            weights[f"attn_pool/kv/{leaf}"] = join(weights, "attn_pool", leaf, ["key", "value"])
    if spec.pos_embed == "learned":
        weights["pos_embed"] = weights["pos_embed"].reshape(1, *spec.grid_size, spec.width)
    return weights


def join(weights: dict[str, np.ndarray], module: str, leaf: str, parts: list[str]) -> np.ndarray:
    return np.concatenate([weights.pop(f"{module}/{part}/{leaf}") for part in parts], axis=-1)
