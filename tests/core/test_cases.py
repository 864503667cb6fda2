"""The grid: presets, filtering by device, validation, and the order of a sweep."""

import dataclasses

import pytest

from vitcmp.backend import ATTENTION, COMPILE, LAYOUT, NUMERICS, Device, why_unsupported
from vitcmp.cases import ARTICLE_SIZES, PRESETS, Grid, check_names, estimate_s, get_preset, interleave, make_cases
from vitcmp.specs import get_spec

CPU = Device(platform="cpu", name="a cpu", num_devices=1, memory_bytes=1, num_threads=2, versions={})
GPU = Device(platform="gpu", name="a gpu", num_devices=1, memory_bytes=1, num_threads=None, versions={})
TPU = dataclasses.replace(GPU, platform="tpu", name="a tpu")


def make(grid: Grid, backend: str = "torch", device: Device = CPU):
    return make_cases(grid, backend, device, framework_version="1")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("device", [CPU, GPU, TPU], ids=lambda device: device.platform)
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_every_preset_makes_cases_whose_axes_are_allowed_and_whose_ids_differ(preset, device, backend):
    cases = make(get_preset(preset, device.platform), backend, device)
    assert cases and len({case.case_id for case in cases}) == len(cases)
    for case in cases:
        assert case.numerics in NUMERICS and case.compile in COMPILE[backend] and case.layout in LAYOUT[backend]
        assert case.attention in ATTENTION[backend] if case.model.startswith("vit") else case.attention is None
    for case in {(case.model, case.image_size): case for case in cases}.values():
        spec = case.resolve_spec()
        assert spec == dataclasses.replace(get_spec(case.model), image_size=spec.image_size)


def test_the_article_preset_is_the_articles_grid():
    cases = make(get_preset("article", "gpu"), "torch", GPU)
    assert {case.image_size for case in cases} == set(ARTICLE_SIZES)
    assert {case.batch_size for case in cases} == {1, 8, 32}
    assert {"flash", "math", "mem_efficient", "cudnn", "flex", None} == {case.attention for case in cases}
    assert {"channels_last", "nchw"} == {case.layout for case in cases}


def test_the_vit_papers_preset_is_its_figure_12():
    cases = make(get_preset("vit_paper", "gpu"), "torch", GPU)
    models = {"bit_r50x1", "bit_r50x2", "bit_r152x4", "vit_b32", "vit_l32", "vit_b16", "vit_l16", "vit_h14"}
    assert {(case.model, case.image_size) for case in cases} == {
        (model, size) for model in models for size in ("64", "128", "224", "384", "512")
    }
    assert len({case.batch_size for case in cases}) == 6


def test_a_folded_spec_has_no_batch_norm_to_choose_and_is_not_trained():
    grid = dataclasses.replace(get_preset("quick", "cpu"), models=("resnet18:is_folded=true", "resnet18"))
    grid = dataclasses.replace(grid, batch_norm=("kept", "folded"), image_sizes=("64",))
    assert [case.batch_norm for case in make(grid)] == [None, "kept", "folded"]
    with pytest.raises(ValueError, match="is_folded=true cannot be trained"):
        make(dataclasses.replace(grid, mode="train"))


@pytest.mark.parametrize(
    "backend, device, changes",
    [
        ("torch", CPU, {"numerics": "tensorfloat32"}),
        ("torch", CPU, {"attention": "cudnn"}),
        ("torch", GPU, {"attention": "flash", "numerics": "float32"}),
        ("jax", GPU, {"attention": "cudnn", "numerics": "float32"}),
        ("jax", GPU, {"attention": "pallas"}),
        ("jax", TPU, {"numerics": "float16"}),
    ],
)
def test_a_preset_leaves_out_what_the_device_does_not_have_and_a_flag_asks_for_it(backend, device, changes):
    def matches(case) -> bool:
        return all(getattr(case, name) == value for name, value in changes.items())

    grid = get_preset("article", device.platform)
    if "numerics" in changes:
        grid = dataclasses.replace(grid, numerics=(changes["numerics"],))
    assert not any(matches(case) for case in make_cases(grid, backend, device, framework_version="1"))
    asked = dataclasses.replace(grid, named=("numerics", "attention"))
    assert any(matches(case) for case in make_cases(asked, backend, device, framework_version="1"))


