"""Made-up records of the capacity experiment for tests of its page: data sets, models and both frameworks."""

import base64

import numpy as np

from experiments.capacity.data.images import to_png
from experiments.capacity.examples import Examples, picture_name
from experiments.capacity.groups import groups_of
from experiments.capacity.kinds import KINDS, group_key, ranked, right_shares
from experiments.capacity.output import with_capacity
from experiments.capacity.page import TITLE
from tests.core.fake_capacity import failure, record
from vitcmp.report.payload import payload_of

VIT, CNN = "vit_ti16:depth=2,num_classes=10", "convnext_atto:num_classes=10"
ACCURACIES = {
    "glyphs/fine": {"low": 0.15, "down_up": 0.16, "high": 0.72, "patch": 0.55},
    "glyphs/coarse": {"low": 0.91, "down_up": 0.91, "high": 0.91, "patch": 0.90},
    "digit_canvas": {"low": 0.40, "down_up": 0.55, "high": 0.62, "patch": 0.45},
}
DATA = {"train": "train", "test": "test", "num_train": 4096, "num_test": 1000, "num_classes": 8, "num_questions": 1}
SIDES = {"low": 16, "down_up": 32, "high": 32, "patch": 32}


def make_records(seeds=3):
    """Returns runs of three data sets, a ViT and a CNN, in both frameworks; one diverged, one is of one seed."""
    found = []
    for dataset, accuracies in ACCURACIES.items():
        for model, backend in ((VIT, "jax"), (VIT, "torch"), (CNN, "jax"))[: 2 if dataset == "glyphs/fine" else 3]:
            arms = [arm for arm in accuracies if not (model == CNN and arm == "patch")]
            for seed in range(1 if (dataset, model) == ("digit_canvas", CNN) else seeds):
                found += [make_record(dataset, model, backend, arm, seed) for arm in arms]
    found.append(failure("high", 3, dataset="digit_canvas", model=VIT, data=DATA, versions={}))
    return found


def make_record(dataset, model, backend, arm, seed):
    accuracy = ACCURACIES[dataset][arm]
    made = record(arm, seed, accuracy=accuracy, dataset=dataset, model=model, backend=backend, data=DATA, versions={})
    steps, rng = np.arange(200), np.random.default_rng([seed, *arm.encode()])
    loss = 2.1 * np.exp(-steps * accuracy / 60) + 0.3 + 0.05 * rng.standard_normal(200) ** 2
    loss += 1e-6 * steps * (backend == "torch")
    made["curve"] = {"loss": loss.tolist(), "gradient_norm": (2 * loss).tolist()}
    made["cross"] = {
        other: {"accuracy": accuracy / 2 + 0.01 * i, "loss": 3.0 - i} for i, other in enumerate(made["cross"])
    }
    made["evaluations"] = [
        {"epoch": epoch, "step": 50 * epoch, "accuracy": accuracy * (1 - 0.4**epoch), "loss": 2.1 - 0.3 * epoch}
        for epoch in range(1, 5)
    ]
    return made


def make_examples(records):
    """Returns pixels of each arm's own size for the examples of all kinds, which are the groups' first eight."""
    found = Examples()
    for group in (group for group in groups_of(records)[0] if group.runs):
        shares = right_shares(group)
        for index in sorted({index for kind in KINDS for index in ranked(shares, kind)[:8]}):
            add_example(found, group_key(group), index)
    return found


def add_example(found, key, index, *, answer=("A",), id="example"):
    rng = np.random.default_rng(index)
    names, pictures = {}, {}
    for arm, side in SIDES.items():
        data = to_png(rng.integers(0, 256, (side, side, 3), np.uint8))
        names[arm] = picture_name(data)
        pictures[names[arm]] = base64.b64encode(data).decode()
    found.add(key, {"index": index, "id": id, "answer": list(answer), "pictures": names}, pictures)


def make_capacity_payload(records=None, examples=None, payload=None):
    """Returns the payload of capacity records alone, or with those of a sweep."""
    records = make_records() if records is None else records
    examples = make_examples(records) if examples is None else examples
    return with_capacity(payload or payload_of([], title=TITLE), records, examples)
