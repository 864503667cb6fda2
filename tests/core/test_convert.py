"""python -m vitcmp.convert: every direction there and back, the spec told from the arrays, and what is refused."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.big_vision_files import bit_dump, bit_tree, bit_v1_tree, scanned, under, vit_tree
from vitcmp.checkpoints import load_weights, save_weights, to_timm
from vitcmp.convert import convert
from vitcmp.infer import infer_spec, name_of
from vitcmp.params import count_params, init_weights
from vitcmp.specs import NAMES, get_spec

VIT = "vit_ti16:depth=2,width=48,num_heads=4,mlp_dim=80,num_classes=10,image_size=96"
SMALL = "vit_ti16:num_classes=5,image_size=48"  # of a size in the table, which tells num_heads of a timm file
BIT = "bit_r50x1:depths=1x2x1x1,num_classes=7"
# Specs that canonical and timm's arrays tell whole.
TOLD = [
    SMALL,
    f"{SMALL},pool=gap,rep_size=24",
    f"{SMALL},pool=map,num_classes=0,patch_size=8",
    "vitdet_ti16:num_classes=3,image_size=80,window_size=3,global_blocks=2+5",
    "vitdet_ti16:num_classes=0,image_size=64x96,window_size=5,global_blocks=1+,neck_dim=16",
    "resnet18:width=8,num_classes=10",
    "resnet50:width=8,depths=1x2x1,num_classes=0",
    "convnext_atto:depths=1x2x1,widths=8x16x24,num_classes=10",
    "convnext_tiny:depths=1x1x1x1,widths=8x16x24x32,num_classes=0,kernel_size=5",
    BIT,
]


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        assert ours[name].dtype == array.dtype, name
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def arrays_in(path):
    with np.load(path) as file:
        return dict(file)


def run_convert(*arguments, folder):
    command = [sys.executable, "-W", "error", "-m", "vitcmp.convert", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ})


@pytest.mark.parametrize("model", TOLD)
def test_names_and_shapes_tell_the_spec(model):
    spec = get_spec(model)
    weights = init_weights(spec)
    assert infer_spec(weights) == spec
    if not (spec.family == "vitdet" and not spec.neck_dim):  # timm has it flat, and its grid is not square
        assert infer_spec(to_timm(weights, spec)) == spec


@pytest.mark.parametrize("options", ["pool=tok", "pool=gap,rep_size=20", "pool=map,num_classes=0"])
def test_big_visions_arrays_tell_the_heads_too(options):
    spec = get_spec(f"{VIT},gelu=tanh,{options}")
    tree = vit_tree(init_weights(spec), 4)
    assert infer_spec(tree) == infer_spec(scanned(tree)) == spec
    del tree["pos_embedding"]
    assert infer_spec(tree) == get_spec(f"{VIT},gelu=tanh,{options},pos_embed=sincos2d,image_size=224")


def test_big_visions_bits_are_told_apart():
    weights, numerics = init_weights(BIT), "weight_eps=1e-10,stem_pad=lowest"
    assert infer_spec(bit_tree(weights)) == infer_spec(bit_dump(weights)) == get_spec(f"{BIT},{numerics}")
    model = BIT.replace("bit", "bit_v1")
    assert infer_spec(bit_v1_tree(init_weights(model))) == get_spec(model)


@pytest.mark.parametrize(
    "model", [*NAMES[::7], *TOLD, "vit_l14:rep_size=true,norm_eps=1e-5", "vitdet_b16:global_blocks=0"]
)
def test_the_text_of_a_spec_is_read_as_the_spec(model):
    spec = get_spec(model)
    assert get_spec(name_of(spec)) == spec


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (to_timm(init_weights(VIT), VIT), "num_heads, since no known size has width=48, depth=2, mlp_dim=80; give"),
        ({"a/b": np.ones(2)}, "the names are of no family that it knows"),
        ({"patch_embed.proj.weight": np.ones((8, 3, 4, 4))}, "there is no blocks/0/mlp/fc1/kernel"),
        (
            vit_tree(init_weights(f"{VIT},image_size=80x112"), 4),
            "35 rows of its position embedding are of no square grid: all but its image_size is "
            "vit_ti16:num_classes=10,width=48,depth=2,num_heads=4,mlp_dim=80; give it",
        ),
        (
            init_weights("vitdet_ti16:image_size=80x112,window_size=4,window_policy=divide,global_blocks=1"),
            "the windows of its blocks differ: ",
        ),
        ({"stem/conv/kernel": np.ones((7, 7, 3, 48))}, "the stem's width of 48 is no multiple of 64"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_tell_the_model_ask_for_it(state, message):
    with pytest.raises(ValueError, match="mine.npz: its arrays do not tell the model: ") as caught:
        infer_spec(state, source="mine.npz")
    assert message in str(caught.value)


@pytest.mark.parametrize(("suffix", "scan"), [(".npz", True), (".safetensors", False)])
def test_a_round_through_every_layout_changes_no_bit(tmp_path, suffix, scan):
    weights = {name: x.astype(np.float64) + 1e-12 for name, x in init_weights(SMALL).items()}
    paths = [str(tmp_path / f"{i}{suffix}") for i in range(5)]
    save_weights(paths[0], weights)
    line = convert(paths[0], paths[1], to="timm")
    assert line == (
        f"{paths[0]}: canonical, 152 arrays of vit_ti16:image_size=48,num_classes=5 -> {paths[1]}: timm, 152 arrays, "
        f"{count_params(SMALL):,} parameters, float64"
    )
    assert ("big_vision (scan)" in convert(paths[1], paths[2], to="big_vision", scan=scan)) == scan
    convert(paths[2], paths[3], to="timm")
    convert(paths[3], paths[4], to="canonical")
    assert_equal(load_weights(paths[4], SMALL), weights)


@pytest.mark.parametrize(
    "model", [BIT, BIT.replace("bit", "bit_v1"), "resnet18:width=8", "convnext_atto:depths=1x1x1x1"]
)
def test_convolutional_models_go_through_timms_names_unchanged(tmp_path, model):
    weights = init_weights(model)
    save_weights(tmp_path / "a.npz", weights)
    convert(str(tmp_path / "a.npz"), str(tmp_path / "b.safetensors"), to="timm")
    convert(str(tmp_path / "b.safetensors"), str(tmp_path / "c.npz"))
    assert_equal(arrays_in(tmp_path / "c.npz"), weights)


def test_a_given_model_resamples_and_upcycles(tmp_path):
    source = str(tmp_path / "w.npz")
    np.savez(source, **under("params/img", scanned(vit_tree(init_weights(VIT), 4))))
    vitdet = f"{VIT.replace('vit_', 'vitdet_')},image_size=80x112,window_size=3,global_blocks=1"
    convert(f"{source}:img", str(tmp_path / "d.npz"), model=vitdet)
    assert_equal(arrays_in(tmp_path / "d.npz"), load_weights(f"{source}:img", vitdet))


def test_a_fixed_embedding_is_written_for_timm_only_at_a_given_size(tmp_path):
    model = f"{VIT},pos_embed=sincos2d,image_size=80x112"
    source, target = str(tmp_path / "w.npz"), str(tmp_path / "t.npz")
    np.savez(source, **vit_tree(init_weights(model), 4))
    with pytest.raises(
        ValueError, match=r"give it as --model=vit_ti16:.*,pos_embed=sincos2d,.*,image_size=HEIGHTxWIDTH"
    ):
        convert(source, target, to="timm")
    convert(source, target, to="timm", model=model)
    assert_equal(arrays_in(target), to_timm(init_weights(model), model))


def test_the_command_converts_and_says_what_it_did(tmp_path):
    np.savez(tmp_path / "siglip.npz", **under("params/img", vit_tree(init_weights(f"{VIT},pool=map"), 4)))
    child = run_convert("siglip.npz:img", "out.safetensors", "--to=timm", folder=tmp_path)
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout == (
        "siglip.npz:img: big_vision, 54 arrays of vit_ti16:image_size=96,num_classes=10,width=48,depth=2,num_heads=4,"
        "mlp_dim=80,pool=map,gelu=tanh -> out.safetensors: timm, 44 arrays, "
        f"{count_params(f'{VIT},pool=map'):,} parameters, float32\n"
    )
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out.safetensors", "siglip.npz"]


def test_everything_wrong_with_a_command_line_is_said_at_once_and_nothing_is_written(tmp_path):
    save_weights(tmp_path / "w.npz", init_weights(SMALL))
    before = (tmp_path / "w.npz").read_bytes()
    wrong = ["w.npz", "./w.npz", "--to=tim", "--scan", "--model=vit_x16"]
    child = run_convert(*wrong, folder=tmp_path)
    assert (child.returncode, child.stdout) == (2, "")
    for message in (
        "is SRC itself",
        "unknown --to 'tim'; did you mean 'timm'?",
        "--scan is of --to=big_vision",
        "vit_x16",
    ):
        assert f"{message}" in child.stderr
    assert all(line.startswith("vitcmp.convert: ") for line in child.stderr.splitlines())
    assert [item.name for item in tmp_path.iterdir()] == ["w.npz"]
    assert (tmp_path / "w.npz").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["w.npz"], "expected SRC and DST, got 1 arguments: w.npz"),
        (["w.npz", "a.pth"], "a.pth: unknown file type '.pth'"),
        (["w.npz", "nowhere/a.npz"], "nowhere/a.npz: cannot be written, no folder nowhere"),
        (["w.npz:img", "a.npz"], "w.npz:img: 'img' is not there; subtrees in the file: blocks, head, norm, patch"),
        (["nothing.npz", "a.npz"], "nothing.npz: no such file"),
        (["timm:", "a.npz"], "timm:: write timm:NAME, or timm:NAME:PATH for a local file"),
        (["w.npz", "a.npz", "--too"], "Unknown command line flag 'too'"),
    ],
)  # fmt: skip
def test_a_command_that_cannot_be_done_is_exit_code_2(tmp_path, arguments, message):
    save_weights(tmp_path / "w.npz", init_weights(SMALL))
    child = run_convert(*arguments, folder=tmp_path)
    assert (child.returncode, child.stdout) == (2, "")
    assert child.stderr.startswith("vitcmp.convert: ")
    assert message in child.stderr
    assert [item.name for item in tmp_path.iterdir()] == ["w.npz"]


def test_help_is_no_error(tmp_path):
    child = run_convert("--help", folder=tmp_path)
    assert (child.returncode, child.stderr) == (0, "")
    assert "python -m vitcmp.convert siglip.npz:img" in child.stdout
    assert "--scan" in child.stdout