def test_a_model_without_attention_is_swept_once_and_a_vit_in_one_layout():
    grid = dataclasses.replace(
        get_preset("quick", "cpu"),
        attention=ATTENTION,
        layout=LAYOUT,
        models=("vit_ti16", "resnet18"),
        named=("numerics", "attention"),
    )
    cases = make(dataclasses.replace(grid, image_sizes=("64",)))
    vits = [case for case in cases if case.model == "vit_ti16"]
    assert [case.attention for case in vits] == list(ATTENTION["torch"]) and {case.layout for case in vits} == {"nchw"}
    assert [case.layout for case in cases if case.model == "resnet18"] == list(LAYOUT["torch"])


def test_every_model_that_cannot_take_a_size_is_named_in_one_error():
    grid = dataclasses.replace(
        get_preset("quick", "cpu"), models=("convnext_atto", "vit_ti32"), image_sizes=("8", "64")
    )
    with pytest.raises(ValueError) as error:
        make(grid)
    assert "convnext_atto" in str(error.value) and "vit_ti32" in str(error.value) and "8 px" in str(error.value)


def test_a_model_without_classes_cannot_be_trained():
    grid = dataclasses.replace(get_preset("quick", "cpu"), models=("vit_ti16:num_classes=0",), mode="train")
    with pytest.raises(ValueError, match="num_classes=0"):
        make(grid)


def test_both_sides_of_a_point_are_neighbours_in_an_interleaved_sweep():
    grid = get_preset("quick", "cpu")
    cases = interleave(make(grid, "jax") + make(grid, "torch"))
    for first, second in zip(cases[::2], cases[1::2], strict=True):
        assert (first.backend, second.backend) == ("jax", "torch")
        assert (first.model, first.image_size) == (second.model, second.image_size)


def test_check_names_lists_every_fault_at_once_with_what_is_allowed():
    faulty = {
        "models": ["vit_x16", "resnet50"],
        "image_sizes": ["224", "0", "3x4x5"],
        "batch_sizes": ["1", "0", "many"],
        "numerics": ["float23"],
        "attention": ["flesh"],
        "compile": ["jitt"],
        "layout": ["nwhc"],
        "mode": "trian",
    }
    with pytest.raises(ValueError) as error:
        check_names(faulty, ("jax",))
    text = str(error.value)
    for fragment in (
        "vit_x16",
        "'0'",
        "3x4x5",
        "many",
        "did you mean 'float32'",
        "xla, chunked, cudnn, pallas",
        "'jit'",
        "'nhwc'",
    ):
        assert fragment in text, fragment
    assert "did you mean 'train'" in text and "'resnet50'" not in text


def test_a_kernel_of_the_other_framework_is_named_with_what_this_one_has():
    with pytest.raises(ValueError, match=r"attention for jax: 'flash'.*allowed: xla, chunked, cudnn, pallas"):
        check_names({"attention": ["flash"]}, ("jax",))
    check_names({"attention": ["flash", "xla"]}, ("jax", "torch"))
    with pytest.raises(ValueError, match="leaves nothing for jax"):
        check_names({"attention": ["flash"]}, ("jax", "torch"))


def test_an_estimate_grows_with_the_work_and_stays_under_the_caps():
    small, large = (
        make(dataclasses.replace(get_preset("quick", "cpu"), models=("vit_b16",), image_sizes=(size,)))[0]
        for size in ("64", "512")
    )
    assert 3 < estimate_s(small) < estimate_s(large) < 60


def test_naming_the_numerics_does_not_bring_back_kernels_that_the_device_lacks():
    grid = dataclasses.replace(get_preset("article", "cpu"), numerics=("float32",), named=("numerics",))
    assert {case.attention for case in make(grid)} == {"math", "flash", "flex", None}


