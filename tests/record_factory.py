"""Records made by hand: good ones, to be changed."""

import copy

from vitcmp.records import METHOD_VERSION, SCHEMA


def make_record(case_number=0, run=0, status="ok", **changes):
    timings = {"wall_s": [0.011, 0.012], "cpu_s": [0.02, 0.021], "converged": False}
    case_keys = (
        "backend model spec image_size batch_size mode numerics attention compile layout batch_norm platform "
        "device_name num_threads framework_version weights"
    )
    return {
        "schema": SCHEMA,
        "method_version": METHOD_VERSION,
        "case_id": f"{case_number:064x}",
        "run": run,
        "status": status,
        "error": None if status == "ok" else {"type": None, "message": "é\nü", "traceback": "", "stage": None},
        "started_at": "2026-11-20T05:00:00.000+00:00",
        "ended_at": "2026-11-20T05:00:01.000+00:00",
        "case": dict.fromkeys(case_keys.split()),
        "device": dict.fromkeys(("platform", "name", "num_devices", "memory_bytes", "num_threads", "versions")),
        "environment": {"python": "3.11"},
        "effective": {"num_threads": 2},
        "num_params": 5,
        "flops": {"analytic": 10},
        "compile_s": None,
        "compile_cache": None,
        "warmup": {"wall_s": [0.3], "stable": True},
        "latency": timings,
        "throughput": {"calls_per_sample": 4, **copy.deepcopy(timings)},
        "memory": {
            "parameters_bytes": 20,
            "activation_peak_bytes": None,
            "activation_source": None,
            "process_peak_bytes": 4096,
            "process_source": "VmHWM",
        },
        "contention": {
            "others_cpu_share": 0.0,
            "steal_share": None,
            "load_1m_before": 0.0,
            "load_1m_after": 0.5,
            "involuntary_switches": 0,
        },
        "clocks": None,
        "outputs": {"logits": [-1.5, 0.0], "shape": [1, 2]},
        "stages_s": {"import": 1.5},
        **changes,
    }


def failed(case_number=0, status="oom"):
    """A record of an attempt that measured nothing."""
    unknown = "device effective num_params flops warmup latency throughput memory contention outputs stages_s"
    return make_record(case_number, status=status, **dict.fromkeys(unknown.split()))


def changed(path, value):
    """Returns a good record with one value replaced, or taken out where `value` is ...; `path` is dotted."""
    record = make_record()
    *parents, last = path.split(".")
    place = record
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return record
