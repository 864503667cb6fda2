"""Every model, kernel and precision lowers for NVIDIA GPUs and for TPUs from a host that has neither."""

import re

import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp
from flax import nnx

import vitcmp
from jax_models.backend import JaxBackend
from jax_models.train import make_train_step
from vitcmp.backend import NUMERICS, load_backend

VIT = "width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=64x80"
SPECS = {
    "vit": f"vit_ti16:depth=2,{VIT}",
    "map": f"vit_ti16:depth=1,{VIT},pool=map",
    "gap": f"vit_ti16:depth=1,{VIT},pool=gap,rep_size=24,pos_embed=sincos2d,gelu=tanh",
    "vitdet": f"vitdet_ti16:depth=2,{VIT},window_size=2,global_blocks=1",
    "no_rel_pos": f"vitdet_ti16:depth=2,{VIT},window_size=2,global_blocks=1,rel_pos=false",
    "neck": f"vitdet_ti16:depth=2,{VIT},window_size=2,global_blocks=1,neck_dim=24,window_policy=divide",
    "resnet": "resnet50:depths=1+1,width=8,num_classes=10,image_size=48x80",
    "bit": "bit_r50x1:depths=1+1,num_classes=10,image_size=48x80",
    "bit_v1": "bit_v1_r50x1:depths=1+1,num_classes=10,image_size=48x80",
    "convnext": "convnext_atto:depths=1+1,widths=8+16,num_classes=10,image_size=48x80",
}
VITS = ("vit", "map", "gap", "vitdet", "no_rel_pos", "neck")
CUSTOM_CALL = re.compile(r"stablehlo\.custom_call @(\S+?)\(")


@pytest.fixture
def backend() -> JaxBackend:
    backend = load_backend("jax", platform="cpu")
    backend.convolution = "native"  # as on an accelerator
    return backend


@pytest.fixture
def cudnn(monkeypatch):
    """Lets JAX believe that the host has cuDNN 9.10: it asks before it lowers."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)


def lower(backend, model, *, platform, mode="forward", numerics="float32", attention=None) -> str:
    """Returns the StableHLO of the step; no weight and no image exists, but in a train step the tiny model's."""
    spec = vitcmp.get_spec(model)
    param_dtype, compute_dtype = NUMERICS[numerics]
    built = backend.build(spec, attention=attention)
    images = jax.ShapeDtypeStruct((2, *spec.image_size, 3), compute_dtype)
    with backend.numerics(numerics) if numerics != "tensorfloat32" else jax.default_matmul_precision("TF32_TF32_F32"):
        if mode == "train":
            loaded = backend.load(built, vitcmp.init_weights(spec), numerics=numerics)
            step, state = make_train_step(loaded, optimizer="adamw")
            traced = jax.jit(step).trace(state, images, jax.ShapeDtypeStruct((2,), jnp.int32))
        else:
            built.eval()
            graph, state = nnx.split(built)
            state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, param_dtype), state)
            traced = jax.jit(lambda state, images: nnx.merge(graph, state)(images)).trace(state, images)
        return traced.lower(lowering_platforms=(platform,)).as_text()


def products(text: str) -> list[str]:
    """Returns the lines of matmuls and convolutions."""
    return [line for line in text.splitlines() if "stablehlo.dot_general" in line or "stablehlo.convolution" in line]


def custom_calls(text: str, name: str = "main") -> list[str]:
    """Returns the targets of a function's custom calls, and of what it calls, as often as they run."""
    body = re.split(rf"func\.func \w+ @{name}\(", text)[1].split("\n  }\n", 1)[0]
    inner = [target for callee in re.findall(r"[ =]call @(\w+)\(", body) for target in custom_calls(text, callee)]
    return CUSTOM_CALL.findall(body) + inner


