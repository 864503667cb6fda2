"""Peak arithmetic and memory rates by exact device name, each with its source; a device not listed has none.

Dense rates of one *device* as the framework lists it. NVIDIA's tensor rates are those with float32 accumulation, which
is what matmuls and convolutions ask for: on GeForce, half of the float16 figure that is advertised. Rates printed "with
sparsity" are halved. float32 is float32 without TF32: H100 has 67 TFLOP/s there, and 494 is its TF32.
"""

from typing import NamedTuple


class Peak(NamedTuple):
    """Rates in TFLOP/s and GB/s; None where the device has no such unit or its maker prints no figure."""

    float32: float | None
    tensorfloat32: float | None
    bfloat16: float | None
    float16: float | None
    memory_gb_per_s: float
    source: str


_HOPPER = "datasheet, tensor rates there with sparsity"
_A100 = "NVIDIA A100 datasheet, dense column"
_GA102 = "NVIDIA Ampere GA102 whitepaper v2"
_ADA = "NVIDIA Ada GPU architecture whitepaper v2, appendix A"
_RTX_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A"
_V100 = "NVIDIA V100 datasheet (2020)"
_TPU = "docs.cloud.google.com/tpu/docs"

# The names are those of the driver, of torch.cuda.get_device_name and of jax's device_kind, which are the same. A name
# that several products share (GeForce RTX 3080: 10 and 12 GB) is left out, and so is a part of a GPU (MIG).
PEAKS: dict[str, Peak] = {
    # HGX B200 column of "Individual Blackwell GPU specifications", where TF32 is printed as 2.2 PFLOPS with sparsity.
    "NVIDIA B200": Peak(75, 1100, 2250, 2250, 7700, "NVIDIA Blackwell datasheet, tensor rates there with sparsity"),
    "NVIDIA GH200 480GB": Peak(67, 494.5, 989.5, 989.5, 4000, f"NVIDIA GH200 {_HOPPER}"),
    "NVIDIA H200": Peak(67, 494.5, 989.5, 989.5, 4800, f"NVIDIA H200 {_HOPPER}; SXM column"),
    "NVIDIA H200 NVL": Peak(60, 417.5, 835.5, 835.5, 4800, f"NVIDIA H200 {_HOPPER}; NVL column"),
    "NVIDIA H100 80GB HBM3": Peak(67, 494.5, 989.5, 989.5, 3350, f"NVIDIA H100 {_HOPPER}; SXM column"),
    "NVIDIA H100 NVL": Peak(60, 417.5, 835.5, 835.5, 3900, f"NVIDIA H100 {_HOPPER}; NVL column"),
    "NVIDIA H100 PCIe": Peak(51, 378, 756.5, 756.5, 2000, f"NVIDIA H100 {_HOPPER}; PCIe column (2022)"),
    "NVIDIA A100-SXM4-40GB": Peak(19.5, 156, 312, 312, 1555, _A100),
    "NVIDIA A100-SXM4-80GB": Peak(19.5, 156, 312, 312, 2039, _A100),
    "NVIDIA A100-PCIE-40GB": Peak(19.5, 156, 312, 312, 1555, _A100),
    "NVIDIA A100 80GB PCIe": Peak(19.5, 156, 312, 312, 1935, _A100),
    "NVIDIA A30": Peak(10.3, 82, 165, 165, 933, "NVIDIA A30 datasheet, dense column"),
    "NVIDIA A10": Peak(31.2, 62.5, 125, 125, 600, "NVIDIA A10 datasheet, dense column"),
    "NVIDIA A40": Peak(37.4, 74.8, 149.7, 149.7, 696, "NVIDIA A40 datasheet, dense column"),
    "NVIDIA L4": Peak(30.3, 60, 121, 121, 300, "NVIDIA L4 datasheet, tensor rates there with sparsity"),
    "NVIDIA L40": Peak(90.5, 90.5, 181.05, 181.05, 864, "NVIDIA L40 datasheet, dense column"),
    "NVIDIA L40S": Peak(91.6, 183, 362.05, 362.05, 864, "NVIDIA L40S datasheet, dense column"),
    "NVIDIA RTX A6000": Peak(38.7, 77.4, 154.8, 154.8, 768, f"{_GA102}, appendix C"),
    "NVIDIA GeForce RTX 3070": Peak(20.3, 20.3, 40.6, 40.6, 448, f"{_GA102}, appendix A"),
    "NVIDIA GeForce RTX 3090": Peak(35.6, 35.6, 71, 71, 936, f"{_GA102}, appendix A"),
    "NVIDIA GeForce RTX 3090 Ti": Peak(40, 40, 80, 80, 1008, _ADA),
    "NVIDIA GeForce RTX 4080": Peak(48.7, 48.7, 97.5, 97.5, 716.8, _ADA),
    "NVIDIA GeForce RTX 4090": Peak(82.6, 82.6, 165.2, 165.2, 1008, _ADA),
    "NVIDIA GeForce RTX 5080": Peak(56.3, 56.3, 112.6, 112.6, 960, _RTX_BLACKWELL),
    "NVIDIA GeForce RTX 5090": Peak(104.8, 104.8, 209.5, 209.5, 1792, _RTX_BLACKWELL),
    "Tesla T4": Peak(8.1, None, None, 65, 320, "NVIDIA T4 datasheet and product brief"),
    "Tesla V100-SXM2-16GB": Peak(15.7, None, None, 125, 900, _V100),
    "Tesla V100-SXM2-32GB": Peak(15.7, None, None, 125, 900, _V100),
    "Tesla V100-PCIE-16GB": Peak(14, None, None, 112, 900, _V100),
    "Tesla V100-PCIE-32GB": Peak(14, None, None, 112, 900, _V100),
    "Tesla V100S-PCIE-32GB": Peak(16.4, None, None, 130, 1134, _V100),
    # A device is a core here, half of the chip that the page counts; from v4 on it is a chip.
    "TPU v3": Peak(None, None, 61.5, None, 450, f"{_TPU}/v3, half a chip"),
    "TPU v4": Peak(None, None, 275, None, 1200, f"{_TPU}/v4"),
    "TPU v5 lite": Peak(None, None, 197, None, 819, f"{_TPU}/v5e"),
    "TPU v5e": Peak(None, None, 197, None, 819, f"{_TPU}/v5e"),
    "TPU v5": Peak(None, None, 459, None, 2765, f"{_TPU}/v5p"),
    "TPU v5p": Peak(None, None, 459, None, 2765, f"{_TPU}/v5p"),
    "TPU v6 lite": Peak(None, None, 918, None, 1600, f"{_TPU}/v6e"),
    "TPU v6e": Peak(None, None, 918, None, 1600, f"{_TPU}/v6e"),
}


def peak_flops(device_name: str, numerics: str) -> float | None:
    """Returns the dense peak in FLOP/s; None where either is unknown, as for every CPU: never a guess."""
    peak = PEAKS.get(device_name)
    column = {"bfloat16_mixed": "bfloat16"}.get(numerics, numerics)
    if peak is None or column not in ("float32", "tensorfloat32", "bfloat16", "float16"):
        return None
    tflops = getattr(peak, column)
    return None if tflops is None else tflops * 1e12


def peak_bytes_per_s(device_name: str) -> float | None:
    """Returns the peak rate of the device's own memory in bytes/s; None where it is unknown."""
    peak = PEAKS.get(device_name)
    return None if peak is None else peak.memory_gb_per_s * 1e9


def peak_source(device_name: str) -> str | None:
    """Names the datasheet that the peaks come from."""
    peak = PEAKS.get(device_name)
    return None if peak is None else peak.source
