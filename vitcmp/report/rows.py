"""One setting as a row of the report: texts, and numbers in seconds, bytes and FLOPs; what is unknown is None."""

import dataclasses
import functools
import re
from typing import Any

from vitcmp.backend import MODES, NUMERICS
from vitcmp.flops import count_flops
from vitcmp.records import Record
from vitcmp.report.summary import Case, Setting
from vitcmp.specs import ForeignSpec, Spec, get_spec, parse_image_size
from vitcmp.stats import Estimate
from vitcmp.traffic import count_traffic

Row = dict[str, Any]
# Columns whose values are few texts, and those of numbers.
TEXTS = (
    *("source", "device", "mode", "backend", "model", "family", "image_size", "numerics", "attention", "compile"),
    *("layout", "batch_norm", "framework_version", "weights", "platform", "status", "message", "origin"),
)
NUMBERS = (
    *("num_threads", "height", "width", "batch_size", "latency_s", "latency_low_s", "latency_high_s"),
    *("call_s", "call_low_s", "call_high_s", "num_runs", "num_calls", "params", "image_flops", "step_flops"),
    *("parameters_bytes", "activation_peak_bytes", "process_peak_bytes", "peak_share", "others_cpu_share"),
    *("traffic_bytes", "is_converged", "is_contended"),
)
SAME_AS_CASE = (
    *("mode", "backend", "model", "image_size", "numerics", "attention", "compile", "layout", "framework_version"),
    *("weights", "platform", "num_threads", "batch_size"),
)
# Of the attempts of a case that never went well, the first of these says what became of it.
WORST_FIRST = ("error", "crashed", "timeout", "oom", "unsupported", "interrupted")
MAX_MESSAGE = 300
FOLDERS = re.compile(r"""(?<![\w.:/])/(?:[^\s/:'"]+/)+""")  # of an absolute path, without its last part


def setting_row(setting: Setting) -> Row:
    """Returns every column but the source of one case of ours, all its runs pooled."""
    case, latency = setting.case, setting.latency
    height, width = parse_image_size(case["image_size"])
    return {
        "device": device_label(case),
        **{name: case[name] for name in SAME_AS_CASE},
        "family": case["spec"].get("family"),
        "batch_norm": case.get("batch_norm"),  # records of method version 1 have none
        **_outcome(setting),
        "origin": "vitcmp",
        "height": height,
        "width": width,
        **_bounds("latency", latency),
        **_bounds("call", setting.call_s),
        "num_runs": latency.num_runs[0] if latency else None,
        "num_calls": latency.num_values[0] if latency else None,
        **_costs(setting),
        "peak_share": setting.peak_share,
        "others_cpu_share": setting.others_cpu_share,
        "is_converged": int(setting.is_converged) if latency else None,
        "is_contended": int(setting.is_contended) if latency else None,
    }


def device_label(case: Case) -> str:
    """Returns `AMD EPYC, 2 threads`, or `NVIDIA H200`."""
    threads = case["num_threads"]
    return case["device_name"] + (f", {threads} thread{'s' * (threads != 1)}" if threads else "")


def one_line(text: str) -> str:
    """Returns the first line without the folders of absolute paths: they say who measured where, not what failed."""
    line = FOLDERS.sub(".../", text.strip().partition("\n")[0].strip())
    return line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE - 3]}..."


def _outcome(setting: Setting) -> Row:
    """Returns status and message: ok where any run was measured, and then what became of the others."""
    failed = sorted(setting.failed, key=lambda record: WORST_FIRST.index(record["status"]))
    if not failed:
        return {"status": "ok", "message": None}
    status, why = failed[0]["status"], _why(failed[0])
    if not setting.latency:
        return {"status": status, "message": why or None}
    count = f"{len(failed)} of {len(setting.ok) + len(failed)} runs failed"
    return {"status": "ok", "message": ": ".join(filter(None, (count, status, why)))}


def _why(record: Record) -> str:
    error = record["error"] or {}
    return one_line(": ".join(filter(None, (error.get("type"), error.get("message")))))


def _bounds(name: str, estimate: Estimate | None) -> Row:
    value, low, high = estimate[:3] if estimate else (None, None, None)
    return {f"{name}_s": value, f"{name}_low_s": low, f"{name}_high_s": high}


def _costs(setting: Setting) -> Row:
    """Returns what the model needs; the FLOPs of a case that never ran are those of its spec."""
    image_flops, step_flops = setting.image_flops, setting.first("flops", "step")
    spec = spec_of(setting.case["model"], setting.case["image_size"])
    if not setting.ok and spec:
        image_flops, step_flops = _analytic_flops(setting.case, spec)
    return {
        "params": setting.first("num_params"),
        "image_flops": image_flops,
        "step_flops": step_flops,
        "parameters_bytes": setting.first("memory", "parameters_bytes"),
        "activation_peak_bytes": setting.first("memory", "activation_peak_bytes"),
        "process_peak_bytes": setting.first("memory", "process_peak_bytes"),
        "traffic_bytes": _traffic(setting.case, spec) if spec else None,
    }


def _analytic_flops(case: Case, spec: Spec) -> tuple[int | None, int | None]:
    if isinstance(spec, ForeignSpec) or case["mode"] not in MODES:
        return None, None
    return _count_flops(spec, "forward"), case["batch_size"] * _count_flops(spec, case["mode"])


def _traffic(case: Case, spec: Spec) -> int | None:
    if case["mode"] not in MODES or case["numerics"] not in NUMERICS:
        return None
    return _count_traffic(spec, case["batch_size"], case["numerics"], case["mode"])


@functools.lru_cache(maxsize=10_000)
def spec_of(model: str, image_size: str) -> Spec | None:
    """Returns the spec of a case's model at its image size; None where this version does not know it."""
    try:
        return dataclasses.replace(get_spec(model), image_size=parse_image_size(image_size))
    except ValueError:
        return None


@functools.lru_cache(maxsize=10_000)
def _count_flops(spec: Spec, mode: str) -> int:
    return count_flops(spec, mode=mode).total


@functools.lru_cache(maxsize=10_000)
def _count_traffic(spec: Spec, batch_size: int, numerics: str, mode: str) -> int | None:
    return count_traffic(spec, batch_size=batch_size, numerics=numerics, mode=mode)
