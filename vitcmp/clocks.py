"""Clocks before and after a measurement, and what held them down in between: NVML for NVIDIA GPUs, /sys for CPUs."""

import importlib
import os
import statistics
from pathlib import Path
from typing import Any

CPUS = Path("/sys/devices/system/cpu")
# NVML's clocks event reasons (nvml.h, nvmlClocksEventReasons). SwPowerCap is normal for large matmuls on a big GPU.
EVENT_REASONS = {
    0x001: "GpuIdle",
    0x002: "ApplicationsClocksSetting",
    0x004: "SwPowerCap",
    0x008: "HwSlowdown",
    0x010: "SyncBoost",
    0x020: "SwThermalSlowdown",
    0x040: "HwThermalSlowdown",
    0x080: "HwPowerBrakeSlowdown",
    0x100: "DisplayClockSetting",
}
SLOWDOWNS = ("HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")
# NVML's performance policies (nvml.h, nvmlPerfPolicyType_t), whose violation times are counted in nanoseconds.
POLICIES = {
    0: "power",
    1: "thermal",
    2: "sync_boost",
    3: "board_limit",
    4: "low_utilization",
    5: "reliability",
}


class ClockMonitor:
    """Reads the clocks at `start` and at `stop`; reading in between would disturb what is measured."""

    def __init__(self, platform: str) -> None:
        readers: dict[str, Any] = {"gpu": GpuClocks, "cpu": CpuClocks}
        self._reader = readers[platform]() if platform in readers else None  # TPUs tell nothing
        self._before: dict[str, Any] | None = None
        self._after: dict[str, Any] | None = None

    def start(self) -> None:
        self._before = self._reader.read() if self._reader else None

    def stop(self) -> None:
        self._after = self._reader.read() if self._reader else None

    def result(self) -> dict[str, Any] | None:
        if self._reader is None or self._before is None or self._after is None:
            return None
        return self._reader.compare(self._before, self._after)


def is_throttled(clocks: dict[str, Any] | None) -> bool | None:
    """Says whether heat or the power supply slowed the device down; a power cap is normal. None where it is unknown."""
    if clocks is None:
        return None
    if clocks.get("source") == "nvml":
        reasons, thermal_s = clocks["event_reasons"], clocks["violations_s"]["thermal"]
        if reasons is None and thermal_s is None:
            return None
        return bool(thermal_s) or any(reason in SLOWDOWNS for reason in reasons or ())
    return None if clocks["throttle_events"] is None else clocks["throttle_events"] > 0


def decode_reasons(mask: int) -> list[str]:
    """Names the set bits of NVML's clocks event reasons; an unknown bit is given as hex."""
    bits = [1 << i for i in range(mask.bit_length()) if mask >> i & 1]
    return [EVENT_REASONS.get(bit, hex(bit)) for bit in bits]


class CpuClocks:
    """The current frequency of this process's CPUs, and the thermal throttle events that the kernel counted."""

    def __init__(self) -> None:
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._folders = [CPUS / f"cpu{cpu}" for cpu in cpus]

    def read(self) -> dict[str, Any]:
        throttle_names = ("core_throttle_count", "package_throttle_count")
        return {
            "mhz": [_read_number(folder / "cpufreq" / "scaling_cur_freq") for folder in self._folders],
            "events": [
                _read_number(folder / "thermal_throttle" / name) for folder in self._folders for name in throttle_names
            ],
            "governor": _read_text(self._folders[0] / "cpufreq" / "scaling_governor") if self._folders else None,
        }

    def compare(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any] | None:
        clocks = {
            "source": "sysfs",
            "cpu_mhz": [_mean_mhz(before["mhz"]), _mean_mhz(after["mhz"])],
            "governor": after["governor"],
            "throttle_events": _count_events(before["events"], after["events"]),
        }
        is_known = clocks["cpu_mhz"] != [None, None] or clocks["throttle_events"] is not None
        return clocks if is_known else None  # a virtual machine has neither


