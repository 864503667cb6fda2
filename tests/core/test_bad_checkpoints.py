"""Bad checkpoints: one ValueError each, with path, fault and what is allowed; a failed save loses nothing."""

import argparse
import errno
import hashlib
import io
import os
import pickle
import resource

import numpy as np
import pytest

from tests.core.damaged_files import array_file, damaged_header, encrypted, huge_header, npz_of, zip_of
from vitcmp.checkpoints import from_timm, load_weights, save_weights, to_timm, weights_id
from vitcmp.params import init_weights

TINY = "vit_ti16:depth=1,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=80x112"
VITDET = TINY.replace("vit_", "vitdet_") + ",global_blocks=0,window_size=3"


class Danger:
    """A pickle that would leave a trace if anyone ran it."""

    def __reduce__(self):
        return os.mkdir, ("ran-a-pickle",)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Runs each test in a folder of its own, in which no pickle may have run."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "ran-a-pickle").exists()


def bytes_of(suffix, weights=None):
    save_weights(f"good{suffix}", weights or init_weights(TINY))
    with open(f"good{suffix}", "rb") as file:
        return file.read()


def nan_filled():
    return {name: np.full_like(array, np.nan) for name, array in init_weights(TINY).items()}


def without_one():
    weights = init_weights(TINY)
    weights["head/kernle"] = weights.pop("head/kernel")
    weights["norm/scale"] = weights["norm/scale"][:7]
    return weights


def transposed_qkv():
    state = to_timm(init_weights(TINY), TINY)
    return state | {"blocks.0.attn.qkv.weight": state["blocks.0.attn.qkv.weight"].T}


def flip(content, position):
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


