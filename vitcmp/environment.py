"""What a measurement stands on: the host, its versions and flags, and who else used it. Standard library only."""

import dataclasses
import importlib.metadata
import math
import os
import platform as host
import re
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vitcmp.clocks import ClockMonitor

# Environment variables that change what a framework computes, or with how many threads.
FLAG_PREFIXES = (
    "XLA_",
    "JAX_",
    "OMP_",
    "GOMP_",
    "MKL_",
    "KMP_",
    "TORCH",
    "PYTORCH_",
    "CUDA_",
    "CUDNN_",
    "NVIDIA_TF32",
    "LIBTPU",
)
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
SOURCES = ("vitcmp", "jax_models", "torch_models", "experiments")
RESULTS = "experiments/results"  # a sweep that is written there changes no source
CGROUPS = Path("/sys/fs/cgroup")


def cpu_name() -> str:
    """Returns the processor's name as the kernel gives it, such as `AMD EPYC 9B45`, or else the architecture."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    if sys.platform == "darwin" and (name := _run("sysctl", "-n", "machdep.cpu.brand_string")):
        return name
    return host.processor() or host.machine()


def num_cpus() -> int:
    """Counts the CPUs that this process may use: those of its affinity, or its cgroup's quota where that is less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_quota_cpus(text) for text in _cgroup_values("cpu.max")]
    v1 = zip(_cgroup_values("cpu.cfs_quota_us", "cpu"), _cgroup_values("cpu.cfs_period_us", "cpu"), strict=False)
    quotas += [_quota_cpus(f"{quota} {period}") for quota, period in v1]
    return max(1, min([allowed, *filter(None, quotas)]))


def cpu_memory_bytes() -> int | None:
    """Returns the memory that this process may use: the machine's, or its cgroup's limit where that is less."""
    match = re.search(r"MemTotal:\s+(\d+) kB", _read(Path("/proc/meminfo")))
    total = int(match[1]) * 1024 if match else _sysconf_memory_bytes()
    limits = [*_cgroup_values("memory.max"), *_cgroup_values("memory.limit_in_bytes", "memory")]
    return min(filter(None, [total, *(int(text) for text in limits if text.isdigit())]), default=None)


def peak_rss_bytes() -> int | None:
    """Returns the largest resident size of this process since `reset_peak_rss`, or since its start where that fails."""
    match = re.search(r"VmHWM:\s+(\d+) kB", _read(Path("/proc/self/status")))
    if match:
        return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024) or None  # macOS counts bytes, the others kB


def reset_peak_rss() -> bool:
    """Sets the peak back to what is resident now, and says whether it could: on Linux only (proc(5), clear_refs)."""
    try:
        with open("/proc/self/clear_refs", "r+") as file:  # never creates it
            file.write("5")
    except OSError:
        return False
    return True


def pin_cpus(count: int) -> list[int]:
    """Binds this thread, and those it starts from now on, to the first `count` of its CPUs; returns them, [] off Linux.

    Call it before a framework is imported: threads that already run keep their CPUs.
    """
    if count < 1:
        raise ValueError(f"count={count} must be 1 or more")
    if not hasattr(os, "sched_setaffinity"):
        return []
    cpus = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, cpus)
    return cpus


def describe_environment() -> dict[str, Any]:
    """Returns what a number depends on beside its case. No user, host or secret: records are published."""
    commit, is_dirty = _commit()
    return {
        "python": host.python_version(),
        "os": _os_name(),
        "kernel": f"{host.system()} {host.release()}",
        "machine": host.machine(),
        "cpu": cpu_name(),
        "num_cpus": num_cpus(),
        "memory_bytes": cpu_memory_bytes(),
        "vitcmp": getattr(sys.modules["vitcmp"], "__version__", None),  # an import would turn the layers upside down
        "numpy": _version("numpy"),
        "commit": commit,
        "is_dirty": is_dirty,
        "flags": _flags(),
    }


class HostMonitor:
    """Watches the host while a case is timed: `with HostMonitor("cpu") as host:`, then `contention()`, `clocks()`."""

    def __init__(self, platform: str = "cpu") -> None:
        self._clocks = ClockMonitor(platform)
        self._cpus: list[int] = []
        self._before: _Load | None = None
        self._after: _Load | None = None

    def __enter__(self) -> "HostMonitor":
        self._clocks.start()
        self._cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._before = _Load.read(self._cpus)
        return self

    def __exit__(self, *exc: object) -> None:
        self._after = _Load.read(self._cpus)
        self._clocks.stop()

    def contention(self) -> dict[str, float | int | None]:
        """Returns who else used this process's CPUs, as shares of their capacity; None where the host does not say.

        others_cpu_share: busy time less this process's own, so it counts the parent and compile workers too; the kernel
        counts busy time in ticks of 10 ms, and below zero is zero. steal_share: what a hypervisor gave to others.
        """
        before, after = self._before, self._after
        if before is None or after is None:
            raise RuntimeError("contention() is known after the `with` block")
        capacity_s = (after.wall_s - before.wall_s) * len(self._cpus)
        others_s = _difference(after.busy_s, before.busy_s, less=after.own_s - before.own_s)
        return {
            "others_cpu_share": _share(others_s, capacity_s),
            "steal_share": _share(_difference(after.steal_s, before.steal_s), capacity_s),
            "load_1m_before": before.load_1m,
            "load_1m_after": after.load_1m,
            "involuntary_switches": after.involuntary_switches - before.involuntary_switches,
        }

    def clocks(self) -> dict[str, Any] | None:
        """Returns the device's clocks and what held them down (`vitcmp.clocks`); None where nothing can be read."""
        return self._clocks.result()


