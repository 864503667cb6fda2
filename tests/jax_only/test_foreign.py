"""big_vision's models behind our interface: on a small stand-in of its package, and on its sources where they are."""

import os
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp
import scipy.ndimage

import vitcmp
from jax_models.backend import JaxBackend
from tests.big_vision_files import augreg, bit_dump, scanned
from tests.harness.fakes import make_case
from tests.parity.helpers import relative_error
from vitcmp import worker
from vitcmp.backend import Unsupported, load_backend
from vitcmp.big_vision import to_big_vision
from vitcmp.records import validate_record

IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 48, 80, 3)).astype(np.float32).astype(np.float64)
LABELS = np.array([1, 7])
VIT, BIT = "big_vision:vit/mu/16:num_classes=10,image_size=48x80", "big_vision:bit/50x2:num_classes=10,image_size=48x80"
# Models of a few lines with big_vision's constructors, return values and names, written for these tests.
FAKE_VIT = """
import flax.linen as nn
import jax
import jax.numpy as jnp
from big_vision import utils  # which imports TensorFlow

class _Model(nn.Module):
    num_classes: int
    variant: str
    pool_type: str = "gap"
    posemb: str = "learn"
    rep_size: int = 0
    dtype_mm: str = "float32"

    @nn.compact
    def __call__(self, image, *, train=False):
        out = {}
        x = nn.Conv(8, (16, 16), strides=(16, 16), name="embedding", dtype=self.dtype_mm)(image.astype(self.dtype_mm))
        b, h, w, d = x.shape
        x = x.reshape(b, h * w, d)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, h * w, d), x.dtype)
        out["with_posemb"] = x
        x = x + nn.Dense(8, dtype=self.dtype_mm, name="mlp")(x)
        out["encoder"] = {"block00": {"+mlp": x, "sa": x}}
        out["encoded"] = x
        out["head_input"] = out["pre_logits"] = x = x.mean(axis=1)
        head = nn.Dense(self.num_classes, name="head")
        out["logits_2d"] = head(out["encoded"])
        return head(x), out

def Model(num_classes=None, *, variant=None, **options):
    return _Model(num_classes, variant, **options)
"""
FAKE_BIT = """
import flax.linen as nn
from big_vision.models import common

class Model(nn.Module):
    num_classes: int
    width: float = 1
    depth: int = 50

    @nn.compact
    def __call__(self, image, *, train=False):
        out = {}
        x = out["stem"] = nn.Conv(4 * self.width, (3, 3), (2, 2), name="conv_root")(image)
        x = out["stage1"] = nn.relu(x)
        out["stage2"] = {"unit01": x, "unit02": 2 * x}
        out["pre_logits_2d"] = x = 2 * x
        out["pre_logits"] = x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, name="head")(x), out
"""


def write_package(root: Path, **models: str) -> Path:
    folder = root / "big_vision" / "models"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").write_text("")
    (folder.parent / "utils.py").write_text("raise ImportError('the models need none of this')\n")
    (folder / "common.py").write_text("import big_vision.utils as u\n")
    for name, source in models.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
    return root


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BIG_VISION_PATH", str(write_package(tmp_path, vit=FAKE_VIT, bit=FAKE_BIT)))
    return tmp_path


@pytest.fixture
def backend() -> JaxBackend:
    return load_backend("jax", platform="cpu")


def load(backend, name, weights=None, *, numerics="float32"):
    return backend.load(backend.build(vitcmp.get_spec(name)), weights, numerics=numerics)


def weights_of(backend, name) -> dict[str, np.ndarray]:
    rng, model = np.random.default_rng(2), backend.build(vitcmp.get_spec(name))
    return {key: rng.standard_normal(x.shape).astype(np.float32) for key, x in sorted(model.variables.items())}


