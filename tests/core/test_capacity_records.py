"""The record of a training run: what it must hold, and how it is packed."""

import json

import numpy as np
import pytest

from experiments.capacity.schema import (
    RUN_KEYS,
    STATUSES,
    new_final,
    new_record,
    pack_bits,
    run_id,
    unpack_bits,
    unpack_losses,
    validate,
)
from tests.core.fake_capacity import failure, make_run, record


@pytest.mark.parametrize("num", [1, 7, 8, 9, 5000])
def test_bits_and_losses_come_back_as_they_went_in(num):
    rng = np.random.default_rng(num)
    correct, losses = rng.random(num) < 0.5, np.append(rng.exponential(size=num - 1), 1e9)
    final = new_final(correct, losses, examples_sha256="e")
    np.testing.assert_array_equal(unpack_bits(final["correct"], num), correct)
    kept = unpack_losses(final["losses"], num)
    np.testing.assert_allclose(kept[:-1], losses[:-1], rtol=1e-3)
    assert kept[-1] == 65504  # float16's largest
    assert (final["accuracy"], final["loss"]) == (correct.mean(), pytest.approx(losses.mean()))


@pytest.mark.parametrize(
    ["correct", "losses"], [(np.ones(3), np.ones(3)), (np.ones(3, bool), np.ones(2)), (np.ones(0, bool), np.ones(0))]
)
def test_a_final_of_other_shapes_is_refused(correct, losses):
    with pytest.raises(ValueError, match="expected booleans and floats, one of each an example"):
        new_final(correct, losses, examples_sha256="e")


def broken(path, value):
    some = json.loads(json.dumps(record()))
    *parents, key = path.split(".")
    place = some
    for parent in parents:
        place = place[parent]
    if value is None:
        del place[key]
    else:
        place[key] = value
    return some


@pytest.mark.parametrize(
    ["path", "value", "fault"],
    [
        ("schema", "vitcmp-record/1", "schema is 'vitcmp-record/1', expected 'vitcmp-capacity/1'"),
        ("run.seed", None, "run.seed is missing"),
        ("run.seed", True, "run.seed is True, expected int"),
        ("run.arm", "up_down", "run.arm is 'up_down', expected one of low down_up high patch"),
        ("run.backend", "mxnet", "run.backend is 'mxnet', expected one of jax torch"),
        ("run.recipe", {}, "run_id is not the hash of run"),
        ("run.weights.sha256", None, "run.weights.sha256 is missing"),
        ("status", "fine", "status is 'fine', expected one of"),
        ("status", "diverged", "status is diverged but error is null"),
        ("final", None, "final is missing"),
        ("final.correct", pack_bits(np.ones(8, bool)), "final.correct cannot be read: 8 bits, expected 1000"),
        ("final.correct", "?", "final.correct cannot be read: "),
        ("final.losses", "AAAA", "final.losses cannot be read: 3 bytes, expected 2000"),
        ("final.accuracy", 0.9, "final.accuracy is 0.9, but of final.correct 0.6"),
        ("final.num_examples", 0, "final.num_examples is 0, expected 1 or more"),
        ("curve.loss", [], "curve has 0 losses and 20 gradient norms"),
        ("curve.loss", [float("nan")] * 20, "not JSON, or not finite"),
        ("cross", {"other": {}}, "cross has the arm 'other'"),
        ("flops", "many", "flops is 'many', expected int or null"),
    ],
)
def test_a_bad_record_is_named_by_its_fault(path, value, fault):
    assert any(each.startswith(fault) for each in validate(broken(path, value))), validate(broken(path, value))


def test_what_is_no_record_is_a_fault_and_no_crash():
    assert validate([]) == ["a record is an object, not list"]
    assert f"run is {3!r}, expected dict" in validate({"run": 3})


@pytest.mark.parametrize("status", [status for status in STATUSES if status != "ok"])
def test_an_attempt_that_did_not_end_well_needs_no_results(status):
    assert validate(failure(status=status)) == []
    assert any("is None" in fault for fault in validate(failure() | {"status": "ok", "error": None}))


def test_the_id_is_of_everything_that_decides_the_numbers():
    ids = {run_id(make_run())}
    for key in RUN_KEYS:
        ids.add(run_id(make_run() | {key: "changed"}))
    assert len(ids) == 1 + len(RUN_KEYS)
    assert run_id(dict(reversed(make_run().items()))) == run_id(make_run())


def test_an_identity_that_is_not_whole_is_refused():
    run = make_run()
    del run["recipe"]
    with pytest.raises(ValueError, match=r"run: run\.recipe is missing"):
        new_record(run)