BAD_FILES = {
    "empty": ("w.npz", lambda: b"", "is empty"),
    "no suffix": ("weights", lambda: b"x", "unknown file type ''; allowed: .safetensors, .npz, .pth, .pt, .bin"),
    "misspelt suffix": ("w.safetensor", lambda: b"x", "unknown file type '.safetensor'; did you mean '.safetensors'?"),
    "another suffix": ("w.onnx", lambda: b"x", "unknown file type '.onnx'"),
    "no safetensors": ("w.safetensors", lambda: b"hello, I am a text", "not a safetensors file, or a truncated one"),
    "cut safetensors": ("w.safetensors", lambda: bytes_of(".safetensors")[:-9], "not a safetensors file, or a trunc"),
    "cut in the header": ("w.safetensors", lambda: bytes_of(".safetensors")[:99], "not a safetensors file, or a trunc"),
    "npz as safetensors": ("w.safetensors", lambda: bytes_of(".npz"), "not a safetensors file, or a truncated one"),
    "no npz": ("w.npz", lambda: b"hello, I am a text", "not an .npz file of arrays (a pickle, a single array, or"),
    "cut npz": ("w.npz", lambda: bytes_of(".npz")[:-999], "not an .npz file of arrays (a pickle, a single array, or"),
    "flipped bit": ("w.npz", lambda: flip(bytes_of(".npz"), 3000), "or a damaged one: Bad CRC-32"),
    "damaged header": ("w.npz", lambda: damaged_header(), "not an .npz file of plain arrays, or a damaged one"),
    "encrypted": ("w.npz", lambda: encrypted(), "norm/bias.npy: encrypted, or not packed as numpy packs arrays"),
    "single array": ("w.npz", lambda: array_file(np.ones(3)), "not an .npz file of arrays (a pickle, a single array"),
    "pickle as npz": ("w.npz", lambda: pickle.dumps(Danger()), "not an .npz file of arrays (a pickle, a single array"),
    "objects in npz": ("w.npz", lambda: npz_of(head=np.array([Danger()])), "Object arrays cannot be loaded"),
    "torch as npz": ("w.npz", lambda: zip_of(archive__data__pkl=b"x"), "holds archive/data/pkl, as a torch file does"),
    "no arrays": ("w.npz", lambda: npz_of(), "no arrays in it"),
    "huge": ("w.npz", lambda: zip_of(**{"w.npy": huge_header()}), "its arrays are larger than the memory: Unable to"),
    "integers": ("w.npz", lambda: npz_of(norm=np.ones(3, int)), "not of floating point: norm (int64); allowed are"),
    "NaN": ("w.npz", lambda: bytes_of(".npz", nan_filled()), "pos_embed has values that are not finite"),
    "wrong model": ("w.npz", lambda: bytes_of(".npz", init_weights("resnet18:width=8")), "missing norm/bias (48,)"),
    "wrong model, timm": (
        "w.safetensors",
        lambda: bytes_of(".safetensors", to_timm(init_weights("resnet18:width=8"), "resnet18:width=8")),
        "missing norm.bias (48,)",
    ),
    "transposed, timm": (
        "w.npz",
        lambda: bytes_of(".npz", transposed_qkv()),
        "blocks.0.attn.qkv.weight has shape (48, 144), expected (144, 48)",
    ),
    "wrong classes": (
        "w.npz",
        lambda: bytes_of(".npz", init_weights(f"{TINY},num_classes=7")),
        "head/kernel has shape (48, 7), expected (48, 10)\n  head/bias has shape (7,), expected (10,)",
    ),
    "misspelt name": ("w.npz", lambda: bytes_of(".npz", without_one()), "(48, 10); did you mean 'head/kernel'?"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_clear_error(folder, case):
    name, content, message = BAD_FILES[case]
    (folder / name).write_bytes(content())
    with pytest.raises(ValueError) as caught:
        load_weights(folder / name, TINY)
    assert str(caught.value).startswith(f"{folder / name}: ")
    assert message in str(caught.value)


def test_every_fault_of_a_file_is_in_the_one_error(folder):
    save_weights("w.npz", without_one())
    with pytest.raises(ValueError) as caught:
        load_weights("w.npz", TINY)
    for fault in ("3 of its arrays", "missing head/kernel", "unexpected head/kernle", "norm/scale has shape (7,)"):
        assert fault in str(caught.value)


def torch_file(content, **options):
    buffer = io.BytesIO()
    pytest.importorskip("torch").save(content, buffer, **options)
    return buffer.getvalue()


def state():
    torch = pytest.importorskip("torch")
    return {name: torch.from_numpy(array) for name, array in to_timm(init_weights(TINY), TINY).items()}


def four_bits():
    torch = pytest.importorskip("torch")
    return torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


BAD_TORCH_FILES = {
    "text": (lambda: b"hello, I am a text", "not a torch file, a damaged one, or one of a newer pickle"),
    "cut": (lambda: torch_file(state())[:-999], "not a torch file, a damaged one"),
    "cut, old format": (lambda: torch_file(state(), _use_new_zipfile_serialization=False)[:-9], "not a torch file"),
    "newer protocol": (lambda: torch_file(state(), pickle_protocol=4), "one of a newer pickle protocol than 2"),
    "npz": (lambda: bytes_of(".npz"), "not a torch file, a damaged one"),
    "plain pickle": (lambda: pickle.dumps(Danger(), protocol=2), "holds a pickled posix.mkdir, which is never"),
    "object": (lambda: torch_file({"model": state(), "by": Danger()}), "holds a pickled posix.mkdir, which is never"),
    "whole model": (lambda: torch_file(pytest.importorskip("torch").nn.Linear(2, 2)), "holds a pickled torch.nn.modul"),
    "list": (lambda: torch_file([1, 2]), "not a state dict: the file (list); allowed is a dict of tensors"),
    "single tensor": (lambda: torch_file(state()["norm.bias"]), "not a state dict: the file (tensor)"),
    "another wrapper": (lambda: torch_file({"net": state(), "epoch": 3}), "not a state dict: net (dict), epoch (int)"),
    "arguments alone": (lambda: torch_file({"args": argparse.Namespace()}), "not a state dict: args (Namespace)"),
    "four bits": (lambda: torch_file({"w": four_bits()}), "not a state dict: w (torch.float4_e2m1fn_x2); allowed is"),
    "cut in the first half": (lambda: torch_file(state())[: len(torch_file(state())) // 4], "not a torch file, a da"),
    "numbered": (lambda: torch_file(dict(enumerate(state().values()))), "not a state dict: 0 (tensor), 1 (tensor)"),
    "sparse": (lambda: torch_file({"w": state()["head.weight"].to_sparse()}), "w (a sparse, quantized or meta tensor)"),
    "empty dict": (lambda: torch_file({}), "no arrays in it"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
@pytest.mark.parametrize("case", BAD_TORCH_FILES)
def test_a_bad_torch_file_is_one_clear_error(folder, case, suffix):
    pytest.importorskip("torch")
    content, message = BAD_TORCH_FILES[case]
    path = folder / f"w{suffix}"
    path.write_bytes(content())
    with pytest.raises(ValueError) as caught:
        load_weights(path, TINY)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_torch_file_without_torch_says_what_to_install(folder, monkeypatch):
    (folder / "w.pth").write_bytes(b"x")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(
        ValueError, match=r"w.pth: torch files need torch: pip install 'vitcmp\[torch\]', or give a .safe"
    ):
        load_weights("w.pth", TINY)


@pytest.mark.parametrize("read", [lambda path: load_weights(path, TINY), weights_id])
def test_a_path_that_is_no_file_is_named(folder, read):
    save_weights("weights.npz", init_weights(TINY))
    with pytest.raises(ValueError, match=r"wieghts.npz: no such file; did you mean 'weights.npz'\?"):
        read("wieghts.npz")
    with pytest.raises(ValueError, match=r"~nobody-of-that-name/weights\.npz: no such file"):
        read("~nobody-of-that-name/weights.npz")
    with pytest.raises(ValueError, match=r"nowhere/weights\.npz: no such file"):
        read("nowhere/weights.npz")
    with pytest.raises(ValueError, match="is a folder, not a file of weights"):
        read(folder)
    with pytest.raises(ValueError, match=r"a\.npz: cannot be read: File name too long"):
        read("a" * 300 + ".npz")
    with pytest.raises(ValueError, match="is not a regular file"):
        read("/dev/null")


@pytest.mark.parametrize("model", ["timm:vit_tiny_patch16_224", "big_vision:vit/B/16"])
def test_a_model_of_another_library_has_no_canonical_weights(model):
    with pytest.raises(ValueError, match="has no canonical weights"):
        load_weights("nothing.npz", model)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_named():
    save_weights("w.npz", init_weights(TINY))
    os.chmod("w.npz", 0)
    with pytest.raises(ValueError, match=r"w\.npz: cannot be read: .*Permission denied"):
        load_weights("w.npz", TINY)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dist_token", r"a distillation token \(dist_token\)"),
        ("head_dist.weight", r"a distillation head \(head_dist.weight\)"),
        ("fc_norm.weight", r"a norm after pooling \(fc_norm.weight\)"),
        ("reg_token", r"register tokens \(reg_token\)"),
        ("norm_pre.weight", r"a norm before the blocks \(CLIP\) or before pooling .*norm_pre.weight"),
        ("blocks.0.ls1.gamma", r"layer scale in a ViT \(blocks.0.ls1.gamma\)"),
        ("blocks.0.attn.q_norm.weight", r"norms of queries and keys \(blocks.0.attn.q_norm.weight\)"),
        ("stages.0.blocks.0.mlp.grn.weight", r"the response normalisation of ConvNeXt V2"),
    ],
)
def test_timm_variants_that_no_spec_describes_are_named(name, message):
    arrays = {**to_timm(init_weights(TINY), TINY), name: np.ones(48, np.float32)}
    with pytest.raises(ValueError, match=f"mine.pth: this variant is not supported: it has {message}"):
        from_timm(arrays, TINY, source="mine.pth")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "deit_tiny_distilled_patch16_224",
            {},
            "a distillation token (dist_token); a distillation head (head_dist.weight",
        ),
        (
            "vit_base_patch16_224",
            {"fc_norm": True, "global_pool": "avg"},
            "a norm after pooling (fc_norm.weight, fc_norm",
        ),
        ("vit_base_patch16_reg4_gap_256", {}, "register tokens (reg_token)"),
        ("vit_small_patch14_dinov2", {}, "layer scale in a ViT (blocks.0.ls1.gamma, blocks.0.ls2.gamma"),
    ],
)
def test_timms_own_variants_are_refused_by_what_they_have(name, options, message):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, depth=1, embed_dim=48, num_heads=3, **options)
    with pytest.raises(ValueError, match="not supported") as caught:
        from_timm(model.state_dict(), TINY)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (f"{VITDET},neck_dim=16", "w.npz: .* must be a ViTDet with neck_dim=0: a plain ViT has no weights for a neck"),
        (f"{VITDET},width=24", "w.npz: upcycled weights: .* of its arrays do not fit"),
        (f"{TINY},pool=gap", r"w.npz: 1 of its arrays do not fit .*\n  unexpected cls_token \(1, 1, 48\)"),
    ],
)
def test_a_plain_vits_file_that_does_not_fit_is_named(model, message):
    save_weights("w.npz", init_weights(TINY))
    with pytest.raises(ValueError, match=message):
        load_weights("w.npz", model)