def test_outputs_are_the_librarys_under_our_names(fake, backend):
    out = backend.outputs(load(backend, VIT, weights_of(backend, VIT)), IMAGES)
    assert set(out) == {"stem", "block/0", "features", "pooled", "pre_logits", "logits"}
    assert out["logits"].shape == (2, 10) and out["block/0"].shape == (2, 15, 8)
    out = backend.outputs(load(backend, BIT, weights_of(backend, BIT)), IMAGES)
    assert set(out) == {"stem", "stage/0", "stage/1", "features", "pre_logits", "logits"}
    np.testing.assert_array_equal(out["stage/1"], out["features"])
    assert out["stem"].shape == (2, 24, 40, 8)  # bit/50x2 is twice as wide


def test_importing_big_vision_leaves_no_trace_and_needs_no_tensorflow(fake, backend):
    modules, path = set(sys.modules), list(sys.path)
    backend.build(vitcmp.get_spec(VIT))
    assert not any(name.partition(".")[0] in ("big_vision", "tensorflow") for name in set(sys.modules) - modules)
    assert sys.path == path


def outputs_of(model, images) -> dict[str, jax.Array]:
    out: dict[str, jax.Array] = {}
    model(images, out)
    return out


def test_two_builds_are_of_one_class(fake, backend):
    """Two imports of one file would give two classes of model, which no cache of jax takes for one."""
    first, second = (backend.build(vitcmp.get_spec(VIT)) for _ in range(2))
    assert type(first.library) is type(second.library)


@pytest.mark.parametrize(
    ("path", "words"),
    [(None, "need BIG_VISION_PATH"), ("", "need BIG_VISION_PATH"), ("/nowhere", "'/nowhere' has no big_vision/models")],
)
def test_a_path_that_leads_to_no_big_vision_is_a_clear_error(backend, monkeypatch, path, words):
    monkeypatch.delenv("BIG_VISION_PATH", raising=False)
    if path is not None:
        monkeypatch.setenv("BIG_VISION_PATH", path)
    assert "big_vision" not in backend.describe().versions
    with pytest.raises(ValueError, match=words):
        backend.build(vitcmp.get_spec(VIT))


def test_a_package_that_big_vision_needs_is_named(tmp_path, backend, monkeypatch):
    monkeypatch.setenv("BIG_VISION_PATH", str(write_package(tmp_path, vit="import nothing_like_it")))
    with pytest.raises(ValueError, match="'nothing_like_it': pip install"):
        backend.build(vitcmp.get_spec(VIT))


def test_the_version_is_a_hash_of_the_sources(fake, backend):
    before = backend.describe().versions["big_vision"]
    (fake / "big_vision" / "models" / "bit.py").write_text(FAKE_BIT + "# changed\n")
    assert before.startswith("sha256:") and backend.describe().versions["big_vision"] != before


def test_weights_go_in_and_out_by_the_librarys_names_strictly(fake, backend):
    weights = backend.export(load(backend, VIT))
    assert set(weights) == {
        "embedding/kernel", "embedding/bias", "pos_embedding", "mlp/kernel", "mlp/bias", "head/kernel", "head/bias",
    }  # fmt: skip
    assert weights["mlp/kernel"].std() > 0
    changed = {name: array + 1 for name, array in weights.items()}
    assert all(np.array_equal(changed[name], x) for name, x in backend.export(load(backend, VIT, changed)).items())
    changed["head/bais"] = changed.pop("head/bias")
    changed["mlp/bias"] = changed["mlp/bias"][1:]
    with pytest.raises(ValueError) as error:
        load(backend, VIT, changed)
    for words in ("big_vision:vit/mu/16", "missing head/bias", "did you mean 'head/bias'", "mlp/bias has shape (7,)"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("numerics", "compute", "params"),
    [
        ("float64", "float64", {"float64"}),
        ("bfloat16", "bfloat16", {"bfloat16"}),
        ("float16", "float16", {"float16"}),
        ("bfloat16_mixed", "bfloat16", {"float32", "bfloat16"}),  # a position embedding is drawn in dtype_mm
    ],
)
def test_numerics_reach_parameters_and_the_dtype_that_the_library_computes_in(fake, backend, numerics, compute, params):
    with backend.numerics(numerics):
        model = load(backend, VIT, weights_of(backend, VIT), numerics=numerics)
        assert {variable[...].dtype.name for variable in model.variables.values()} == params
        assert model.library.dtype_mm == compute
        out = jax.eval_shape(lambda images: outputs_of(model, images), jnp.asarray(IMAGES, model.compute_dtype))
    assert out["block/0"].dtype.name == compute
    assert ("mixed" in model.effective()) == (numerics == "bfloat16_mixed")


