"""What is recorded about the host, and the monitors that watch it, with the host's files replaced by texts."""

import json
import mmap
import os
import subprocess
import sys
import types

import pytest

from vitcmp import clocks, environment
from vitcmp.clocks import CpuClocks, GpuClocks, decode_reasons, is_throttled
from vitcmp.environment import HostMonitor

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def read_from(monkeypatch, texts):
    """Makes the module read these texts, by the path's ending, and nothing else."""
    monkeypatch.setattr(
        environment, "_read", lambda path: next((text for end, text in texts.items() if str(path).endswith(end)), "")
    )


def test_the_environment_is_json_and_names_no_user_host_or_home(monkeypatch):
    home = "/srv/homes/alice"
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("USER", "alice")
    monkeypatch.setattr(environment.socket, "gethostname", lambda: "secret-box")
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={home}/dump --xla_gpu_autotune_level=4")
    monkeypatch.setenv("TORCH_HOME", "/home/bob/torch")
    monkeypatch.setenv("JAX_COORDINATOR", "secret-box:1234")
    monkeypatch.setenv("TORCH_API_KEY", "hunter2")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    described = environment.describe_environment()
    text = json.dumps(described)
    assert not [word for word in ("alice", "bob", "secret-box", "hunter2", home) if word in text]
    assert described["flags"]["XLA_FLAGS"] == "--xla_dump_to=~/dump --xla_gpu_autotune_level=4"
    assert described["flags"]["OMP_NUM_THREADS"] == "2"
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))
    assert described["vitcmp"]
    assert described["num_cpus"] >= 1


