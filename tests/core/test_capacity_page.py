"""The capacity experiment's page: its numbers are the analysis', its bytes the records', and its text stays text."""

import base64
import dataclasses
import html.parser
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PIL = pytest.importorskip("PIL.Image")

from experiments.capacity.analysis import split
from experiments.capacity.arms import make_arms
from experiments.capacity.curves import curve_pairs
from experiments.capacity.data.dataset import Example
from experiments.capacity.data.images import to_png
from experiments.capacity.examples import FILE, Examples, picture_name, read_examples, write_examples
from experiments.capacity.groups import groups_of
from experiments.capacity.kinds import KINDS, group_key, num_alone, ranked, right_shares
from experiments.capacity.output import payload_of_folders, with_capacity, write_report
from experiments.capacity.page import make_capacity
from experiments.capacity.pixels import MOST_BYTES, collect, seen, store_examples
from experiments.capacity.plan import Local
from experiments.capacity.reading import why_unfit
from experiments.capacity.tables import share_words
from tests.core import fake_records
from tests.core.fake_capacity import failure, record, records
from vitcmp.report.html import render_html
from vitcmp.report.payload import make_payload, payload_of

ROOT = Path(__file__).parents[2]
EVIL = "</script><img src=x onerror=alert(1)> <!-- \u2028 \ud800"
PREPROCESSING = {"method": "bilinear", "antialias": True, "truncate": True, "stretch": True}
DATA = {"train": "train", "test": "test", "num_classes": 10, "num_questions": 1}


def rounded(value):
    return float(f"{value:.5g}")


def page_of(some, examples=None):
    return render_html(with_capacity(payload_of([]), some, examples or Examples()))


