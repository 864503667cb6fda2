"""Rows of `results.json` as the code of "On the speed of ViTs and CNNs" (Beyer 2024) writes them.

github.com/lucasb-eyer/cnn_vit_benchmarks at 15b665ff, main.py. A time is the least of 20 calls by CUDA events, in ms; a
case that ran out of memory has NaN for its numbers; `flops` are twice torchprofile's multiply-adds, of the whole batch.
Its memory is of another definition than ours (differences of torch's peak, compilation included), so it is dropped.
These rows are shown beside ours and never compared with them.
"""

from typing import Any

KEYS = {"gpu", "m", "res", "bs", "kernel", "dtype", "time"}
ATTENTION = {"MATH": "math", "FLASH_ATTENTION": "flash", "EFFICIENT_ATTENTION": "mem_efficient"}
# fp32_max has no name of ours: float32 in matmuls, and TF32 in convolutions, as torch has it by default.
NUMERICS = {"fp32_hi": "tensorfloat32", "bf16": "bfloat16", "f16": "float16"}
FAMILIES = {"ViTDet": "vitdet", "ViT": "vit", "ConvNeXt": "convnext", "NFNet": "nfnet"}
NUM_CALLS = 20
TIMING = f"least of {NUM_CALLS} calls, not their median"
UNDERCOUNTED = "FLOPs without attention's products: torchprofile 0.0.4 does not know them"


def is_article_row(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() >= KEYS and "schema" not in value


def article_row(value: dict[str, Any], source: str) -> dict[str, Any] | str:
    """Returns the row of the report, or why it cannot be one."""
    for key in ("gpu", "m", "kernel", "dtype"):
        if not isinstance(value[key], str):
            return f"{key} is {value[key]!r:.60}, expected a text"
    for key in ("res", "bs"):
        if not isinstance(value[key], int) or isinstance(value[key], bool) or not 0 < value[key] < 10**6:
            return f"{key} is {value[key]!r:.60}, expected a whole number above 0"
    for key in ("time", "flops", "params"):
        if not isinstance(value.get(key), int | float | None):
            return f"{key} is {value[key]!r:.60}, expected a number"
    time = value["time"]
    if time is not None and time == time and not _known(time):  # NaN is not equal to itself
        return f"time is {time!r:.60}, expected ms above 0, or NaN"
    return _row(value, source)


def _row(value: dict[str, Any], source: str) -> dict[str, Any]:
    family = next((family for name, family in FAMILIES.items() if value["m"].startswith(name)), None)
    has_attention = family in ("vit", "vitdet")
    time_ms, flops = _known(value["time"]), _known(value.get("flops"))
    notes = [TIMING, *([UNDERCOUNTED] if has_attention and flops else [])]
    return {
        "source": source,
        "origin": "article",
        "device": value["gpu"],
        "platform": "gpu",
        "mode": "forward",
        "backend": "torch",
        "model": value["m"],
        "family": family,
        "image_size": str(value["res"]),
        "height": value["res"],
        "width": value["res"],
        "batch_size": value["bs"],
        "numerics": NUMERICS.get(value["dtype"], value["dtype"]),
        "attention": ATTENTION.get(value["kernel"], value["kernel"]) if has_attention else None,
        "compile": "reduce-overhead",
        "layout": "nchw",
        "status": "ok" if time_ms else "oom",
        "message": "; ".join(notes) if time_ms else "out of memory",
        "latency_s": time_ms and time_ms / 1e3,
        "num_runs": 1 if time_ms else None,
        "num_calls": NUM_CALLS if time_ms else None,
        "params": _known(value.get("params")),
        "image_flops": flops and round(flops / value["bs"]),
        "step_flops": flops,
    }


def _known(number: float | None) -> float | None:
    """Returns a number above 0, and None for NaN and what else is none."""
    return number if number is not None and number is not True and 1e-30 < number < 1e30 else None
