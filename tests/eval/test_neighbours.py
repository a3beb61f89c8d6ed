import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval.neighbours import density_coverage, memorisation, precision_recall


def features(n, d=8, seed=0, shift=0.0):
    return (np.random.default_rng(seed).normal(size=(n, d)) + shift).astype(np.float32)


def line(*values):
    return np.array(values, np.float64)[:, None]


def test_precision_and_recall_are_those_of_points_on_a_line():
    # Radii with one neighbour: real 1 1 8, fake 1.5 1.5 1.5.
    real, fake = line(0, 1, 9), line(2, 3.5, 5)
    precision, recall = precision_recall(real, fake, k=1)
    # Fakes within real balls [-1,1], [0,2], [1,17]: all; reals in [0.5,3.5], [2,5], [3.5,6.5]: 1.
    assert precision == 1 and recall == pytest.approx(1 / 3)
    assert precision_recall(fake, real, k=1) == (recall, precision)


def test_the_surface_of_a_ball_belongs_to_precision_and_not_to_coverage():
    real = line(0, 1, 10, 11)  # every radius is 1
    assert precision_recall(real, line(2, 12), k=1)[0] == 1
    assert density_coverage(real, line(2, 12), k=1) == (0, 0)
    assert density_coverage(real, line(1.99, 11.99), k=1) == (1, 0.5)


def test_density_counts_balls_and_coverage_counts_reals():
    real = line(0, 1, 2, 30)  # radii with two neighbours: 2 1 2 29
    density, coverage = density_coverage(real, line(1.5, -1, 100), k=2)
    # 1.5 lies in all four balls, -1 in the first alone, 100 in none.
    assert density == pytest.approx((4 + 1) / (2 * 3)) and coverage == 1
    assert density_coverage(real, line(-1, -1), k=2) == (0.5, 0.25)


def test_sets_of_one_distribution_score_high_and_distant_ones_zero():
    real = features(200)
    near = precision_recall(real, features(200, seed=1)) + density_coverage(
        real, features(200, seed=1)
    )
    assert min(near) > 0.5
    assert precision_recall(real, features(200, seed=1, shift=9)) == (0, 0)
    assert density_coverage(real, features(200, seed=1, shift=9)) == (0, 0)


@pytest.mark.parametrize("block", [300, 299, 7])
def test_distances_of_copies_are_equal_in_any_block(block):
    # Features that are no whole numbers: equal in exact arithmetic only, and the sums of products
    # run in another order where a tile is narrow. A ball of k = 5 holds its centre and four more,
    # and on its surface the fifth.
    real = features(300, 64) * 7 + 100
    assert density_coverage(real, real[::-1], k=5, block=block) == (1, 1)
    for copied in (real[:50], features(50, 999) * 3 + 1000):  # the latter's lengths lose digits
        check_copies(copied, block)


def check_copies(real, block):
    sixfold = np.tile(real, (6, 1))  # every radius is 0: a ball that holds its copies alone
    assert density_coverage(sixfold, real[::-1], k=5, block=block) == (0, 0)
    assert precision_recall(sixfold, real[::-1], k=5, block=block)[0] == 1


@pytest.mark.parametrize("block", [1, 7, 30, 64])
def test_blocks_change_nothing(block):
    real, fake = features(40), features(50, seed=1)
    assert precision_recall(real, fake, block=block) == precision_recall(real, fake)
    assert density_coverage(real, fake, block=block) == density_coverage(real, fake)
    whole, parts = memorisation(fake, real), memorisation(fake, real, block=block)
    np.testing.assert_array_equal(parts.nearest, whole.nearest)
    np.testing.assert_array_equal(parts.ratio, whole.ratio)
    assert (parts.copied, parts.repeated) == (whole.copied, whole.repeated)


def test_rotation_and_scale_change_nothing():
    q = np.linalg.qr(features(8, seed=5).astype(np.float64))[0]
    real, fake = features(60).astype(np.float64), features(60, seed=1, shift=0.3)
    assert precision_recall(3 * real @ q, 3 * fake @ q) == precision_recall(real, fake)
    assert density_coverage(3 * real @ q, 3 * fake @ q) == density_coverage(real, fake)


def test_sets_of_unequal_size_swap_precision_and_recall():
    real, fake = features(30), features(90, seed=1, shift=0.4)
    precision, recall = precision_recall(real, fake)
    assert precision != recall and precision_recall(fake, real) == (recall, precision)


def test_memorisation_is_the_ratio_of_distances():
    training = line(0, 4, 10, 11)
    found = memorisation(line(1, 3, 10.25, 30), training)
    np.testing.assert_array_equal(found.nearest, [0, 1, 2, 3])
    np.testing.assert_allclose(found.ratio, [1 / 4, 1 / 4, 0.25, 19])
    assert found.copied == 0.75
    # Apart: 2, 2, 7.25 and 19.75, over the spacings 4, 4, 1 and 1.
    assert found.repeated == 0
    assert memorisation(line(1, 3, 10.25, 30), training, threshold=0.51).repeated == 0.5


def test_copies_have_ratio_zero_and_new_images_about_one():
    training = features(200, 16)
    copies = memorisation(training[50:150], training)
    np.testing.assert_array_equal(copies.nearest, np.arange(50, 150))
    np.testing.assert_array_equal(copies.ratio, 0)
    assert copies.copied == 1 and copies.repeated == 0
    new = memorisation(features(200, 16, seed=1), training)
    assert new.copied == 0 and 0.9 < np.median(new.ratio) < 1.1


def test_near_copies_far_from_the_origin_are_told_from_copies():
    training = features(50, 16).astype(np.float64) + 1e3
    found = memorisation(training + 1e-3, training)
    spacing = np.sort(np.linalg.norm(training[:, None] - training[None], axis=-1), 1)[:, 1]
    np.testing.assert_allclose(found.ratio, 4e-3 / spacing, rtol=1e-6)


def test_repeated_samples_are_counted():
    samples = features(20)
    found = memorisation(np.concatenate([samples, samples[:5]]), features(100, seed=1))
    assert found.repeated == 10 / 25


def test_a_training_image_that_is_there_twice_has_copies_and_nothing_near():
    found = memorisation(line(0, 0.1, 7), line(0, 0, 9))
    np.testing.assert_array_equal(found.ratio, [0, np.inf, 2 / 9])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: precision_recall(features(4), features(3)), "3 neighbours of 4 real and 3 fake"),
        (lambda: density_coverage(features(5), features(50)), "5 neighbours of 5 real"),
        (lambda: precision_recall(features(4), features(4), k=0), "1 or more neighbours"),
        (lambda: memorisation(features(1), features(4)), "sample features of 1 images"),
        (lambda: memorisation(features(4), features(4, 7)), "values differ"),
        (lambda: density_coverage(features(9) * np.nan, features(9)), "real features of 9 of 9"),
    ],
)
def test_bad_sets_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_few_fakes_are_enough_for_coverage():
    assert density_coverage(line(0, 1, 2), line(1), k=2)[1] == 1