@dataclasses.dataclass(frozen=True)
class _Load:
    """The host's counters at one moment; None where it has none."""

    wall_s: float
    own_s: float
    busy_s: float | None
    steal_s: float | None
    load_1m: float
    involuntary_switches: int

    @classmethod
    def read(cls, cpus: list[int]) -> "_Load":
        busy_s, steal_s = _cpu_times(_read(Path("/proc/stat")), cpus)
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        return cls(time.perf_counter(), time.process_time(), busy_s, steal_s, round(os.getloadavg()[0], 2), switches)


def _cpu_times(stat: str, cpus: list[int]) -> tuple[float | None, float | None]:
    """Sums the busy and the stolen seconds of the CPUs in the text of /proc/stat.

    A line is `cpu3 user nice system idle iowait irq softirq steal guest guest_nice`; guest time is in user already.
    """
    lines = {fields[0]: fields[1:] for line in stat.splitlines() if (fields := line.split()) and fields[0][:3] == "cpu"}
    ticks = [[int(value) for value in lines[f"cpu{cpu}"]] for cpu in cpus if len(lines.get(f"cpu{cpu}", ())) >= 8]
    if not cpus or len(ticks) != len(cpus):
        return None, None
    per_s = os.sysconf("SC_CLK_TCK")
    busy = sum(user + nice + system + irq + softirq for user, nice, system, _, _, irq, softirq, *_ in ticks)
    return busy / per_s, sum(values[7] for values in ticks) / per_s


def _difference(after: float | None, before: float | None, *, less: float = 0) -> float | None:
    return None if after is None or before is None else after - before - less


def _share(seconds: float | None, capacity_s: float) -> float | None:
    return None if seconds is None or capacity_s <= 0 else round(min(max(seconds / capacity_s, 0.0), 1.0), 4)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _run(*command: str) -> str | None:
    """Returns what a command prints; None where it is absent, fails or takes longer than 5 s."""
    # GIT_DIR and its like, as hooks set them, would answer for another repository.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {
        "GIT_OPTIONAL_LOCKS": "0"
    }
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> tuple[str | None, bool | None]:
    """Returns the checkout's commit and whether its sources differ from it; None where this is not a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # a package in a virtual environment, perhaps inside somebody else's repository
        return None, None
    commit = _run("git", "-C", str(root), "rev-parse", "HEAD")
    changes = _run("git", "-C", str(root), "status", "--porcelain", "--", *SOURCES, f":(exclude){RESULTS}")
    return commit, None if commit is None or changes is None else bool(changes)


def _flags() -> dict[str, str]:
    names = [name for name in os.environ if name.startswith(FLAG_PREFIXES) and not name.endswith("_DIR")]
    return {
        name: _anonymous(os.environ[name]) for name in sorted(names) if not any(word in name for word in SECRET_WORDS)
    }


def _anonymous(text: str) -> str:
    """Takes the home folder, and the names of the user and of the host, out of a flag's value."""
    home = os.path.expanduser("~")
    text = re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text) if home not in ("/", "~") else text
    text = re.sub(r"/(home|Users)/[^/\s:,;\"']+", "~", text)
    for name, stand_in in ((os.environ.get("USER"), "<user>"), (socket.gethostname(), "<host>")):
        text = re.sub(rf"\b{re.escape(name)}\b", stand_in, text) if name and len(name) > 2 else text
    return text


def _os_name() -> str:
    try:
        return host.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return host.platform(terse=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sysconf_memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _cgroup_values(name: str, controller: str = "") -> list[str]:
    """Reads a limit from this process's cgroup and every one above it; version 2 has no controller in its path.

    A container without a cgroup namespace sees the host's path, which it does not have: its own limits are at the root.
    """
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            leaf = CGROUPS / controller / path.lstrip("/")
            folders = [leaf, *leaf.parents]
            folders = [folder for folder in folders if folder.is_relative_to(CGROUPS / controller)]
            return [text for folder in folders if (text := _read(folder / name).strip())]
    return []


def _quota_cpus(quota_and_period: str) -> int | None:
    """Turns `150000 100000` (microseconds) into 2 CPUs; None where there is no limit: `max`, or -1 in version 1."""
    quota, _, period = quota_and_period.partition(" ")
    return math.ceil(int(quota) / int(period)) if quota.isdigit() and period.isdigit() else None
