"""The points of experiments/peers.py: what is compared with what, in what order, and what counts as expected."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import pairs
from experiments.pair_tables import table_of
from experiments.peer_models.points import Grid, estimate_s, is_expected, make_rule, seconds_left
from experiments.peer_models.registry import MODELS, PEERS, Setting, load_peer
from experiments.peer_models.summary import summary_table
from vitcmp.specs import get_spec
from vitcmp.timing import PairRule

ROOT = Path(__file__).parents[2]
LIBRARIES = {
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "jax",
    "flax",
    "keras",
    "keras_hub",
    "equimo",
    "flaxmodels",
}


def make_record(
    pair: pairs.Pair, *, process: int = 0, ratio: float = 1.0, status: str = "ok", machine: str | None = "a CPU"
) -> dict:
    """A record in which ours takes `ratio` times as long as theirs in every block."""
    rule = make_rule(2)
    blocks = [[0.01]] * 24
    sides = {"ours": [[0.01 * ratio]] * 24, "theirs": blocks}
    times = {name: {"wall_s": wall_s, "cpu_s": wall_s} for name, wall_s in sides.items()}
    return {
        "pair_id": pairs.pair_id(pair, rule, 1),
        "pair": pair,
        "rule": vars(rule),
        "num_threads": 1,
        "process": process,
        "status": status,
        "facts": machine and {"device": {"name": machine}},
        "clock": "cpu_s",
        "started_at": "2026-11-20T08:00:00+00:00",
        "ended_at": "2026-11-20T08:00:10+00:00",
        "times": {**times, "ours_first": True, "is_warm": True, "converged": True},
        "outputs": {"error": 1e-7},
    }


def test_each_library_meets_each_of_its_models_at_each_point_once():
    for backend in ("torch", "jax"):
        wanted = Grid(backend=backend).make_pairs()
        met = {(pair["theirs"]["name"], *pair["point"].values()) for pair in wanted}
        assert len(met) == len(wanted)
        expected = sum(len(peer.models) for peer in PEERS.values() if peer.backend == backend)
        assert len(wanted) == expected * 2 * 2 * 2
    assert {model for peer in PEERS.values() for model in peer.models} == set(MODELS)


def test_the_cheapest_points_come_first_with_all_their_models():
    points = [pair["point"] for pair in Grid(backend="torch").make_pairs()]
    cells = list(dict.fromkeys((point["mode"], point["image_size"], point["batch_size"]) for point in points))
    assert cells[0] == ("forward", "224", 1)
    assert cells[1] == ("train", "224", 1)
    assert cells[-1] == ("train", "512", 8)
    first = {point["model"] for point in points[: len(points) // len(cells)]}
    assert first == set(MODELS)


def test_every_override_of_ours_is_one_that_its_spec_takes():
    for peer in PEERS.values():
        for model, overrides in peer.models.items():
            spec = get_spec(f"{model}:{overrides}" if overrides else model)
            assert not overrides or spec != get_spec(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peers": ("tim",)}, "unknown peers 'tim'; did you mean 'timm'"),
        ({"peers": ("equimo",)}, "unknown peers 'equimo'"),  # JAX's
        ({"models": ("vit_b14",)}, "unknown models 'vit_b14'"),
        ({"modes": ("backward",)}, "unknown modes 'backward'"),
        ({"numerics": "bfloat16_mixed"}, "one dtype only"),
    ],
)
def test_what_is_not_known_is_said_before_anything_runs(options, message):
    with pytest.raises(ValueError, match=message):
        Grid(**{"backend": "torch", **options}).make_pairs()


@pytest.mark.parametrize(
    ("peer", "model", "device", "numerics", "mode", "kernel"),
    [
        ("timm", "vit_b16", "cpu", "float32", "train", "flash"),
        ("timm", "vit_b16", "gpu", "bfloat16", "train", "flash"),
        ("timm", "vit_b16", "gpu", "tensorfloat32", "train", "mem_efficient"),
        ("timm", "vitdet_b16", "cpu", "float32", "forward", "flash"),
        ("timm", "vitdet_b16", "cpu", "float32", "train", "math"),
        ("timm", "vitdet_b16", "gpu", "bfloat16", "train", "mem_efficient"),
        ("transformers", "vitdet_b16", "gpu", "bfloat16", "forward", "math"),
        ("transformers", "resnet50", "cpu", "float32", "forward", None),
        ("equimo", "vit_b16", "gpu", "bfloat16", "forward", "xla"),
    ],
)
def test_both_sides_get_the_kernel_that_the_library_takes(peer, model, device, numerics, mode, kernel):
    options = {"models": (model,), "modes": (mode,), "device": device, "numerics": numerics}
    grid = Grid(backend=PEERS[peer].backend, peers=(peer,), **options)
    assert {pair["setting"]["attention"] for pair in grid.make_pairs()} == {kernel}


def test_a_dearer_point_is_estimated_dearer_and_a_process_more_too():
    wanted = Grid(backend="torch", peers=("timm",), models=("vit_b16",)).make_pairs()
    estimates = [estimate_s(pair, PairRule(), 2) for pair in wanted]
    assert max(estimates) == estimates[-1] > estimates[0] > 3 * PairRule().min_s
    assert estimate_s(wanted[0], make_rule(6), 2) == pytest.approx(2 * estimates[0])


def test_what_is_done_is_estimated_at_nothing_and_failures_only_with_retry():
    first, second, third = Grid(backend="torch", peers=("timm",), models=("vit_ti16",)).make_pairs()[:3]
    records = [make_record(first, process=process) for process in (0, 1)]
    records.append(make_record(second, status="oom"))
    left = [seconds_left([first, second, third], records, make_rule(2), 1, retry=retry) for retry in (False, True)]
    assert [bool(seconds) for seconds in left[0]] == [False, False, True]
    assert [bool(seconds) for seconds in left[1]] == [False, True, True]
    (more,) = seconds_left([first], records, make_rule(4), 1, retry=False)
    assert more == pytest.approx(estimate_s(first, make_rule(2), 1))


def test_slower_and_failed_points_are_not_as_expected():
    pair = Grid(backend="torch", peers=("timm",), models=("vit_ti16",)).make_pairs()[0]
    for ratio, expected in ((0.5, True), (1.0, True), (1.5, False)):
        assert is_expected([make_record(pair, process=process, ratio=ratio) for process in (0, 1)]) is expected
    for status in ("differs", "oom", "unsupported"):
        assert not is_expected([make_record(pair), make_record(pair, process=1, status=status)])


def test_the_summary_counts_the_points_of_each_library_and_names_what_is_slower():
    wanted = Grid(backend="torch", peers=("timm",), models=("vit_ti16",)).make_pairs()
    ratios = {0: 0.5, 1: 1.0, 2: 1.5}
    records = [make_record(wanted[i], process=k, ratio=ratio) for i, ratio in ratios.items() for k in (0, 1)]
    statuses = ("oom", "differs", "interrupted")
    records += [make_record(pair, status=status) for pair, status in zip(wanted[3:], statuses, strict=False)]
    records += [make_record(pair) for pair in Grid(backend="jax", peers=("equimo",), models=("vit_b16",)).make_pairs()]
    table = summary_table(records)
    first, second = table.rows
    keys = ("points", "faster", "same", "ambiguous", "slower", "ruled_out", "differs", "failed", "unfinished")
    assert [first[key] for key in keys] == ["6", "1", "1", "0", "1", "2", "1", "1", "1"]
    assert (first["processes"], first["median"], first["range"]) == ("2", "1.00", "0.50 to 1.50")
    assert (second["backend"], second["models"], second["processes"]) == ("jax", "vit_b16", "1")
    assert table.notes[0] == f"Slower: {pairs.describe(wanted[2])} (1.50)."
    assert summary_table(records[:4]).notes[0] == "Of 2 points that were timed none is slower."
    both = Grid(backend="torch", peers=("timm",), models=("vit_ti16",), numerics="bfloat16").make_pairs()
    assert len(summary_table([make_record(pair) for pair in (wanted[0], both[0])]).rows) == 2


def test_an_interval_between_faster_and_the_same_says_that_ours_is_not_slower():
    pair, *_ = Grid(backend="torch", peers=("timm",), models=("vit_ti16",)).make_pairs()
    for centre, word in ((0.97, "ambiguous, not slower"), (1.03, "ambiguous"), (1.0, "same"), (0.9, "faster")):
        records = [make_record(pair, process=i, ratio=centre + 0.005 * (i - 1)) for i in range(3)]
        (row,) = table_of({"": records}).rows
        assert row["verdict"] == word
        assert summary_table(records).rows[0]["ruled_out"] == str(int(word != "ambiguous"))


def test_the_summary_names_the_machine_and_keeps_two_apart():
    some = Grid(backend="torch", peers=("timm",), models=("vit_ti16",)).make_pairs()
    records = [make_record(some[0]), make_record(some[1], status="timeout", machine=None)]
    (row,) = summary_table(records).rows
    assert (row["setting"], row["points"], row["failed"]) == ("a CPU, float32, threads: 1", "2", "1")
    rows = summary_table([*records, make_record(some[2], machine="another")]).rows
    assert [(row["setting"].split(",")[0], row["points"]) for row in rows] == [
        ("a CPU", "1"),
        ("another", "1"),
        ("cpu", "1"),
    ]


def test_only_keras_resnet50_may_differ():
    for model, expected in (("resnet50", True), ("convnext_tiny", False)):
        pair = Grid(backend="jax", peers=("keras",), models=(model,)).make_pairs()[0]
        assert is_expected([make_record(pair, status="differs")]) is expected
        assert not is_expected([make_record(pair, status="crashed")])


def test_a_library_of_the_other_framework_is_refused():
    class Torch:
        name = "torch"

    with pytest.raises(ValueError, match="peer=equimo is a library of jax"):
        load_peer("equimo", Torch(), get_spec("vit_ti16"), {}, Setting(numerics="float32"))
    with pytest.raises(ValueError, match="unknown peer 'timmm'; did you mean 'timm'"):
        load_peer("timmm", Torch(), get_spec("vit_ti16"), {}, Setting(numerics="float32"))


def test_listing_the_points_imports_no_library():
    code = f"import sys, experiments.peers; print(sorted(sys.modules.keys() & set({sorted(LIBRARIES)})))"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert child.stdout.strip() == "[]", child.stderr


@pytest.mark.slow
def test_the_program_compares_a_point_goes_on_after_a_stop_and_says_how_it_ended(tmp_path):
    pytest.importorskip("torchvision")
    command = [sys.executable, "-m", "experiments.peers", "--backend=torch", "--peers=torchvision", f"--out={tmp_path}"]
    command += ["--models=resnet50", "--image_sizes=32", "--batch_sizes=1", "--modes=forward", "--num_threads=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    stopped, whole, again = (
        subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, env=environment)
        for options in (["--budget_s=1"], ["--processes=2"], ["--processes=2"])
    )
    assert stopped.returncode == 1
    assert "left to do: 1 points" in stopped.stdout
    assert whole.returncode in (0, 1), whole.stderr  # 1 where the machine made it look slower
    assert "1 to do" in whole.stdout and "0 to do" in again.stdout
    records = pairs.open_store(tmp_path).load()
    assert [record["status"] for record in records] == ["ok", "ok"]
    assert records[0]["outputs"]["status"] == "equal"
    [row] = [line for line in again.stdout.splitlines() if "resnet50 32 1 forward" in line]
    assert "torchvision" in row and "2 x " in row
    page = (tmp_path / "peers.md").read_text()
    assert "| torch | torchvision" in page and page.count("resnet50 32 1 forward") == 1 + page.count("Slower:")
