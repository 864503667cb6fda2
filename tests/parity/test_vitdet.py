"""ViTDet against timm's model of Segment Anything, JAX against torch, upcycling, and faults that must show; in float64.

Bound: 1e-9 of the largest value. Float64 rounding leaves about 1e-15; the smallest fault tried here gives 1e-5.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

import torch_models.attention
import torch_models.vitdet
import vitcmp
from tests.parity.helpers import draw_images, randomise, relative_error, run, run_timm, timm_weights, worst_error
from torch_models.attention import RelPosBias, full_bias
from torch_models.vitdet import ViTDet, WindowBlock, rel_pos_bias, window_partition, window_unpartition
from vitcmp.params import expected_shapes, fit_image_size, upcycle
from vitcmp.specs import ViTDetSpec

BOUND = 1e-9
FAULT = 1e3 * BOUND  # what a fault must exceed
FRAMEWORKS = ["jax", "torch"]
# Blocks 1 and 3 are global. Grids: 80x176 is 5x11, which no window of 4 or 14 divides; 112x64 is 7x4.
TINY = "vitdet_ti16:depth=4,width=48,num_heads=3,mlp_dim=96,num_classes=10,global_blocks=2,image_size=80x176"
TINY += ",norm_eps=1e-5"  # timm's, in its blocks; the original has 1e-6


def timm_samvit(spec: ViTDetSpec) -> torch.nn.Module:
    model = timm.create_model(
        "samvit_base_patch16",
        img_size=spec.image_size,
        embed_dim=spec.width,
        depth=spec.depth,
        num_heads=spec.num_heads,
        mlp_ratio=spec.mlp_dim / spec.width,
        num_classes=spec.num_classes,
        window_size=spec.window_size,
        global_attn_indexes=spec.global_blocks,
        use_rel_pos=spec.rel_pos,
        neck_chans=spec.neck_dim,
    )
    return randomise(model, seed=0)


def samvit_weights(model: torch.nn.Module, spec: ViTDetSpec) -> dict[str, np.ndarray]:
    """Names timm's weights canonically: its head is `head.fc`, and its last norm, where there is no neck, is `neck`."""
    names = {"head/fc/": "head/"} | ({} if spec.neck_dim else {"neck/": "norm/"})
    weights = {}
    for name, array in timm_weights(model).items():
        for old, new in names.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        weights[name] = array
    return weights


def run_samvit(model: torch.nn.Module, images: np.ndarray) -> dict[str, np.ndarray]:
    grids = {"pos_drop": "stem", **{f"blocks.{i}": f"block/{i}" for i in range(len(model.blocks))}}
    out = run_timm(model, images, grids | {"neck": "features"})
    # run_timm takes maps for NCHW, these are NHWC already
    return out | {name: out[name].transpose(0, 3, 1, 2) for name in grids.values()}


def compare_with_timm(spec: ViTDetSpec, ours: ViTDetSpec | None = None, *, batch_size: int = 2) -> float:
    """Returns the worst error of any output of ours on torch with timm's weights; `ours` is the spec of a fault."""
    model, images = timm_samvit(spec), draw_images(spec.image_size, batch_size=batch_size)
    return worst_error(run("torch", ours or spec, samvit_weights(model, spec), images), run_samvit(model, images))


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [(224, 224), (80, 176)])
def test_torch_equals_timm_in_the_released_size(image_size):
    model = randomise(timm.create_model("samvit_base_patch16", img_size=image_size, num_classes=10), seed=0)
    spec = vitcmp.get_spec("vitdet_b16:neck_dim=256,num_classes=10,norm_eps=1e-5")  # timm's default, in its blocks
    spec = dataclasses.replace(spec, image_size=image_size)
    images = draw_images(image_size, batch_size=1)
    assert worst_error(run("torch", spec, samvit_weights(model, spec), images), run_samvit(model, images)) < BOUND


@pytest.mark.parametrize("neck_dim", [0, 24])
@pytest.mark.parametrize("rel_pos", [True, False])
@pytest.mark.parametrize(("image_size", "window_size"), [("80x176", 14), ("80x176", 4), ("112x64", 7), ("224", 14)])
def test_torch_equals_timm_at_every_block(image_size, window_size, rel_pos, neck_dim):
    options = f"image_size={image_size},window_size={window_size},rel_pos={rel_pos},neck_dim={neck_dim}"
    assert compare_with_timm(vitcmp.get_spec(f"{TINY},{options}"), batch_size=1) < BOUND


