"""A report's payload made by hand: five models, nine sizes, both frameworks, failures of each kind, unknowns."""

import itertools
import math

SIZES = (128, 224, 256, 384, 448, 512, 768, 896, 1024)
# Seconds of one image at 224 px, how latency grows with pixels, GFLOP at 224 px, millions of parameters.
MODELS = {
    "vit_b16": ("vit", 0.100, 1.15, 35.1, 86.6),
    "convnext_b": ("convnext", 0.120, 1.0, 30.7, 88.6),
    "resnet50": ("resnet", 0.030, 1.0, 8.2, 25.6),
    "vit_ti16": ("vit", 0.014, 1.25, 2.5, 5.7),
    "vitdet_b16:rel_pos=false,window_size=16": ("vitdet", 0.105, 1.02, 35.0, 86.0),
}
CPU, GPU = "AMD EPYC 9999, 2 threads", "NVIDIA H200"
TEXTS = (
    "source device mode backend model family image_size numerics attention compile layout batch_norm framework_version "
    "weights platform status message origin"
).split()
NUMBERS = (
    "num_threads height width batch_size latency_s latency_low_s latency_high_s call_s call_low_s call_high_s num_runs "
    "num_calls params image_flops step_flops parameters_bytes activation_peak_bytes process_peak_bytes peak_share "
    "others_cpu_share traffic_bytes is_converged is_contended"
).split()
CHOICES = {
    "jax": [
        ("float32", "xla", "jit", "nhwc"),
        ("bfloat16", "xla", "jit", "nhwc"),
        ("bfloat16", "chunked", "jit", "nhwc"),
    ],
    "torch": [
        ("float32", "math", "eager", "nchw"),
        ("bfloat16", "math", "eager", "nchw"),
        ("bfloat16", "flash", "eager", "nchw"),
    ],
}
SPEED = {"jax": 1.0, "torch": 1.2, "float32": 1.0, "bfloat16": 0.6, "chunked": 1.1, "flash": 0.9}


def make_payload():
    """Returns a payload by the contract of `vitcmp.report.payload`."""
    rows = [*_sweep(CPU, "cpu"), *_sweep(GPU, "gpu"), *_article()]
    _fail(rows)
    timed = [{**row, "id": i} for i, row in enumerate(rows) if row["latency_s"] and row["origin"] == "vitcmp"]
    return {
        "title": "vitcmp: a <synthetic> report & test",
        "version": "0.0",
        "sources": [
            {
                "name": "cpu.jsonl",
                "num_records": len(rows),
                "left_out": 2,
                "faults": ["line 3: not JSON", "line 9: <b>schema</b> 7"],
            },
            {"name": "article", "num_records": len(SIZES), "left_out": 0, "faults": []},
        ],
        "settings": columns(rows),
        "comparisons": _comparisons(timed),
        "knobs": _knobs(timed),
        "crossovers": _crossovers(),
        "ceilings": [
            _ceiling(CPU, "jax", "float32", 5e11, 2e10, None, None),
            _ceiling(CPU, "torch", "float32", 4.8e11, 2.1e10, None, None),
            _ceiling(GPU, "jax", "bfloat16", 7e14, 4e12, 9.895e14, 4.8e12),
        ],
        "environments": [
            {"source": "cpu.jsonl", "device": CPU, "facts": [["CPU", "AMD EPYC 9999"], ["jax", "0.10.2"]]}
        ],
    }


def columns(rows):
    """Turns rows into columns, texts as an index into their distinct values."""
    texts = {}
    for name in TEXTS:
        index = {value: i for i, value in enumerate(dict.fromkeys(row[name] for row in rows))}
        texts[name] = {"values": list(index), "index": [index[row[name]] for row in rows]}
    return texts | {name: [row[name] for row in rows] for name in NUMBERS}


def latency(model, size, batch, backend, choice, device):
    """Returns the seconds of a step; the smaller batch is a little less efficient."""
    _, base, power, _, _ = MODELS[model]
    numerics, attention = choice[:2]
    lead = 0.75 if backend == "torch" and model.startswith("convnext") else 1.0  # each framework wins somewhere
    factor = lead * SPEED[backend] * SPEED[numerics] * (SPEED.get(attention, 1.0) if "vit" in model else 1.0)
    return base * (size / 224) ** (2 * power) * batch**0.95 * factor / (100 if device == GPU else 1)