class GpuClocks:
    """The first visible GPU by NVML. What it cannot give is None, and `note` says why."""

    def __init__(self) -> None:
        self._notes: dict[str, None] = {}  # an ordered set
        self._nvml: Any = None
        self._handle: Any = None
        try:
            self._nvml = importlib.import_module("pynvml")
        except ImportError:
            self._notes["pynvml is not installed: pip install nvidia-ml-py"] = None
            return
        try:
            self._nvml.nvmlInit()
            self._handle = self._find(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0")
        except self._nvml.NVMLError as error:
            self._notes[f"NVML: {error}"] = None

    def read(self) -> dict[str, Any]:
        nvml = self._nvml
        reasons = self._get("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        return {
            "name": self._get("nvmlDeviceGetName"),
            "sm_mhz": self._get("nvmlDeviceGetClockInfo", argument=getattr(nvml, "NVML_CLOCK_SM", None)),
            "memory_mhz": self._get("nvmlDeviceGetClockInfo", argument=getattr(nvml, "NVML_CLOCK_MEM", None)),
            "sm_max_mhz": self._get("nvmlDeviceGetMaxClockInfo", argument=getattr(nvml, "NVML_CLOCK_SM", None)),
            "temperature_c": self._get(
                "nvmlDeviceGetTemperature", argument=getattr(nvml, "NVML_TEMPERATURE_GPU", None)
            ),
            "power_mw": self._get("nvmlDeviceGetPowerUsage"),
            "power_limit_mw": self._get("nvmlDeviceGetEnforcedPowerLimit"),
            "reasons": reasons,
            "violations_ns": {name: self._violation_ns(policy) for policy, name in POLICIES.items()},
        }

    def compare(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        pairs = {name: [before[name], after[name]] for name in ("sm_mhz", "memory_mhz", "temperature_c")}
        violations = {name: (before["violations_ns"][name], after["violations_ns"][name]) for name in POLICIES.values()}
        return {
            "source": "nvml",
            "name": after["name"],
            **pairs,
            "sm_max_mhz": after["sm_max_mhz"],
            "power_w": [_scale(before["power_mw"], 1e-3), _scale(after["power_mw"], 1e-3)],
            "power_limit_w": _scale(after["power_limit_mw"], 1e-3),
            "event_reasons": None if after["reasons"] is None else decode_reasons(after["reasons"]),
            "violations_s": {name: _scale_difference(*values) for name, values in violations.items()},
            "note": "; ".join(self._notes) or None,
        }

    def _find(self, device: str) -> Any:
        """CUDA_VISIBLE_DEVICES holds indices or ids; NVML counts as CUDA does where all GPUs are alike."""
        if device.isdigit():
            return self._nvml.nvmlDeviceGetHandleByIndex(int(device))
        return self._nvml.nvmlDeviceGetHandleByUUID(device)

    def _get(self, *names: str, argument: Any = None) -> Any:
        """Calls the first of the functions that this version of pynvml has; None, and a note, where it fails."""
        if self._handle is None:
            return None
        function = next((getattr(self._nvml, name) for name in names if hasattr(self._nvml, name)), None)
        if function is None:
            self._notes[f"{names[0]}: not in this pynvml"] = None
            return None
        try:
            return function(self._handle) if argument is None else function(self._handle, argument)
        except self._nvml.NVMLError as error:
            self._notes[f"{names[0]}: {error}"] = None
            return None

    def _violation_ns(self, policy: int) -> int | None:
        status = self._get("nvmlDeviceGetViolationStatus", argument=policy)
        return None if status is None else int(status.violationTime)


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _read_number(path: Path) -> int | None:
    text = _read_text(path)
    return int(text) if text and text.isdigit() else None


def _mean_mhz(khz: list[int | None]) -> float | None:
    known = [value for value in khz if value]
    return round(statistics.mean(known) / 1e3, 1) if known else None


def _count_events(before: list[int | None], after: list[int | None]) -> int | None:
    known = [new - old for old, new in zip(before, after, strict=True) if old is not None and new is not None]
    return sum(known) if known else None


def _scale(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _scale_difference(before_ns: int | None, after_ns: int | None) -> float | None:
    return None if before_ns is None or after_ns is None else (after_ns - before_ns) * 1e-9