class Tags(html.parser.HTMLParser):
    """Collects the tags of a page and the ids of its sections."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sections = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "section":
            self.sections.append(dict(attributes)["id"])


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_numbers_of_the_split_are_the_analysis_own(metric):
    some = records()
    (group,), _ = groups_of(some)
    truth = split(group, metric=metric)
    shown = make_capacity(some)["groups"][0]
    got = shown["splits"][metric]
    assert [gain["name"] for gain in got["gains"]] == list(truth.gains)
    for gain in got["gains"]:
        of = truth.gains[gain["name"]]
        assert [gain[key] for key in ("value", "low", "high")] == [rounded(end) for end in (of.value, of.low, of.high)]
        assert gain["verdict"] == of.verdict and gain["seeds"] == list(of.seeds)
        assert gain["detectable"] == rounded(of.detectable)
    assert got["share"] == {key: rounded(value) for key, value in truth.share._asdict().items()}
    assert got["share_words"] == share_words(truth)
    for arm in shown["arms"]:
        of = truth.arms[arm["arm"]]
        assert arm[metric] == {key: rounded(value) for key, value in getattr(of, metric)._asdict().items()}
        assert (arm["flops"], arm["memory_bytes"], arm["num_examples"]) == (of.flops, of.memory_bytes, of.num_examples)
        own = [rounded(group.runs[arm["arm"]][seed]["final"][metric]) for seed in of.seeds]
        assert [one[metric] for one in arm["seeds"]] == own


def test_records_in_any_order_give_the_same_bytes():
    some = [*records(), *records(backend="torch", shift=1e-4), failure("high", 7)]
    mixed = random.Random(0).sample(some, len(some))
    for i, one in enumerate(some):
        one["started_at"] = f"2026-11-20T06:00:{i:02d}.000+00:00"
    assert page_of(some) == page_of(mixed)


def test_the_curves_of_both_frameworks_stand_together_with_their_largest_difference():
    some = [*records(seeds=2), *records(seeds=2, backend="torch", shift=1e-3)]
    made = make_capacity(some)
    truth = max(curve_pairs(some), key=lambda pair: pair.loss.difference)
    worst = max(made["pairs"], key=lambda pair: pair["difference"])
    assert len(made["pairs"]) == 8 and worst["difference"] == rounded(truth.loss.difference)
    assert worst["step"] == truth.loss.step == 19
    assert {made["groups"][worst[side]]["backend"] for side in ("jax", "torch")} == {"jax", "torch"}


def test_a_long_curve_is_shown_in_means_of_whole_blocks():
    long = record()
    long["curve"] = {"loss": [float(i) for i in range(1001)], "gradient_norm": [1.0] * 1001}
    (curve,) = make_capacity([long])["groups"][0]["curves"]
    assert curve["width"] == 13 and len(curve["loss"]) == 77
    assert curve["loss"][0] == 6 and curve["loss"][-1] == rounded(np.mean(range(988, 1001)))


def test_arms_that_are_missing_say_why():
    (group,) = make_capacity(records(arms=("low", "high"), model="convnext_atto:num_classes=10"))["groups"]
    reasons = {one["arm"]: one["reason"] for one in group["absent"]}
    assert reasons["down_up"] == "it was not trained" and "CNN" in reasons["patch"]
    assert [gain["name"] for gain in group["splits"]["accuracy"]["gains"]] == ["total"]
    assert group["splits"]["accuracy"]["share"] is None


def test_one_seed_is_shown_and_not_judged():
    (group,) = make_capacity(records(seeds=1))["groups"]
    gains = group["splits"]["accuracy"]["gains"]
    assert len(gains) == 5 and {gain["verdict"] for gain in gains} == {"not judged"}
    assert {gain["detectable"] for gain in gains} == {None}
    assert all(cell["accuracy"]["sd"] is None for cell in group["cross"])


def test_failures_are_rows_even_where_nothing_went_well():
    some = [*records(arms=("low",)), failure("high", 0), failure("high", 1, status="oom", message="no\nroom")]
    (group,) = make_capacity(some)["groups"]
    assert [(run["arm"], run["seed"], run["status"]) for run in group["failed"]] == [
        ("high", 0, "diverged"),
        ("high", 1, "oom"),
    ]
    assert group["failed"][1]["message"] == "no room" and not group["splits"]["accuracy"]["gains"]
    assert not any("diverged" in note for note in group["notes"])
    (lost,) = make_capacity([failure()])["groups"]
    assert lost["arms"] == [] and lost["splits"] == {} and len(lost["failed"]) == 1
    assert page_of([failure()])


def test_hostile_names_stay_text():
    evil = [*records(seeds=2, dataset=EVIL, device_name=EVIL), failure("high", 5, message=EVIL, dataset=EVIL)]
    examples = examples_of(evil, answer=EVIL)
    plain = [*records(seeds=2), failure("high", 5)]
    text = page_of(evil, examples)
    assert Tags(text).tags == Tags(page_of(plain, examples_of(plain))).tags
    assert text.count("</script") == page_of(plain).count("</script") and "\u2028" not in text


def test_a_page_has_the_sections_of_which_it_has_data():
    sweep = make_payload([fake_records.record("jax")])
    alone, both = page_of(records(seeds=1)), render_html(with_capacity(sweep, records(seeds=1), Examples()))
    assert Tags(alone).sections == ["capacity", "vitdet", "lab"]
    assert {"speed", "capacity", "method"} <= set(Tags(both).sections)
    assert "capacity" not in Tags(render_html(sweep)).sections
    assert make_capacity([]) is None and "capacity" not in with_capacity(sweep, [], Examples())


# Which examples are shown.


def shares(**arms):
    return {arm: np.array(values, float) for arm, values in arms.items()}


def test_examples_are_ranked_by_the_arm_that_speaks_least_for_them():
    some = shares(
        low=[0, 0, 0.4, 0, 1, 0.5], down_up=[0, 0, 0, 0, 1, 0], high=[1, 0.6, 1, 1, 1, 1], patch=[0, 0, 0, 1, 1, 0]
    )
    assert ranked(some, "only high") == [0, 1, 2]  # of 0.6 and 1 - 0.4 the earlier; a half is neither right nor wrong
    assert ranked(some, "patch and high") == [3]
    assert ranked(some, "all") == [4] and ranked(some, "none") == []
    assert num_alone(some) == {"low": 0, "down_up": 0, "high": 3, "patch": 0}


@pytest.mark.parametrize(
    ("arms", "kinds"),
    [(("high",), {"all"}), (("low", "high"), {"only high", "all"}), (("low",), {"none"}), ((), set())],
)
def test_a_kind_needs_its_arms_and_another(arms, kinds):
    some = shares(**{arm: [float(arm == "high")] for arm in arms})
    if arms == ("low", "high"):
        some["low"], some["high"] = np.array([0.0, 1.0]), np.array([1.0, 1.0])
    assert {kind for kind in KINDS if ranked(some, kind)} == kinds


def test_the_examples_that_are_shown_are_of_their_kind():
    some = records()
    (group,), _ = groups_of(some)
    made = make_capacity(some, examples_of(some))["groups"][0]
    of_group = right_shares(group)
    for kind in made["kinds"]:
        assert kind["count"] == len(ranked(of_group, kind["kind"]))
        assert [one["index"] for one in kind["examples"]] == ranked(of_group, kind["kind"])[:8]
        for one in kind["examples"]:
            majority = {arm for arm, share in one["right"].items() if share > 0.5}
            assert majority == set(KINDS[kind["kind"]])


def test_without_stored_pixels_the_page_counts_and_says_so():
    (group,) = make_capacity(records())["groups"]
    assert not group["has_pixels"] and group["kinds"][0]["count"] > 0 and group["kinds"][0]["examples"] == []


# Pixels.


class Pictures:
    """A test set of noise, 40 x 24 pixels."""

    class_names, num_questions, num_classes, name, split = tuple("ABCDEFGHIJ"), 1, 10, "pictures", "test"
    notes = ()

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        image = np.random.default_rng(index).integers(0, 256, (40, 24, 3), np.uint8)
        return Example(image, np.array([index % 10]), f"picture {index}")


def real_groups(dataset="pets", **changes):
    return groups_of(records(seeds=2, preprocessing=PREPROCESSING, data=DATA, dataset=dataset, **changes))[0]


def examples_of(some, answer="A"):
    found = Examples()
    png = to_png(np.zeros((2, 2, 3), np.uint8))
    name = picture_name(png)
    for group in (group for group in groups_of(some)[0] if group.runs):
        for index in {index for kind in KINDS for index in ranked(right_shares(group), kind)[:8]}:
            pictures = dict.fromkeys(group.runs, name)
            example = {"index": index, "id": answer, "answer": [answer], "pictures": pictures}
            found.add(group_key(group), example, {name: base64.b64encode(png).decode()})
    return found


def test_a_png_holds_the_pixels_exactly():
    rng = np.random.default_rng(0)
    for shape in ((1, 1, 3), (7, 5, 3), (3, 200, 3)):
        image = rng.integers(0, 256, shape, np.uint8)
        for one in (image, image[..., :1].repeat(3, axis=2)):
            np.testing.assert_array_equal(PIL.open(io.BytesIO(to_png(one))).convert("RGB"), one)


def test_pixels_are_those_that_the_model_was_given():
    (group,) = real_groups()
    image = Pictures()[3].image
    arms = make_arms("vit_ti16:depth=2,num_classes=10", "64", "128")
    sides = {name: seen(arm, group, image).shape for name, arm in arms.items()}
    assert sides == {"low": (64, 64, 3), "down_up": (128, 128, 3), "high": (128, 128, 3), "patch": (128, 128, 3)}
    assert (seen(arms["high"], group, image) == seen(arms["patch"], group, image)).all()
    assert (seen(arms["high"], group, image) != seen(arms["down_up"], group, image)).any()
    floats = dataclasses.replace(group, shared=group.shared | {"preprocessing": PREPROCESSING | {"truncate": False}})
    assert seen(arms["low"], floats, image).dtype == np.uint8


def test_examples_are_few_enough_and_come_back_as_they_were_stored(tmp_path):
    groups = [*real_groups(), *real_groups(backend="torch"), *real_groups(dataset="other")]
    found = collect(groups, lambda group: Pictures())
    assert set(found.groups) == {group_key(group) for group in groups}
    assert sum(map(len, found.pictures.values())) <= MOST_BYTES
    for group in groups:  # each has its first of every kind before any has its last
        first = {ranked(right_shares(group), kind)[0] for kind in KINDS if ranked(right_shares(group), kind)}
        assert first <= set(found.groups[group_key(group)])
    write_examples(tmp_path / FILE, found)
    assert read_examples(tmp_path / FILE) == found
    assert (tmp_path / FILE).stat().st_size < 1_500_000 and [path.name for path in tmp_path.iterdir()] == [FILE]


def test_what_another_hand_wrote_into_the_examples_is_not_shown(tmp_path):
    found = examples_of(records(seeds=1))
    value = json.loads(found.to_json())
    (name,) = value["pictures"]
    evil = base64.b64encode(b"<svg onload=alert(1)>").decode()
    for pictures in ({name: evil}, {name: 'x" onerror="y'}, {name: None}):
        (tmp_path / FILE).write_text(json.dumps(value | {"pictures": pictures}))
        read = read_examples(tmp_path / FILE)
        assert read.pictures == {} and all(not e["pictures"] for some in read.groups.values() for e in some.values())
    for text in ("", "[]", '{"schema": "other/1"}', "[" * 10_000, json.dumps(value | {"groups": 3})):
        (tmp_path / FILE).write_text(text)
        assert read_examples(tmp_path / FILE).groups == {}


def test_a_data_set_that_is_not_here_leaves_what_was_stored(tmp_path):
    some = records(seeds=1, data=DATA | {"test_sha256": "0"}, dataset="folder:/nowhere")
    groups, _ = groups_of(some)
    write_examples(tmp_path / FILE, examples_of(some))
    before = (tmp_path / FILE).read_text()
    (note,) = store_examples(tmp_path, groups, Local(folder=str(tmp_path), data_dir=str(tmp_path)))
    assert note.startswith("folder:/nowhere: its examples cannot be shown: ")
    assert (tmp_path / FILE).read_text() == before


# The program.


def write(folder, some):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [one if isinstance(one, str) else json.dumps(one) for one in some]
    (folder / "records.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def program(*words):
    command = [sys.executable, "-m", "experiments.capacity.report", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_folders_of_both_kinds_make_one_page(tmp_path):
    capacity, sweep = (
        write(tmp_path / "capacity", records(seeds=1)),
        write(tmp_path / "sweep", [fake_records.record("jax")]),
    )
    payload = payload_of_folders([str(capacity), str(sweep)])
    assert payload["title"].startswith("vitcmp") and len(payload["capacity"]["groups"]) == 1
    assert [(s["name"], s["num_records"], s["faults"]) for s in payload["sources"]] == [
        ("capacity", 4, []),
        ("sweep", 1, []),
    ]
    assert payload_of_folders([str(capacity)])["title"] == "Resolution or compute?"
    whole = payload_of_folders([str(tmp_path), str(capacity)])
    assert whole["capacity"] == payload["capacity"] and sum(one["num_records"] for one in whole["sources"]) == 5


def test_a_bad_record_is_named_and_left_out(tmp_path):
    odd = record("high")
    odd["evaluations"] = [{"epoch": "</script>"}]
    folder = write(tmp_path / "c", [record("low"), odd, record("patch") | {"flops": "many"}, '{"schema": '])
    (source,) = payload_of_folders([str(folder)])["sources"]
    assert (source["num_records"], source["left_out"]) == (1, 3)
    assert [fault.partition(": ")[0] for fault in source["faults"]] == [f"records.jsonl:{i}" for i in (2, 3, 4)]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("cross", "high"), {"accuracy": 1}),
        (("cross", "high"), 3),
        (("final", "loss"), None),
        (("step_s", "median"), float("nan")),
        (("memory", "process_peak_bytes"), "much"),
        (("step_s", "low"), []),
        (("curve", "loss"), ["a"] * 20),
        (("evaluations",), [7]),
        (("num_params",), 10**400),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_a_record_of_which_no_number_can_be_read_is_unfit(path, value):
    odd = record("low")
    place = odd
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert why_unfit(record("low")) is None and ("no plausible" in why_unfit(odd) or "not finite" in why_unfit(odd))


def test_the_program_writes_a_page_and_says_what_is_wrong(tmp_path):
    folder = write(tmp_path / "capacity", records(seeds=1))
    out = tmp_path / "page.html"
    done = program(folder, f"--out={out}")
    assert done.returncode == 0 and "4 records" in done.stdout, done.stderr
    assert out.read_text() == render_html(payload_of_folders([str(folder)]))
    for words, fault in (
        ((), "name one or more folders"),
        ((tmp_path / "none",), "is not there"),
        ((folder, f"--out={folder}"), "must be a file"),
        ((folder, f"--out={folder}/records.jsonl"), "would be written over records"),
    ):
        bad = program(*words)
        assert bad.returncode == 2 and fault in bad.stderr and "Traceback" not in bad.stderr, bad.stderr
    (empty := tmp_path / "empty").mkdir()
    assert "holds no records" in program(empty).stderr


def test_the_report_beside_the_records_is_the_programs(tmp_path):
    folder = write(tmp_path / "capacity", records(seeds=1))
    path = write_report(folder, records(seeds=1))
    assert path == folder / "report.html" and len(Tags(path.read_text()).sections) == 3