def _sweep(device, platform):
    for model, size, batch, backend, mode in itertools.product(MODELS, SIZES, (1, 8), CHOICES, ("forward", "train")):
        if mode == "forward" or size <= 512:
            for choice in CHOICES[backend]:
                if "vit" in model or choice[1] not in ("chunked", "flash"):
                    yield _row(model, size, batch, backend, mode, choice, device, platform)


def _row(model, size, batch, backend, mode, choice, device, platform):
    family, _, power, gflop, params = MODELS[model]
    seconds = latency(model, size, batch, backend, choice, device) * (3 if mode == "train" else 1)
    image_flops = round(1e9 * gflop * (size / 224) ** (2 * power))
    step_flops = image_flops * batch * (3 if mode == "train" else 1)
    width = 4 if choice[0] == "float32" else 2
    return {
        "source": "cpu.jsonl",
        "device": device,
        "mode": mode,
        "backend": backend,
        "model": model,
        "family": family,
        **dict(zip(("numerics", "attention", "compile", "layout"), choice, strict=True)),
        "image_size": str(size),
        "batch_norm": "kept" if family == "resnet" else None,
        "weights": "seed:0",
        "framework_version": {"jax": "0.10.2", "torch": "2.14"}[backend],
        "platform": platform,
        "status": "ok",
        "message": None,
        "origin": "vitcmp",
        "height": size,
        "width": size,
        "batch_size": batch,
        "attention": choice[1] if "vit" in model else None,
        "num_threads": 2 if platform == "cpu" else None,
        **_times("latency", seconds),
        **_times("call", 0.97 * seconds),
        "num_runs": 2,
        "num_calls": 60,
        "params": round(1e6 * params),
        "image_flops": image_flops,
        "step_flops": step_flops,
        "parameters_bytes": round(1e6 * params * width),
        "activation_peak_bytes": None
        if model == "resnet50" and backend == "torch"
        else round(2e3 * size**2 * batch * width),
        "process_peak_bytes": round(1e9 + 4e3 * size**2 * batch * width),
        "peak_share": step_flops / seconds / 9.895e14 if platform == "gpu" else None,
        "others_cpu_share": 0.08 if size == 384 else 0.01,
        "traffic_bytes": round(1e6 * params * width + 1e3 * size**2 * batch * width),
        "is_converged": int(size != 896),
        "is_contended": int(size == 384),
    }


def _times(name, seconds):
    return {f"{name}_s": seconds, f"{name}_low_s": 0.985 * seconds, f"{name}_high_s": 1.01 * seconds}


def _article():
    """Gives rows of the article, whose FLOPs are under-counted and whose intervals are unknown."""
    for size in SIZES:
        row = _row("vit_b16", size, 1, "torch", "forward", CHOICES["torch"][2], GPU, "gpu")
        unknown = dict.fromkeys(
            ("latency_low_s", "latency_high_s", "call_s", "call_low_s", "call_high_s", "traffic_bytes", "peak_share")
        )
        changes = {"source": "article", "origin": "article", "latency_s": 1.3 * row["latency_s"], "num_runs": None}
        yield {
            **row,
            **unknown,
            **changes,
            "image_flops": round(0.6 * row["image_flops"]),
            "step_flops": round(0.6 * row["step_flops"]),
        }


def _fail(rows):
    """Makes every kind of failure: all settings of a point, or one of them."""
    kinds = {"oom": 1024, "timeout": 896, "crashed": 768, "error": 512, "unsupported": 448, "interrupted": 384}
    for status, size in kinds.items():
        for row in rows:
            is_whole = row["model"] == "convnext_b" and row["batch_size"] == 8
            is_part = row["model"] == "vit_b16" and row["attention"] in ("flash", "chunked")
            if row["height"] == size and row["origin"] == "vitcmp" and (is_whole or is_part):
                unknown = [
                    name
                    for name in row
                    if name.endswith(("_s", "_bytes", "_share")) or name.startswith(("num_runs", "num_calls", "is_"))
                ]
                row |= dict.fromkeys(unknown) | {
                    "status": status,
                    "message": f"RuntimeError: <i>{status}</i> at {size} px",
                }


