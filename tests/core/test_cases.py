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


@pytest.mark.parametrize("model", ["vit_b16", "vitdet_b16", "vit_b16:pool=map,image_size=256"])
def test_the_pallas_kernel_is_unsupported_where_its_blocks_of_128_tokens_do_not_fit(model):
    axes = {"platform": "tpu", "backend": "jax", "numerics": "bfloat16", "attention": "pallas"}
    assert "multiples of 128" in why_unsupported(get_spec(model), **axes)
    assert why_unsupported(get_spec("vit_b16:pool=gap,image_size=256"), **axes) is None


def test_an_empty_list_is_an_error_and_not_the_preset():
    with pytest.raises(ValueError, match="models is empty"):
        check_names({"models": ()}, ("jax",))