def git(folder, *arguments):
    who = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    command = ["git", *who, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def make_checkout(folder, source):
    source.parent.mkdir(parents=True)
    source.write_text("one")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one")


def test_the_commit_is_unknown_outside_a_checkout(monkeypatch, tmp_path):
    """A package in a virtual environment inside somebody's repository must not report that repository's commit."""
    source = tmp_path / "site-packages" / "vitcmp" / "environment.py"
    make_checkout(tmp_path, source)
    monkeypatch.setattr(environment, "__file__", str(source))
    assert environment._commit() == (None, None)


def test_the_commit_is_the_checkouts_and_says_whether_sources_differ(monkeypatch, tmp_path):
    source = tmp_path / "vitcmp" / "environment.py"
    make_checkout(tmp_path, source)
    head = git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.setattr(environment, "__file__", str(source))
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as a hook sets it
    (tmp_path / "results.jsonl").write_text("results beside the sources do not count")
    records = tmp_path / environment.RESULTS / "today" / "records.jsonl"
    records.parent.mkdir(parents=True)
    records.write_text("{}\n")
    assert environment._commit() == (head, False)
    source.write_text("two")
    assert environment._commit() == (head, True)


def test_no_git_gives_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment._run("git", "--version") is None


@needs_linux
def test_the_peak_counts_what_was_freed_until_it_is_reset():
    assert environment.reset_peak_rss()
    before = environment.peak_rss_bytes()
    block = mmap.mmap(-1, 64 << 20)  # not from malloc, which may hand out what is resident already
    block[::4096] = b"x" * len(block[::4096])
    block.close()
    assert environment.peak_rss_bytes() - before > 60 << 20
    assert environment.reset_peak_rss()
    assert environment.peak_rss_bytes() - before < 32 << 20


def test_the_peak_falls_back_where_the_kernel_has_no_vmhwm(monkeypatch):
    read_from(monkeypatch, {})
    assert environment.peak_rss_bytes() > 1 << 20


def test_memory_is_the_smallest_limit_on_the_way_up_the_cgroups(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "CGROUPS", tmp_path)
    texts = {"/proc/meminfo": "MemTotal:       8000 kB\n", "/proc/self/cgroup": "0::/a/b\n"}
    read_from(monkeypatch, {**texts, "a/b/memory.max": "max", "a/memory.max": "4096000"})
    assert environment.cpu_memory_bytes() == 4096000
    read_from(monkeypatch, {**texts, "a/b/memory.max": "max"})
    assert environment.cpu_memory_bytes() == 8000 * 1024


def test_memory_is_limited_by_version_1_cgroups_too(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "CGROUPS", tmp_path)
    texts = {"/proc/meminfo": "MemTotal: 8000 kB\n", "/proc/self/cgroup": "4:cpu,memory:/docker/x\n0::/\n"}
    read_from(
        monkeypatch, {**texts, "memory/memory.limit_in_bytes": "1234"}
    )  # no cgroup namespace: the limit is at the root
    assert environment.cpu_memory_bytes() == 1234
    read_from(monkeypatch, {**texts, "memory.limit_in_bytes": "9223372036854771712"})
    assert environment.cpu_memory_bytes() == 8000 * 1024


def test_a_cgroups_quota_limits_the_cpus(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    read_from(monkeypatch, {"/proc/self/cgroup": "0::/\n", "cpu.max": "250000 100000"})
    assert environment.num_cpus() == 3
    read_from(monkeypatch, {"/proc/self/cgroup": "0::/\n", "cpu.max": "max 100000"})
    assert environment.num_cpus() == 64
    version_1 = {"/proc/self/cgroup": "1:cpu:/\n", "cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}
    read_from(monkeypatch, version_1)
    assert environment.num_cpus() == 1
    read_from(monkeypatch, {**version_1, "cpu.cfs_quota_us": "-1"})
    assert environment.num_cpus() == 64


@needs_linux
def test_pinning_binds_to_the_first_of_the_allowed_cpus():
    allowed = os.sched_getaffinity(0)
    try:
        assert environment.pin_cpus(1) == [min(allowed)]
        assert os.sched_getaffinity(0) == {min(allowed)}
        assert environment.num_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    with pytest.raises(ValueError, match="count=0"):
        environment.pin_cpus(0)


def test_pinning_does_nothing_where_the_system_cannot(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert environment.pin_cpus(2) == []


class FakeHost:
    """A host of two CPUs at 100 ticks a second, of which the process has CPU 1 only."""

    def __init__(self, monkeypatch):
        self.wall_s, self.own_s, self.busy, self.steal = 50.0, 3.0, 1000, 10
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1}, raising=False)
        monkeypatch.setattr(os, "sysconf", lambda name: 100)
        monkeypatch.setattr(os, "getloadavg", lambda: (1.25, 0, 0))
        monkeypatch.setattr(environment, "_read", lambda path: self.stat() if path.name == "stat" else "")
        monkeypatch.setattr(environment.time, "perf_counter", lambda: self.wall_s)
        monkeypatch.setattr(environment.time, "process_time", lambda: self.own_s)

    def stat(self):
        return (
            "cpu  0 0 0 0 0 0 0 0 0 0\n"
            f"cpu0 {self.busy * 7} 0 0 0 0 0 0 0 0 0\n"
            f"cpu1 {self.busy - 30} 10 10 99999 888 5 5 {self.steal} 40 0\n"
            "intr 1\n"
        )

    def spend(self, wall_s, own_s, busy_s, steal_s=0.0):
        self.wall_s += wall_s
        self.own_s += own_s
        self.busy += round(100 * busy_s)
        self.steal += round(100 * steal_s)


def test_others_share_is_what_the_pinned_cpus_did_beside_this_process(monkeypatch):
    fake = FakeHost(monkeypatch)
    with HostMonitor("tpu") as host:
        fake.spend(10, own_s=6, busy_s=8.5, steal_s=0.5)
    fake.spend(100, own_s=0, busy_s=100)  # what comes after does not count
    assert host.contention() == {
        "others_cpu_share": 0.25,
        "steal_share": 0.05,
        "load_1m_before": 1.25,
        "load_1m_after": 1.25,
        "involuntary_switches": host.contention()["involuntary_switches"],
    }
    assert host.contention()["involuntary_switches"] >= 0
    assert host.clocks() is None


def test_others_share_below_zero_is_rounding_of_the_ticks(monkeypatch):
    fake = FakeHost(monkeypatch)
    with HostMonitor("tpu") as host:
        fake.spend(1, own_s=1.0, busy_s=0.99)
    assert host.contention()["others_cpu_share"] == 0.0


def test_shares_are_unknown_where_the_kernel_does_not_count(monkeypatch):
    fake = FakeHost(monkeypatch)
    monkeypatch.setattr(environment, "_read", lambda path: "")
    with HostMonitor("tpu") as host:
        fake.spend(1, 1, 1)
    assert host.contention()["others_cpu_share"] is None
    assert host.contention()["steal_share"] is None


@needs_linux
def test_the_real_host_is_watched():
    with HostMonitor("cpu") as host:
        sum(range(10**5))
    assert 0 <= host.contention()["others_cpu_share"] <= 1
    json.dumps([host.contention(), host.clocks()], allow_nan=False)


def test_contention_before_the_end_is_a_mistake():
    with pytest.raises(RuntimeError, match="with"):
        HostMonitor("tpu").contention()


@pytest.fixture
def cpu_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(clocks, "CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    for cpu in (0, 1):
        for name in ("cpufreq", "thermal_throttle"):
            (tmp_path / f"cpu{cpu}" / name).mkdir(parents=True)
    return tmp_path


def test_cpu_clocks_are_means_over_the_cpus_and_throttle_events_are_counted(cpu_folder):
    for cpu, khz in ((0, 2000000), (1, 3000000)):
        (cpu_folder / f"cpu{cpu}" / "cpufreq" / "scaling_cur_freq").write_text(f"{khz}\n")
        (cpu_folder / f"cpu{cpu}" / "cpufreq" / "scaling_governor").write_text("powersave\n")
        (cpu_folder / f"cpu{cpu}" / "thermal_throttle" / "core_throttle_count").write_text("5\n")
    with HostMonitor("cpu") as host:
        (cpu_folder / "cpu0" / "cpufreq" / "scaling_cur_freq").write_text("1000000\n")
        (cpu_folder / "cpu1" / "thermal_throttle" / "core_throttle_count").write_text("7\n")
    assert host.clocks() == {
        "source": "sysfs",
        "cpu_mhz": [2500.0, 2000.0],
        "governor": "powersave",
        "throttle_events": 2,
    }
    assert is_throttled(host.clocks()) is True


def test_cpu_clocks_are_unknown_where_sys_has_none(cpu_folder):
    reader = CpuClocks()
    assert reader.compare(reader.read(), reader.read()) is None
    assert is_throttled(None) is None


class FakeNvmlError(Exception):
    pass


def fake_nvml(monkeypatch, *, fails=(), absent=(), reasons=0x24):
    """A pynvml whose readings can fail one by one, as those of older GPUs and of MIG slices do."""
    time_ns = iter(range(0, 10**12, 10**9))
    readings = {
        "nvmlDeviceGetName": lambda handle: "NVIDIA H200",
        "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1980, 2: 3201}[kind],
        "nvmlDeviceGetMaxClockInfo": lambda handle, kind: 1980,
        "nvmlDeviceGetTemperature": lambda handle, sensor: 61,
        "nvmlDeviceGetPowerUsage": lambda handle: 512345,
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700000,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: reasons,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: reasons,
        "nvmlDeviceGetViolationStatus": lambda handle, policy: types.SimpleNamespace(
            referenceTime=0, violationTime=next(time_ns) if policy == 1 else 0
        ),
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: f"index {index}",
        "nvmlDeviceGetHandleByUUID": lambda uuid: f"uuid {uuid}",
    }

    def fail(*arguments):
        raise FakeNvmlError("Not Supported")

    members = {name: fail if name in fails else function for name, function in readings.items() if name not in absent}
    kinds = {"NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2, "NVML_TEMPERATURE_GPU": 0, "NVMLError": FakeNvmlError}
    monkeypatch.setitem(sys.modules, "pynvml", types.SimpleNamespace(**members, **kinds))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpu_clocks_are_read_before_and_after_and_reasons_are_named(monkeypatch):
    fake_nvml(monkeypatch)
    with HostMonitor("gpu") as host:
        pass
    read = host.clocks()
    assert read["sm_mhz"] == [1980, 1980]
    assert read["memory_mhz"] == [3201, 3201]
    assert read["power_w"] == pytest.approx([512.345] * 2)
    assert read["power_limit_w"] == pytest.approx(700)
    assert read["event_reasons"] == ["SwPowerCap", "SwThermalSlowdown"]
    assert read["violations_s"]["thermal"] == pytest.approx(1.0)
    assert read["violations_s"]["power"] == 0.0
    assert read["note"] is None
    assert is_throttled(read) is True
    json.dumps(read, allow_nan=False)


@pytest.mark.parametrize(
    "fault", ["nvmlDeviceGetClockInfo", "nvmlDeviceGetViolationStatus", "nvmlDeviceGetName", "nvmlDeviceGetPowerUsage"]
)
@pytest.mark.parametrize("how", ["fails", "absent"])
def test_a_reading_that_fails_is_unknown_and_noted_and_the_others_stand(monkeypatch, fault, how):
    fake_nvml(monkeypatch, **{how: (fault,)})
    with HostMonitor("gpu") as host:
        pass
    assert fault in host.clocks()["note"]
    assert host.clocks()["temperature_c"] == [61, 61]
    assert None in (*host.clocks()["sm_mhz"], *host.clocks()["power_w"], host.clocks()["name"]) or (
        host.clocks()["violations_s"]["thermal"] is None
    )


def test_the_old_name_of_the_event_reasons_serves(monkeypatch):
    fake_nvml(monkeypatch, absent=("nvmlDeviceGetCurrentClocksEventReasons",))
    assert GpuClocks().read()["reasons"] == 0x24


def test_no_driver_or_no_pynvml_gives_unknowns_and_a_note(monkeypatch):
    fake_nvml(monkeypatch, fails=("nvmlInit",))
    with HostMonitor("gpu") as host:
        pass
    assert host.clocks()["note"] == "NVML: Not Supported"
    assert host.clocks()["sm_mhz"] == [None, None]
    assert is_throttled(host.clocks()) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with HostMonitor("gpu") as host:
        pass
    assert "nvidia-ml-py" in host.clocks()["note"]


@pytest.mark.parametrize(
    ("visible", "handle"), [("3,1", "index 3"), ("GPU-abc", "uuid GPU-abc"), ("", "index 0"), (None, "index 0")]
)
def test_the_first_visible_gpu_is_read(monkeypatch, visible, handle):
    fake_nvml(monkeypatch)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert GpuClocks()._handle == handle


def test_a_power_cap_alone_is_normal():
    read = {"source": "nvml", "event_reasons": ["SwPowerCap"], "violations_s": {"thermal": 0.0, "power": 5.0}}
    assert is_throttled(read) is False


def test_event_reasons_are_decoded_and_unknown_bits_are_kept():
    assert decode_reasons(0) == []
    assert decode_reasons(0x88) == ["HwSlowdown", "HwPowerBrakeSlowdown"]
    assert decode_reasons(0x1000) == ["0x1000"]