def _ceiling(device, backend, numerics, flops, rate, peak_flops, peak_rate):
    rates = {"flops_per_s": flops, "bytes_per_s": rate, "peak_flops_per_s": peak_flops, "peak_bytes_per_s": peak_rate}
    return {
        "source": "cpu.jsonl",
        "device": device,
        "backend": backend,
        "numerics": numerics,
        **rates,
        "how": "matmul of 4096, copy of 1 GiB",
    }


def _ratio(a, b, words):
    value = a["latency_s"] / b["latency_s"]
    low, high = 0.98 * value, 1.02 * value
    word = (
        words[0]
        if low > 1.03
        else words[1]
        if high < 1 / 1.03
        else "ambiguous"
        if not 1 / 1.03 <= low <= high <= 1.03
        else "same"
    )
    return {"value": value, "low": low, "high": high, "verdict": word}


def _groups(rows, *keys):
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups.values()


def _best(rows):
    return min(rows, key=lambda row: row["latency_s"])


def _comparisons(rows):
    """Compares the frameworks at every point; resnet50 is refused, and bfloat16 ConvNeXt differs."""
    found = []
    for group in _groups(rows, "device", "mode", "model", "image_size", "batch_size", "numerics"):
        sides = [[row for row in group if row["backend"] == name] for name in ("jax", "torch")]
        if all(sides):
            found.append(_comparison(*map(_best, sides)))
    return found


def _comparison(jax, torch):
    model, is_float32 = jax["model"], jax["numerics"] == "float32"
    status = "missing" if model == "resnet50" else "equal" if is_float32 or model != "convnext_b" else "differs"
    refusal = {"missing": "no parity", "differs": "outputs differ"}.get(status)
    keys = ("source", "device", "mode", "weights", "model", "image_size", "batch_size", "numerics")
    return {
        **{key: jax[key] for key in keys},
        "jax": jax["id"],
        "torch": torch["id"],
        "refusal": refusal,
        "parity": {
            "status": status,
            "error": None if status == "missing" else 3.1e-2 if status == "differs" else 2e-6,
            "bound": 1.2e-5,
        },
        "ratio": None if refusal else _ratio(torch, jax, ("JAX faster", "torch faster")),
        "cpu_ratio": None,
        "gap_s": 4000.0 if model == "vit_ti16" else 0.0,
    }


def _knobs(rows):
    found = []
    for group in _groups(rows, "device", "mode", "backend", "model", "image_size", "batch_size"):
        for knob in ("numerics", "attention"):
            values = {
                value: _best(r for r in group if r[knob] == value)
                for value in dict.fromkeys(r[knob] for r in group)
                if value
            }
            if len(values) < 2:
                continue
            reference, *others = values
            for value in others:
                point = {
                    key: values[value][key]
                    for key in ("source", "device", "mode", "weights", "backend", "model", "image_size", "batch_size")
                }
                sides = {"row": values[value]["id"], "reference_row": values[reference]["id"]}
                ratio = _ratio(values[value], values[reference], ("slower", "faster"))
                found.append({"knob": knob, **point, "value": value, "reference": reference, **sides, "ratio": ratio})
    return found


def _crossovers():
    """Gives one answer of each kind."""
    answers = [
        ("convnext_b", "vit_b16", "crosses", 560.0, 640.0),
        ("resnet50", "vit_ti16", "crosses", 900.0, math.nextafter(1000.0, 0)),
        ("resnet50", "vit_b16", "a faster throughout", None, None),
        ("convnext_b", "resnet50", "b faster throughout", None, None),
        ("vit_b16", "vitdet_b16:rel_pos=false,window_size=16", "not separable", None, None),
        ("convnext_b", "vit_ti16", "too few sizes", None, None),
    ]
    contexts = itertools.product((CPU, GPU), ("forward", "train"), (1, 8), ("best", "jax", "torch"))
    return [
        {
            "source": "cpu.jsonl",
            "device": device,
            "mode": mode,
            "weights": "seed:0",
            "batch_size": batch,
            "backend": backend,
            "metric": "latency",
            "a": a,
            "b": b,
            "status": status,
            "low_px": low,
            "high_px": high,
        }
        for device, mode, batch, backend in contexts
        for a, b, status, low, high in (answers if backend == "best" else answers[1:])
    ]