@pytest.mark.parametrize(
    "options",
    [
        "window_size=4",
        "window_size=14,rel_pos=false,neck_dim=20",
        "window_size=4,window_policy=divide,pool=map,gelu=tanh",
        "window_size=6,window_policy=divide,rel_pos=false,image_size=112x64",
        "window_size=3,neck_dim=24,pool=map,rep_size=true",
        "window_size=1,global_blocks=0,pos_embed=sincos2d,rep_size=20",
        "global_blocks=4,num_classes=0,patch_size=14",
        "window_size=14,image_size=16x16",
    ],
)
def test_jax_equals_torch_layer_by_layer(options):
    pytest.importorskip("jax")
    spec = vitcmp.get_spec(f"{TINY},{options}")
    weights, images = vitcmp.init_weights(spec, seed=3), draw_images(spec.image_size)
    jax_out, torch_out = (run(backend, spec, weights, images) for backend in FRAMEWORKS)
    assert jax_out.keys() == torch_out.keys()
    assert jax_out["block/0"].shape == (2, *spec.grid_size, spec.width)
    assert jax_out["features"].shape == (2, *spec.grid_size, spec.neck_dim or spec.width)
    assert worst_error(jax_out, torch_out) < BOUND


@pytest.mark.parametrize("window_size", [4, 14])
def test_torch_equals_transformers_vitdet_at_every_block(window_size):
    transformers = pytest.importorskip("transformers")
    spec = vitcmp.get_spec(f"{TINY},window_size={window_size},norm_eps=1e-6")  # the original's, and our default
    config = transformers.VitDetConfig(
        hidden_size=spec.width,
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.num_heads,
        mlp_ratio=spec.mlp_dim // spec.width,
        image_size=spec.image_size,
        window_block_indices=[0, 2],
        window_size=window_size,
        use_relative_position_embeddings=True,
    )
    model = randomise(transformers.VitDetModel(config), seed=0)
    weights, images = vitcmp.init_weights(spec), draw_images(spec.image_size)
    weights["pos_embed"] *= 0  # there the grid of pre-training must be square, and is resampled otherwise than in timm
    with torch.inference_mode():
        model.embeddings.position_embeddings.zero_()
        nchw = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        _, *blocks = model(nchw, output_hidden_states=True).hidden_states
    for name, array in timm_weights(model).items():
        name = name.replace("embeddings/projection", "patch_embed/proj").replace("encoder/layer", "blocks")
        weights[name.replace("/attention/", "/attn/")] = array
    del weights["embeddings/position_embeddings"]
    theirs = {f"block/{i}": x.permute(0, 2, 3, 1).numpy() for i, x in enumerate(blocks)}
    assert worst_error(run("torch", spec, weights, images), theirs) < BOUND


