"""Peaks: dense, by exact name, with a source; nothing is guessed."""

import pytest

from vitcmp.backend import NUMERICS
from vitcmp.devices import PEAKS, peak_bytes_per_s, peak_flops, peak_source


@pytest.mark.parametrize(
    ("device_name", "numerics", "tflops"),
    [
        ("NVIDIA H200", "bfloat16", 989.5),
        ("NVIDIA H100 80GB HBM3", "float32", 67),  # 494 is its TF32
        ("NVIDIA H100 80GB HBM3", "tensorfloat32", 494.5),
        ("NVIDIA A100-SXM4-80GB", "float16", 312),
        ("NVIDIA GeForce RTX 4090", "float16", 165.2),  # 330 is with float16 accumulation
        ("NVIDIA L4", "bfloat16", 121),  # 242 is with sparsity
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("TPU v5 lite", "bfloat16", 197),
    ],
)
def test_peaks_are_the_datasheets_dense_rates(device_name, numerics, tflops):
    assert peak_flops(device_name, numerics) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "device_name",
    ["AMD EPYC", "", "NVIDIA H200 MIG 1g.18gb", "nvidia h200", "NVIDIA H300", "NVIDIA GeForce RTX 3080", "H100"],
)
def test_an_unknown_name_has_no_peak_and_no_neighbours(device_name):
    assert peak_flops(device_name, "bfloat16") is None
    assert peak_bytes_per_s(device_name) is None
    assert peak_source(device_name) is None


def test_what_a_device_has_no_unit_for_has_no_peak():
    assert peak_flops("Tesla T4", "bfloat16") is None
    assert peak_flops("Tesla V100-PCIE-32GB", "tensorfloat32") is None
    assert peak_flops("TPU v4", "float32") is None
    assert peak_flops("NVIDIA H200", "float64") is None


@pytest.mark.parametrize("device_name", PEAKS)
def test_every_entry_is_whole_and_plausible(device_name):
    peak = PEAKS[device_name]
    assert peak.source
    assert peak_bytes_per_s(device_name) == peak.memory_gb_per_s * 1e9
    assert 3e11 <= peak_bytes_per_s(device_name) <= 1e13
    known = {name: peak_flops(device_name, name) for name in NUMERICS if peak_flops(device_name, name) is not None}
    assert known
    assert all(8e12 <= flops <= 3e15 for flops in known.values())
    assert peak_flops(device_name, "bfloat16_mixed") == peak_flops(device_name, "bfloat16")
    if {"float32", "tensorfloat32", "bfloat16", "float16"} <= known.keys():
        # Tensor cores: TF32 at half the rate of 16 bit (which L4's and B200's datasheets round), never below float32.
        assert known["float32"] <= known["tensorfloat32"] < known["bfloat16"] == known["float16"]
        assert known["bfloat16"] / known["tensorfloat32"] == pytest.approx(2, rel=0.03)