def test_a_vitdets_file_does_not_pass_for_a_plain_vits():
    save_weights("w.npz", init_weights(VITDET))
    with pytest.raises(ValueError, match=r"missing cls_token \(1, 1, 48\)\n  unexpected blocks/0/attn/rel_pos_h"):
        load_weights("w.npz", TINY)
    weights = init_weights(VITDET)
    del weights["blocks/0/attn/rel_pos_w"]  # not taken for a plain ViT's, whose tables would start at zero
    save_weights("w.npz", weights)
    with pytest.raises(ValueError, match=r"1 of its arrays do not fit .*\n  missing blocks/0/attn/rel_pos_w"):
        load_weights("w.npz", VITDET)


def test_what_a_timm_file_has_too_much_is_named():
    arrays = {**to_timm(init_weights(TINY), TINY), "blocks.1.norm1.weight": np.ones(48), "aux.bias": np.ones(2)}
    with pytest.raises(
        ValueError, match=r"2 of its .*\n  unexpected blocks\.1\.norm1\.weight \(48,\).*\n  unexpected aux"
    ):
        from_timm(arrays, TINY)


def test_weights_are_checked_before_they_are_given_timms_names():
    with pytest.raises(ValueError, match="weights: 3 of its arrays do not fit"):
        to_timm(without_one(), TINY)