@pytest.mark.parametrize("backend", FRAMEWORKS)
@pytest.mark.parametrize("window", [(4, 3), (5, 11), (14, 2), (1, 1)])
def test_windows_are_cut_as_numpy_slices_and_put_back(backend, window):
    xp = pytest.importorskip({"jax": "jax.numpy", "torch": "torch"}[backend])
    vitdet = pytest.importorskip(f"{backend}_models.vitdet")
    x = np.random.default_rng(0).standard_normal((2, 5, 11, 3)).astype(np.float32)
    windows, padded_size = vitdet.window_partition(xp.asarray(x), window)
    assert padded_size == tuple(-(-side // w) * w for side, w in zip((5, 11), window, strict=True))
    padded = np.zeros((2, *padded_size, 3), np.float32)
    padded[:, :5, :11] = x
    starts = [range(0, side, w) for side, w in zip(padded_size, window, strict=True)]
    cut = [image[i : i + window[0], j : j + window[1]] for image in padded for i in starts[0] for j in starts[1]]
    assert np.array_equal(np.asarray(windows), np.stack(cut))
    assert np.array_equal(np.asarray(vitdet.window_unpartition(windows, padded_size, (5, 11))), x)


@pytest.mark.parametrize("backend", FRAMEWORKS)
def test_rel_pos_bias_is_the_sum_over_each_pair_of_tokens(backend):
    xp = pytest.importorskip({"jax": "jax.numpy", "torch": "torch"}[backend])
    vitdet, attention = (pytest.importorskip(f"{backend}_models.{name}") for name in ("vitdet", "attention"))
    rng = np.random.default_rng(0)
    h, w = 2, 3
    q, rel_pos_h, rel_pos_w = (rng.standard_normal(shape, np.float32) for shape in [(1, h, w, 2, 4), (3, 4), (5, 4)])
    expected = np.zeros((1, 2, h, w, h, w))
    for head, i, j, m, n in np.ndindex(2, h, w, h, w):
        expected[0, head, i, j, m, n] = q[0, i, j, head] @ (rel_pos_h[i - m + h - 1] + rel_pos_w[j - n + w - 1])
    bias = attention.full_bias(vitdet.rel_pos_bias(*(xp.asarray(x) for x in (q, rel_pos_h, rel_pos_w))))
    assert relative_error(np.asarray(bias), expected.reshape(1, 2, h * w, h * w)) < 1e-6  # float32: 8 products of 4 eps


@pytest.mark.parametrize("fault", [{"norm_eps": 1e-6}, {"gelu": "tanh"}, {"neck_eps": 1e-5}], ids=str)
@pytest.mark.parametrize("neck_dim", [0, 24])
def test_timm_tells_a_wrong_number_apart(fault, neck_dim):
    spec = vitcmp.get_spec(f"{TINY},window_size=4,neck_dim={neck_dim}")
    assert compare_with_timm(spec, dataclasses.replace(spec, **fault)) > FAULT


def pad_at_top_and_left(patch: pytest.MonkeyPatch) -> None:
    def partition(x, window, *, fill=None):
        windows, size = window_partition(x.flip(1, 2), window, fill=fill)
        return window_partition(window_unpartition(windows, size, size).flip(1, 2), window)

    def unpartition(windows, padded_size, size):
        return window_unpartition(windows, padded_size, padded_size)[:, -size[0] :, -size[1] :]

    patch.setattr(torch_models.vitdet, "window_partition", partition)
    patch.setattr(torch_models.vitdet, "window_unpartition", unpartition)


def pad_before_norm1(patch: pytest.MonkeyPatch) -> None:
    def forward(self, x):
        if self.attn.window == x.shape[1:3]:
            return normal(self, x)
        windows, padded_size = window_partition(x, self.attn.window)
        attended = self.attn.attend_windows(self.attn.qkv(self.norm1(windows)))
        x = x + self.attn.proj(window_unpartition(attended, padded_size, x.shape[1:3]))
        return x + self.mlp(self.norm2(x))

    normal = WindowBlock.forward
    patch.setattr(WindowBlock, "forward", forward)


def pad_with_zeros(patch: pytest.MonkeyPatch) -> None:
    """Pads what `qkv` returns as if it had no bias."""
    patch.setattr(torch_models.vitdet, "window_partition", lambda x, window, fill=None: window_partition(x, window))


def ignore_padding(patch: pytest.MonkeyPatch) -> None:
    """Masks the padded keys of a grid of 5x11 in its one window of 14x14."""

    def attend(q, k, v, *, kernel, bias):
        if q.shape[1] == 14 * 14:
            bias[0][..., 5:], bias[1][..., 11:] = -torch.inf, -torch.inf
        return torch_models.attention.attend(q, k, v, kernel=kernel, bias=bias)

    patch.setattr(torch_models.vitdet, "attend", attend)


def bias_of_the_key(patch: pytest.MonkeyPatch) -> None:
    def attend_math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: RelPosBias) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=full_bias(bias).transpose(-1, -2))

    patch.setattr(torch_models.attention, "_attend_math", attend_math)


def change_rel_pos(faulty: Callable[..., torch.Tensor], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch_models.vitdet, "rel_pos_bias", faulty)


