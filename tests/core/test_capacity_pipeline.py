"""Resizing as an arm sees it, the order of examples, and batches ahead of the trainer."""

import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest

from experiments.capacity.data.batches import Batches
from experiments.capacity.data.dataset import Example, spread
from experiments.capacity.data.pipeline import Augment, Preprocess, draw, order
from vitcmp.resample import METHODS, resize


def picture(height=23, width=37, seed=0):
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


class Fake:
    """Pictures of different sizes, two questions each; counts how often each is decoded."""

    name, split, class_names, num_questions, notes = "fake", "train", tuple("abcd"), 2, ()
    num_classes = 4

    def __init__(self, num=10, broken=()):
        self.num, self.broken = num, broken
        self.reads = []
        self.lock = threading.Lock()

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        with self.lock:
            self.reads.append(index)
        if index in self.broken:
            raise ValueError(f"example {index} is broken")
        return Example(picture(8 + index, 9, seed=index), np.array([index % 4, index % 3]), str(index))


def train(dataset, **options):
    return Batches(dataset, Preprocess(information=4, compute=6), **{"batch_size": 3, "num_threads": 2, **options})


def take(batches, num):
    return list(itertools.islice(batches, num))


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        np.array_equal(a, b) for pair in zip(ours, theirs, strict=True) for a, b in zip(*pair, strict=True)
    )


# Preprocess


def test_each_resize_is_cut_off_to_uint8_as_in_big_vision():
    image = picture()
    low = np.floor(resize(image, (8, 8))).astype(np.uint8)
    high = np.floor(resize(low, (16, 16))).astype(np.uint8)
    np.testing.assert_array_equal(Preprocess(information=8, compute=16)(image), high)


def test_without_cutting_off_pixels_are_float32_in_0_to_255():
    image = picture()
    ours = Preprocess(information=8, compute=16, truncate=False, method="lanczos3")(image)
    assert ours.dtype == np.float32
    assert ours.min() >= 0 and ours.max() <= 255
    exact = resize(np.clip(resize(image, (8, 8), method="lanczos3"), 0, 255), (16, 16), method="lanczos3")
    np.testing.assert_allclose(ours, np.clip(exact, 0, 255), atol=1e-4)


@pytest.mark.parametrize("truncate", [True, False])
def test_a_kernel_that_overshoots_neither_wraps_around_nor_leaves_the_range(truncate):
    image = np.where(np.arange(24)[:, None, None] < 12, 0, np.full((24, 24, 3), 255)).astype(np.uint8)
    ours = Preprocess(information=16, compute=40, method="lanczos3", truncate=truncate)(image)
    assert ours[:10].max() < 10 and ours[:10].min() >= 0
    assert ours[-10:].min() > 245 and ours[-10:].max() <= 255


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("truncate", [True, False])
def test_a_picture_of_the_right_size_is_left_alone(method, truncate):
    image = picture(12, 12)
    preprocess = Preprocess(information=12, compute=12, method=method, truncate=truncate)
    np.testing.assert_array_equal(preprocess(image), image)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", [0, 1, 127, 128, 254, 255])
def test_paper_of_one_grey_keeps_its_level(method, level):
    image = np.full((31, 45, 3), level, np.uint8)
    assert (Preprocess(information=14, compute=28, method=method)(image) == level).all()


def test_the_low_arm_is_the_down_up_arm_before_it_goes_up():
    low = Preprocess(information=8, compute=8)(picture())
    np.testing.assert_array_equal(
        Preprocess(information=8, compute=16)(picture()), Preprocess(information=8, compute=16)(low)
    )


def test_without_stretch_the_central_square_is_taken():
    image = picture(20, 31)
    preprocess = Preprocess(information=8, compute=8, stretch=False)
    np.testing.assert_array_equal(preprocess(image), Preprocess(information=8, compute=8)(image[:, 5:25]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"information": 0}, "information=0 must be a whole number of pixels, 1 or more"),
        ({"compute": 4.5}, "compute=4.5 must be"),
        ({"method": "bilinaer"}, "unknown method 'bilinaer'; did you mean 'bilinear'"),
    ],
)
def test_a_bad_preprocess_is_a_clear_error(fields, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**{"information": 4, "compute": 8, **fields})


# Order and draws