@pytest.mark.parametrize(
    ("path", "weights", "message"),
    [
        (
            "w.pth",
            {"a": np.ones(2)},
            "w.pth: unknown file type '.pth'; did you mean '.npz'?; allowed: .npz, .safetensors",
        ),
        (
            "w.npy",
            {"a": np.ones(2)},
            "w.npy: unknown file type '.npy'; did you mean '.npz'?; allowed: .npz, .safetensors",
        ),
        ("nowhere/w.npz", {"a": np.ones(2)}, "nowhere/w.npz: cannot be written, no folder nowhere"),
        ("folder.npz", {"a": np.ones(2)}, "folder.npz: cannot be written, it is a folder"),
        ("w.npz", {"a": np.array([Danger()])}, "weights: not of floating point: a (object)"),
        ("w.npz", {}, "weights: no arrays in it"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(folder, path, weights, message):
    (folder / "folder.npz").mkdir()
    with pytest.raises(ValueError) as caught:
        save_weights(path, weights)
    assert message in str(caught.value)
    assert [item.name for item in folder.iterdir()] == ["folder.npz"]


@pytest.fixture
def full_disk():
    """No file may grow past 10 kB, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_full_disk_leaves_the_old_file_and_no_half_one(folder, suffix, full_disk):
    path = folder / f"w{suffix}"
    save_weights(path, {"old": np.ones(3)})
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"not written, nothing was changed: File too large: '.*/w"):
        save_weights(path, init_weights(TINY))
    assert path.read_bytes() == before
    assert [item.name for item in folder.iterdir()] == [path.name]


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(folder, monkeypatch):
    def refuse(*paths):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="nothing was changed: Read-only file system"):
        save_weights("w.npz", {"a": np.ones(3)})
    assert not [*folder.iterdir()]


def test_the_id_of_weights_is_the_hash_of_their_file():
    save_weights("a.npz", init_weights(TINY))
    save_weights("b.npz", init_weights(TINY))
    save_weights("c.npz", init_weights(TINY, seed=1))
    with open("a.npz", "rb") as file:
        assert weights_id("a.npz") == "sha256:" + hashlib.sha256(file.read()).hexdigest()
    assert weights_id("a.npz") == weights_id("b.npz")
    assert weights_id("a.npz") != weights_id("c.npz")
    a_part, another = weights_id("a.npz:img"), weights_id("a.npz:txt")
    assert a_part.startswith(weights_id("a.npz") + ":")
    assert len({weights_id("a.npz"), a_part, another}) == 3