def num_attentions(model: str) -> int:
    spec = vitcmp.get_spec(model)
    return spec.depth + (spec.pool == "map")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, kernel) for family in VITS for kernel in ("xla", "chunked"))]
    + [(family, None) for family in SPECS if family not in VITS],
)
def test_float32_is_asked_for_in_every_matmul_and_convolution(backend, family, attention, mode, platform):
    """A default precision would be TF32 on a GPU and bfloat16 on a TPU."""
    lines = products(lower(backend, SPECS[family], platform=platform, mode=mode, attention=attention))
    assert len(lines) > 4
    assert [line for line in lines if line.count("HIGHEST") != 2] == []


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("numerics", ["bfloat16", "bfloat16_mixed"])
@pytest.mark.parametrize(
    ("family", "attention"),
    [("vit", "xla"), ("vitdet", "chunked"), ("resnet", None), ("bit", None), ("convnext", None)],
)
def test_a_train_step_in_bfloat16_multiplies_bfloat16_only(backend, family, attention, numerics, platform):
    lines = products(
        lower(backend, SPECS[family], platform=platform, mode="train", numerics=numerics, attention=attention)
    )
    operands = [re.findall(r"tensor<[^>]*?(\w+)>", line.split(" : (")[1].split("->")[0]) for line in lines]
    assert len(lines) > 10
    assert [line for line, types in zip(lines, operands, strict=True) if [t[-4:] for t in types] != ["bf16"] * 2] == []


@pytest.mark.parametrize("attention", ["xla", "chunked"])
def test_tensorfloat32_is_asked_for_by_name_in_every_matmul(backend, attention):
    """A convolution has no such name: it is left at its default, which is TF32 on NVIDIA GPUs."""
    text = lower(backend, SPECS["vitdet"], platform="cuda", mode="train", numerics="tensorfloat32", attention=attention)
    matmuls = [line for line in products(text) if "dot_general" in line]
    assert len(matmuls) > 10
    assert [line for line in matmuls if line.count("tf32") != 2] == []
    assert not any("HIGH" in line for line in products(text))


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("family", VITS)
def test_the_cudnn_kernel_is_called_for_each_attention(backend, cudnn, family, mode):
    text = lower(backend, SPECS[family], platform="cuda", mode=mode, numerics="bfloat16", attention="cudnn")
    name = f"__cudnn$fmha{'ScaleBiasSoftmax' if family in ('vitdet', 'neck') else 'Softmax'}"  # relative positions
    names = [name, f"{name}Backward"] if mode == "train" else [name]
    assert sorted(custom_calls(text)) == sorted(names * num_attentions(SPECS[family]))


@pytest.mark.parametrize(
    ("change", "mode", "words"),
    [
        ("width=36", "forward", "head dim must be <= "),
        ("window_size=3,image_size=48x48", "train", "Unsupported sequence length"),
    ],
)
def test_what_the_cudnn_kernel_does_not_take_it_refuses(backend, cudnn, change, mode, words):
    """The same that vitcmp.backend.why_unsupported knows beforehand."""
    with pytest.raises(NotImplementedError, match=words):
        lower(backend, f"{SPECS['vitdet']},{change}", platform="cuda", mode=mode, numerics="float16", attention="cudnn")


@pytest.mark.parametrize("numerics", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("family", VITS)
def test_the_pallas_kernel_is_called_for_each_attention(backend, family, mode, numerics):
    text = lower(backend, SPECS[family], platform="tpu", mode=mode, numerics=numerics, attention="pallas")
    num_kernels = 3 if mode == "train" else 1  # backward has one for dq and one for dk and dv
    assert custom_calls(text) == ["tpu_custom_call"] * (num_kernels * num_attentions(SPECS[family]))


@pytest.mark.parametrize(
    ("model", "platform", "attention", "numerics", "calls"),
    [
        ("vit_b16", "cuda", "cudnn", "bfloat16", ["__cudnn$fmhaSoftmax"] * 12),
        ("vit_b16:pool=map", "tpu", "pallas", "bfloat16", ["tpu_custom_call"] * 13),
        ("vit_b16:image_size=1024", "cuda", "chunked", "float32", []),
        ("vitdet_b16:image_size=1024", "tpu", "xla", "float32", []),
    ],
)
def test_full_size_models_lower_without_a_weight_in_memory(backend, cudnn, model, platform, attention, numerics, calls):
    text = lower(backend, model, platform=platform, attention=attention, numerics=numerics)
    assert custom_calls(text) == calls


def test_what_is_expanded_on_a_cpu_is_a_convolution_on_an_accelerator(backend):
    text = lower(backend, SPECS["convnext"], platform="cuda")
    assert text.count("stablehlo.convolution") == 2 + 2  # the stem, one downsampling, two blocks
    backend.convolution = "expanded"
    assert lower(backend, SPECS["convnext"], platform="cuda").count("stablehlo.convolution") == 2