def test_the_order_is_the_same_on_every_machine():
    # Philox's raw stream is fixed by numpy for good (NEP 19): these numbers may never change.
    assert order(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert order(3, 2, 10).tolist() == [8, 2, 4, 1, 3, 6, 5, 0, 7, 9]


def test_the_order_is_a_permutation_and_differs_by_seed_and_epoch():
    orders = [order(seed, epoch, 1000) for seed in range(3) for epoch in range(3)]
    assert all(np.array_equal(np.sort(one), np.arange(1000)) for one in orders)
    assert len({one.tobytes() for one in orders}) == len(orders)


def test_every_example_is_equally_often_first():
    counts = np.bincount([order(seed, 0, 8)[0] for seed in range(4000)], minlength=8)
    assert abs(counts - 500).max() < 5 * np.sqrt(500)  # five standard deviations


def test_draws_are_uniform_and_differ_by_seed_epoch_and_example():
    draws = np.array([draw(seed, epoch, index) for seed in range(5) for epoch in range(5) for index in range(100)])
    assert draws.shape == (2500, 5) and len(np.unique(draws)) == draws.size
    assert draws.min() >= 0 and draws.max() < 1
    # 1 / sqrt(12) is a uniform's standard deviation; five of the mean's.
    assert abs(draws.mean(axis=0) - 0.5).max() < 5 / np.sqrt(12 * 2500)


# Batches


def test_training_sees_each_example_once_an_epoch_and_drops_the_incomplete_batch():
    batches = take(train(Fake(10), seed=5), 7)
    epochs = [np.concatenate([batch.ids for batch in batches[i : i + 3]]) for i in (0, 3)]
    for epoch, ids in enumerate(epochs):
        np.testing.assert_array_equal(ids, order(5, epoch, 10)[:9])
    assert batches[0].images.shape == (3, 6, 6, 3) and batches[0].images.dtype == np.uint8
    assert batches[0].labels.shape == (3, 2) and batches[0].labels.dtype == np.int64


def test_a_batch_holds_what_its_ids_say():
    dataset, preprocess = Fake(10), Preprocess(information=4, compute=6)
    for batch in take(train(dataset), 5):
        for image, label, index in zip(batch.images, batch.labels, batch.ids, strict=True):
            np.testing.assert_array_equal(image, preprocess(dataset[index].image))
            np.testing.assert_array_equal(label, dataset[index].label)


@pytest.mark.parametrize("start_step", [1, 3, 4, 10])
@pytest.mark.parametrize("augment", [None, Augment(flip=True, crop_area=(0.1, 1.0))])
def test_resuming_at_a_step_goes_on_exactly(start_step, augment):
    whole = take(train(Fake(10), augment=augment), 14)[start_step:]
    assert same(take(train(Fake(10), augment=augment, start_step=start_step), 14 - start_step), whole)


def test_evaluation_is_in_order_keeps_the_last_batch_and_ends():
    batches = list(train(Fake(10), is_training=False))
    np.testing.assert_array_equal(np.concatenate([batch.ids for batch in batches]), np.arange(10))
    assert [len(batch.images) for batch in batches] == [3, 3, 3, 1]


def test_evaluation_is_never_augmented():
    augment = Augment(flip=True, crop_area=(0.1, 0.2))
    assert same(list(train(Fake(), is_training=False, augment=augment)), list(train(Fake(), is_training=False)))


@pytest.mark.parametrize(("num_threads", "prefetch", "cache_bytes"), [(1, 0, 0), (8, 5, 1 << 30), (3, 1, 300)])
def test_threads_prefetching_and_caching_change_nothing(num_threads, prefetch, cache_bytes):
    options = {"num_threads": num_threads, "prefetch": prefetch, "cache_bytes": cache_bytes}
    augment = Augment(flip=True, crop_area=(0.3, 1.0))
    assert same(take(train(Fake(), augment=augment, **options), 8), take(train(Fake(), augment=augment), 8))


def test_what_fits_is_decoded_once():
    dataset = Fake(9)
    batches = train(dataset)
    take(batches, 12)
    assert sorted(dataset.reads) == list(range(9))
    assert batches.cached_bytes == 9 * (6 * 6 * 3 + 2 * 8)


def test_what_does_not_fit_is_decoded_again_and_the_limit_holds():
    dataset, size = Fake(9), 6 * 6 * 3 + 2 * 8
    batches = train(dataset, cache_bytes=4 * size + 1)
    take(batches, 9)
    assert batches.cached_bytes == 4 * size
    assert len(dataset.reads) > 9 + 5


def test_the_cache_serves_a_second_evaluation():
    dataset = Fake(7)
    batches = train(dataset, is_training=False)
    assert same(list(batches), list(batches))
    assert len(dataset.reads) == 7


def test_all_arms_see_the_same_flips_and_crops():
    augment = Augment(flip=True, crop_area=(0.2, 0.5))
    arms = [Preprocess(information=i, compute=c, truncate=False) for i, c in ((4, 4), (4, 8), (8, 8))]
    low, down_up, high = (
        np.concatenate([b.images for b in take(Batches(Fake(), arm, batch_size=5, augment=augment), 6)]) for arm in arms
    )
    np.testing.assert_allclose(resize(low, (8, 8)), down_up, atol=1e-3)
    assert np.abs(resize(high, (4, 4)) - low).mean() < 12  # the same rectangle of white noise, seen twice
    assert np.abs(resize(high[:, :, ::-1], (4, 4)) - low).mean() > 18


def test_flips_mirror_about_half_of_the_images():
    plain, flipped = (take(train(Fake(), augment=Augment(flip=flip)), 60) for flip in (False, True))
    mirrored = [np.array_equal(a[:, ::-1], b) for p, f in zip(plain, flipped, strict=True)
                for a, b in zip(p.images, f.images, strict=True)]  # fmt: skip
    assert 60 < sum(mirrored) < 120  # of 180; 4.5 standard deviations


def test_crops_have_the_area_and_the_aspect_that_were_asked_for():
    augment = Augment(crop_area=(0.1, 0.4))
    shapes = [augment.crop(picture(300, 400), draw(0, 0, i)).shape for i in range(300)]
    areas = np.array([h * w / 120000 for h, w, _ in shapes])
    aspects = np.array([w / h for h, w, _ in shapes])
    assert 0.09 < areas.min() < 0.12 and 0.38 < areas.max() < 0.41
    assert 0.74 < aspects.min() < 0.77 and 1.3 < aspects.max() < 1.35


def test_a_broken_example_ends_the_iteration_with_its_own_error():
    with pytest.raises(ValueError, match="example 4 is broken"):
        list(train(Fake(10, broken=(4,)), is_training=False))


def test_leaving_early_ends_the_threads():
    before = threading.active_count()
    iterator = iter(train(Fake()))
    next(iterator)
    iterator.close()
    assert threading.active_count() == before


def test_the_input_bound_share_is_of_the_time_that_the_trainer_took():
    slow_trainer = train(Fake(), prefetch=4)
    for _ in range(5):
        iterator = iter(slow_trainer)
        next(iterator)
    assert 0 < slow_trainer.input_bound_share <= 1

    batches = train(Fake())
    batches.waited_s, batches.wall_s = 1.0, 4.0
    assert batches.input_bound_share == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 11}, "batch_size=11 is more than the 10 images of fake, split train"),
        ({"batch_size": 0, "start_step": -1}, "batch_size=0 must be 1 or more; start_step=-1 must be 0 or more"),
        ({"seed": -1}, "seed=-1 must be 0 or more"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        train(Fake(10), **options)


@pytest.mark.parametrize("crop_area", [(0, 1), (0.5, 0.2), (0.5,), (0.5, 1.5)])
def test_a_bad_crop_area_is_named(crop_area):
    with pytest.raises(ValueError, match="crop_area=.* must be"):
        Augment(crop_area=crop_area)


def test_spread_is_even_and_never_more_than_there_are():
    assert spread(10, 3) == [0, 3, 6]
    assert spread(2, 5) == [0, 1]


def test_importing_the_data_loads_no_framework_and_no_library_that_may_be_missing():
    code = (
        "import sys, experiments.capacity.data.sources, experiments.capacity.data.batches, "
        "experiments.capacity.data.recipes, experiments.capacity.data.glyphs, experiments.capacity.data.digit_canvas; "
        "print(*{'jax', 'torch', 'tensorflow', 'tensorflow_datasets', 'PIL', 'sklearn'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