def test_what_the_library_does_not_have_is_unsupported(fake, backend):
    with pytest.raises(Unsupported, match="bit/50x2"):
        load(backend, BIT, numerics="bfloat16_mixed")
    with pytest.raises(Unsupported, match="attention='xla'"):
        backend.build(vitcmp.get_spec(VIT), attention="xla")
    with pytest.raises(ValueError, match="backend=torch only"):
        backend.build(vitcmp.get_spec("timm:resnet18"))


def test_flops_that_no_output_needs_are_not_counted(fake, backend):
    """The head is applied to every token too, for an output that nobody asks for."""
    tokens, patch, width = 15, 16 * 16 * 3, 8
    assert backend.count_flops(vitcmp.get_spec(VIT)) == 2 * (tokens * (patch * width + width**2) + width * 10)


@pytest.mark.parametrize(("model", "mode"), [(VIT, "forward"), (BIT, "train")])
def test_a_case_becomes_a_valid_record(fake, backend, model, mode):
    device = backend.describe()
    spec = {"family": "big_vision"}
    case = make_case(
        backend="jax",
        model=model,
        spec=spec,
        image_size="48x80",
        mode=mode,
        attention=None,
        compile="jit",
        layout="nhwc",
        device_name=device.name,
        num_threads=device.num_threads,
    )
    record = worker.measure(case, 0, None)
    assert record["status"] == "ok", record["error"]
    assert validate_record(record) == []
    assert record["flops"]["analytic"] is None and record["flops"]["counted"] > 0
    assert record["effective"]["library"] == {"big_vision": device.versions["big_vision"]}


@pytest.fixture
def sources(backend) -> str:
    path = os.environ.get("BIG_VISION_PATH")
    if not path:
        pytest.skip("BIG_VISION_PATH is unset: no sources of big_vision to compare with")
    return path


MU = "width=32,depth=1,mlp_dim=128,num_heads=2,gelu=tanh"
# Ours, and how far apart. The MLP of big_vision's MAP head is told no dtype, and so computes in float32 always.
PAIRS = {
    "vit/mu/16": (f"vit_ti16:{MU},pool=gap", 1e-9),
    "vit/mu/8:pool=map,rep_size=true": (f"vit_ti8:{MU},pool=map,rep_size=32", 1e-6),
    "vit/mu/16:pool=tok": (f"vit_ti16:{MU},pool=tok", 1e-9),
    "bit_paper/26": ("bit_r26x1:weight_eps=1e-10,stem_pad=lowest", 1e-9),
    "bit/26": ("bit_v1_r26x1:width_factor=1", 1e-9),
}


@pytest.mark.slow
@pytest.mark.parametrize("theirs", PAIRS)
def test_our_model_and_big_visions_are_one_by_our_interface_alone(sources, backend, theirs):
    overrides, bound = PAIRS[theirs]
    ours = vitcmp.get_spec(overrides + ",num_classes=10,image_size=48x80")
    weights = vitcmp.init_weights(ours)
    name = f"big_vision:{theirs}{',' if ':' in theirs else ':'}num_classes=10,image_size=48x80"
    state = to_big_vision(weights, ours)
    expected = vitcmp.forward("jax", name, state, IMAGES, numerics="float64", device="cpu")
    out = vitcmp.forward("jax", ours, weights, IMAGES, numerics="float64", device="cpu")
    if ours.family == "vit" and ours.pool == "tok":
        out["stem"] = out["stem"][:, 1:]
    shared = expected.keys() & out.keys()
    assert {"logits", "pre_logits", "features", "stem"} <= shared
    assert max(relative_error(out[key], expected[key]) for key in shared) < bound
    assert backend.count_flops(vitcmp.get_spec(name)) == vitcmp.count_flops(ours).total
    assert backend.count_params(backend.build(vitcmp.get_spec(name))) == vitcmp.count_params(ours)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [scanned, lambda tree: augreg(tree, np.full((1, 1, 32), 0.5))])