FAULTS = {
    "pad_at_top_and_left": pad_at_top_and_left,
    "pad_before_norm1": pad_before_norm1,
    "pad_with_zeros": pad_with_zeros,
    "ignore_padding": ignore_padding,
    "rel_pos_off_by_one": functools.partial(change_rel_pos, lambda q, h, w: rel_pos_bias(q, h.roll(1, 0), w)),
    "rel_pos_flipped": functools.partial(change_rel_pos, lambda q, h, w: rel_pos_bias(q, h, w.flip(0))),
    "rel_pos_of_scaled_q": functools.partial(
        change_rel_pos, lambda q, h, w: rel_pos_bias(q * q.shape[-1] ** -0.5, h, w)
    ),
    "rel_pos_tables_swapped": functools.partial(
        change_rel_pos, lambda q, h, w: rel_pos_bias(q, w, h) if h.shape == w.shape else rel_pos_bias(q, h, w)
    ),
    "rel_pos_left_out": functools.partial(change_rel_pos, lambda q, h, w: rel_pos_bias(0 * q, h, w)),
    "rel_pos_of_the_key": bias_of_the_key,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_timm_tells_a_fault_apart(fault, monkeypatch):
    spec = vitcmp.get_spec(f"{TINY},window_size=14")
    assert compare_with_timm(spec) < BOUND
    FAULTS[fault](monkeypatch)
    assert compare_with_timm(spec) > FAULT


def test_swapped_window_axes_show(monkeypatch):
    spec = vitcmp.get_spec(f"{TINY},rel_pos=off,window_size=6,window_policy=divide,image_size=112x176")
    assert spec.window_of(0) == (4, 6)
    weights, images = vitcmp.init_weights(spec), draw_images(spec.image_size)
    right = run("torch", spec, weights, images)

    def swapped(x, window, **fill):
        return window_partition(x, window[::-1], **fill)

    monkeypatch.setattr(torch_models.vitdet, "window_partition", swapped)
    assert relative_error(run("torch", spec, weights, images)["block/0"], right["block/0"]) > FAULT


def test_swapped_pad_axes_raise_unless_the_grid_is_square(monkeypatch):
    def partition(x, window, *, fill):
        (b, h, w, d), (wh, ww) = x.shape, window
        ph, pw = h + -w % ww, w + -h % wh
        x = torch.nn.functional.pad(x - fill, (0, 0, 0, pw - w, 0, ph - h)) + fill
        x = x.reshape(b, ph // wh, wh, pw // ww, ww, d).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, wh, ww, d), (ph, pw)

    monkeypatch.setattr(torch_models.vitdet, "window_partition", partition)
    assert compare_with_timm(vitcmp.get_spec(f"{TINY},window_size=4,image_size=80")) < BOUND
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        compare_with_timm(vitcmp.get_spec(f"{TINY},window_size=4"))


@pytest.mark.parametrize("backend", FRAMEWORKS)
def test_a_vit_upcycled_to_global_blocks_is_the_vit(backend):
    pytest.importorskip(backend)
    vit = vitcmp.get_spec("vit_ti16:depth=2,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=80x176,pool=gap")
    spec = ViTDetSpec(**dataclasses.asdict(vit), global_blocks=vit.depth)
    weights, images = vitcmp.init_weights(vit), draw_images(vit.image_size)
    ours, theirs = run(backend, spec, upcycle(weights, spec), images), run(backend, vit, weights, images)
    grids = {name: x.reshape(2, *spec.grid_size, -1) for name, x in theirs.items() if x.ndim == 3}
    assert worst_error(ours, theirs | grids) < 1e-12


def test_upcycling_to_another_grid_resamples_positions_and_starts_relative_ones_at_zero():
    vit = vitcmp.get_spec("vit_ti16:depth=4,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=64,pool=tok")
    spec = vitcmp.get_spec(f"{TINY},window_size=4")
    weights = vitcmp.init_weights(vit)
    upcycled = upcycle(weights, spec)
    assert {name: x.shape for name, x in upcycled.items()} == expected_shapes(spec)
    assert all(not x.any() for name, x in upcycled.items() if "rel_pos" in name)
    assert np.array_equal(upcycled["pos_embed"], fit_image_size(weights, spec)["pos_embed"])
    assert all(upcycled[name] is x for name, x in weights.items() if name not in ("pos_embed", "cls_token"))


def test_the_model_built_without_memory_has_the_parameters_of_its_spec():
    for options in ("rel_pos=true", "neck_dim=24,pool=map,rep_size=true", "window_policy=divide,num_classes=0"):
        spec = vitcmp.get_spec(f"{TINY},{options}")
        with torch.device("meta"):
            num_params = sum(p.numel() for p in ViTDet(spec, attention="math").parameters())
        assert num_params == vitcmp.count_params(spec)