@pytest.mark.parametrize(
    ("kernel", "mode", "model", "words"),
    [
        ("pallas", "forward", "vit_b16", None),  # 197 tokens: no multiple of 128
        ("pallas", "train", "vitdet_b16:pool=map", None),
        ("pallas", "forward", "vit_b16:num_heads=4", "head_dim of 1 to 128, 256, 384 ..., this model has 192"),
        ("cudnn", "forward", "vit_b16", None),
        ("cudnn", "forward", "vit_b16:num_heads=64", "head_dim of 8, 16 ... 256, this model has 12"),
        ("cudnn", "forward", "vit_b16:num_heads=2", "head_dim of 8, 16 ... 256, this model has 384"),
        ("cudnn", "train", "vitdet_b16", None),
        ("cudnn", "train", "vitdet_b16:window_size=7,image_size=240", "even numbers of tokens, this model has 49, 225"),
        ("cudnn", "train", "vitdet_b16:window_size=7,rel_pos=false", None),
        ("cudnn", "forward", "vitdet_b16:window_size=7", None),
    ],
)
def test_what_a_fused_kernel_of_jax_does_not_take_is_known_beforehand(kernel, mode, model, words):
    platform = "tpu" if kernel == "pallas" else "gpu"
    axes = {"platform": platform, "backend": "jax", "numerics": "bfloat16", "attention": kernel, "mode": mode}
    reason = why_unsupported(get_spec(model), **axes)
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize(
    ("kernel", "platform", "mode", "model", "words"),
    [
        ("flash", "cpu", "train", "vitdet_b16", "flash attention has no gradient of a bias"),
        ("flash", "cpu", "forward", "vitdet_b16", None),
        ("flash", "cpu", "train", "vitdet_b16:rel_pos=false", None),
        ("cudnn", "gpu", "train", "vitdet_b16", "cudnn attention has no gradient of a bias"),
        ("mem_efficient", "gpu", "train", "vitdet_b16", None),
    ],
)
def test_what_has_no_gradient_of_a_bias_in_torch_is_known_beforehand(kernel, platform, mode, model, words):
    axes = {"platform": platform, "backend": "torch", "numerics": "bfloat16", "attention": kernel, "mode": mode}
    reason = why_unsupported(get_spec(model), **axes)
    assert reason is None if words is None else words in reason


def test_an_empty_list_is_an_error_and_not_the_preset():
    with pytest.raises(ValueError, match="models is empty"):
        check_names({"models": ()}, ("jax",))


FOREIGN = ("timm:resnet18", "big_vision:vit/B/16", "vit_ti16", "resnet18")


def foreign_grid(**changes) -> Grid:
    """Every kernel and layout, none of them asked for by name unless the changes say so."""
    return dataclasses.replace(
        get_preset("quick", "cpu"),
        **{"models": FOREIGN, "image_sizes": ("8x64",), "attention": ATTENTION, "layout": LAYOUT, **changes},
    )


@pytest.mark.parametrize(("backend", "theirs"), [("torch", "timm:resnet18"), ("jax", "big_vision:vit/B/16")])
def test_a_foreign_model_is_swept_by_its_own_backend_with_the_version_of_its_library(backend, theirs):
    versions = {"torch": "2.15", "timm": "1.0", "big_vision": "sha256:1"}
    grid = foreign_grid(image_sizes=("64",))
    cases = make_cases(grid, backend, dataclasses.replace(CPU, versions=versions), framework_version="2.15")
    assert {case.model for case in cases} == {theirs, "vit_ti16", "resnet18"}
    mine = [case for case in cases if case.model == theirs]
    library = {"torch": "timm 1.0", "jax": "big_vision sha256:1"}[backend]
    assert {case.framework_version for case in mine} == {f"2.15 ({library})"}
    assert {case.framework_version for case in cases} - {mine[0].framework_version} == {"2.15"}
    assert {case.layout for case in mine} == set(LAYOUT[backend]) and {case.batch_norm for case in mine} == {None}
    assert mine[0].resolve_spec() == dataclasses.replace(get_spec(theirs), image_size=(64, 64))


@pytest.mark.parametrize(
    ("backend", "model", "named", "kernels"),
    [
        ("torch", "timm:resnet18", (), {None}),
        ("torch", "timm:resnet18", ("attention",), set(ATTENTION["torch"])),
        ("jax", "big_vision:vit/B/16", ("attention",), {None}),
    ],
)
def test_a_foreign_model_chooses_its_attention_unless_kernels_are_named(backend, model, named, kernels):
    cases = make(foreign_grid(models=(model,), image_sizes=("64",), named=named), backend)
    assert {case.attention for case in cases} == kernels


def test_a_foreign_model_that_no_backend_of_the_sweep_has_is_a_fault():
    with pytest.raises(ValueError, match="'timm:resnet18' needs backend torch, the sweep has jax") as error:
        check_names({"models": FOREIGN}, ("jax",))
    assert "big_vision" not in str(error.value)
    check_names({"models": FOREIGN}, ("jax", "torch"))


def test_the_time_of_a_foreign_model_is_guessed_at_any_size_and_grows_with_it():
    small, large = (make(foreign_grid(models=("timm:resnet18",), image_sizes=(size,)))[0] for size in ("8x64", "1024"))
    assert 3 < estimate_s(small) < estimate_s(large)