def test_older_layouts_and_another_size_are_read_as_big_vision_reads_them(sources, backend, layout):
    """Its zoom of positions goes from corner to corner: 2x2 patches to 4x4 here."""
    ours = vitcmp.get_spec(f"vit_ti16:{MU},pool=tok,num_classes=10,image_size=32")
    weights = vitcmp.init_weights(ours)
    tree = to_big_vision(weights, ours)
    positions = scipy.ndimage.zoom(tree["pos_embedding"].reshape(2, 2, -1), (2, 2, 1), order=1)
    expected = tree | {"pos_embedding": positions.reshape(1, 16, -1)}
    if layout is not scanned:
        expected["cls"] = expected["cls"] + np.float32(0.5)
    images = np.random.default_rng(3).uniform(-1, 1, (1, 64, 64, 3))
    name = "big_vision:vit/mu/16:pool=tok,num_classes=10"
    out = [vitcmp.forward("jax", name, state, images)["logits"] for state in (layout(tree), expected)]
    np.testing.assert_allclose(*out, atol=1e-6)


def test_positions_that_big_vision_cannot_resample_are_refused(sources, backend):
    """2x2 patches: 2x8 are 16 too, and no square."""
    ours = vitcmp.get_spec(f"vit_ti16:{MU},pool=gap,num_classes=10,image_size=32")
    tree = to_big_vision(vitcmp.init_weights(ours), ours)
    for size, rows in (("32x128", 16), ("48x80", 15)):
        with pytest.raises(ValueError, match=rf"pos_embedding has shape \(1, 4, 32\), expected \(1, {rows}, 32\)"):
            load(backend, f"big_vision:vit/mu/16:num_classes=10,image_size={size}", tree)
    broken = tree | {"pos_embedding": np.zeros(5, np.float32)}
    with pytest.raises(ValueError, match=r"pos_embedding has shape \(5,\)"):
        load(backend, "big_vision:vit/mu/16:num_classes=10,image_size=64", broken)


def test_loading_leaves_the_weights_that_it_was_given_as_they_were(sources, backend):
    ours = vitcmp.get_spec(f"vit_ti16:{MU},pool=tok,num_classes=10,image_size=32")
    tree = augreg(to_big_vision(vitcmp.init_weights(ours), ours), np.full((1, 1, 32), 0.5))
    before = {name: array.copy() for name, array in tree.items()}
    load(backend, "big_vision:vit/mu/16:pool=tok,num_classes=10,image_size=32", tree)
    assert all(np.array_equal(tree[name], array) for name, array in before.items())


@pytest.mark.slow
def test_a_dump_of_bit_is_read_as_big_vision_reads_it(sources, backend):
    ours = vitcmp.get_spec("bit_r26x1:num_classes=10")
    weights = vitcmp.init_weights(ours)
    name = "big_vision:bit_paper/26:num_classes=10"
    states = (bit_dump(weights, is_numbered=True), to_big_vision(weights, ours))
    np.testing.assert_array_equal(*[vitcmp.forward("jax", name, state, IMAGES)["logits"] for state in states])


@pytest.mark.parametrize("model", ["big_vision:bit_paper/26", "big_vision:vit/mu/16"])
def test_weights_of_another_family_are_listed_as_what_does_not_fit(sources, backend, model):
    other = to_big_vision(vitcmp.init_weights(ours := f"vit_ti16:{MU},num_classes=10,pool=map"), ours)
    with pytest.raises(ValueError, match=f"of its arrays do not fit {model}"):
        load(backend, f"{model}:num_classes=10,image_size=48x80", other)
