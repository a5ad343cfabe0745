"""The scan for change points, against plain least squares, permutations and random histories."""

from itertools import permutations

import numpy as np
import pytest
from scipy.stats import norm, ttest_ind

from grpo_harness.gate.changepoint import Point, changes, likeliest, pooled, share
from tools.calibration import drifts


def points(values, noise=1.0, spread=0.0, problems=None, completions=1000):
    sets = problems or ["all"] * len(values)
    noises = np.broadcast_to(noise, len(values))
    sizes = np.broadcast_to(completions, len(values))
    return [
        Point(float(v), float(s), spread, int(n), name)
        for v, s, n, name in zip(values, noises, sizes, sets, strict=True)
    ]


def test_two_points_are_a_z_test():
    change = likeliest(points([0.0, 3.0]), one_policy=True)
    assert change.p == pytest.approx(2 * norm.sf(3 / 2**0.5), rel=1e-9)
    assert (change.before, change.after) == pytest.approx((0, 3))
    half = norm.ppf(0.95) * 2**0.5
    assert (change.lower, change.upper) == pytest.approx((3 - half, 3 + half))


def weighted_step(values, variances, at):
    """The statistic of a step by two weighted means, and its size."""
    weights = 1 / np.asarray(variances)
    sides = [slice(None, at), slice(at, None)]
    means = [np.average(np.asarray(values)[s], weights=weights[s]) for s in sides]
    error = sum(1 / weights[s].sum() for s in sides) ** 0.5
    return (means[1] - means[0]) / error, means[1] - means[0]


@pytest.mark.parametrize("seed", range(5))
def test_the_place_is_that_of_the_best_two_weighted_means(seed):
    rng = np.random.default_rng(seed)
    m = 12
    # Noise as one spread of completions makes it at several sizes.
    sizes = rng.integers(100, 1000, m)
    noise = 1 / np.sqrt(sizes)
    values = rng.normal(0, noise) + 0.05 * (np.arange(m) >= 7)
    change = likeliest(points(values, noise, completions=sizes), one_policy=True)
    steps = [weighted_step(values, noise**2, at) for at in range(1, m)]
    best = int(np.argmax([abs(z) for z, _ in steps]))
    assert change.at == best + 1
    assert change.after - change.before == pytest.approx(steps[best][1])


def test_sets_of_problems_are_compared_by_generalised_least_squares():
    rng = np.random.default_rng(1)
    m, sets = 8, ["a"] * 3 + ["b"] * 5
    values = rng.normal(0, 1, m)
    change = likeliest(points(values, 1.0, 2.0, sets), one_policy=True)
    covariance = np.eye(m) + 4.0 * (np.array(sets)[:, None] == np.array(sets))
    inverse = np.linalg.inv(covariance)
    found = []
    for at in range(1, m):
        x = np.column_stack([np.ones(m), np.arange(m) >= at])
        spread = np.linalg.inv(x.T @ inverse @ x)
        size = (spread @ x.T @ inverse @ values)[1]
        found.append((abs(size) / spread[1, 1] ** 0.5, at, size))
    _, at, size = max(found)
    assert change.at == at
    assert change.after - change.before == pytest.approx(size)


@pytest.mark.parametrize("one_policy", [True, False])
@pytest.mark.parametrize("m", [5, 30])
def test_the_chance_is_that_of_random_series_and_never_below(m, one_policy):
    """Policies differ by much more than the noise: then the chance is that of an unknown one."""
    rng = np.random.default_rng(m)
    scale = 1.0 if one_policy else 100.0
    series = rng.normal(0, scale, (1500, m))
    p = np.array([likeliest(points(values), one_policy=one_policy).p for values in series])
    for alpha in (0.01, 0.05):
        rate = (p <= alpha).mean()
        error = (alpha / len(p)) ** 0.5
        assert 0.6 * alpha - 3 * error < rate < alpha + 3 * error


def exceeds(values, threshold):
    """How often the largest t statistic of two means exceeds a threshold, over all orders."""
    orders = np.array(list(permutations(values)))
    m = len(values)
    largest = np.zeros(len(orders))
    for at in range(1, m):
        ours, theirs = orders[:, :at], orders[:, at:]
        gap = theirs.mean(1) - ours.mean(1)
        rest = ((ours - ours.mean(1, keepdims=True)) ** 2).sum(1)
        rest += ((theirs - theirs.mean(1, keepdims=True)) ** 2).sum(1)
        t = np.abs(gap) / np.sqrt(rest / (m - 2) * (1 / at + 1 / (m - at)))
        largest = np.maximum(largest, t)
    return (largest >= threshold).mean()


def test_the_rate_of_false_alarms_is_that_of_all_permutations():
    """Without a change all orders of a series are equally likely, whatever the noise is."""
    m, alpha = 7, 0.05

    def chance(t):
        # A series whose largest t statistic is this one, at its first place: two means, far apart.
        values = np.arange(m - 1.0)
        error = np.sqrt(values.var(ddof=1) * (1 + 1 / (m - 1)))
        series = [values.mean() + t * error, *values]
        first = abs(ttest_ind(series[:1], series[1:]).statistic)
        assert first == pytest.approx(t)
        change = likeliest(points(np.array(series) * 1000), one_policy=False)
        assert change.at == 1
        return change.p

    low, high = 3.0, 30.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle) > alpha else (low, middle)
    rng = np.random.default_rng(0)
    rates = [exceeds(rng.normal(size=m), high) for _ in range(60)]
    error = np.std(rates) / len(rates) ** 0.5
    assert 0.6 * alpha < np.mean(rates) + 3 * error
    assert np.mean(rates) - 3 * error < alpha


def test_few_policies_prove_nothing():
    assert likeliest(points([0, 0, 100]), one_policy=False) is None
    assert likeliest(points([1.0]), one_policy=True) is None
    assert likeliest([], one_policy=True) is None
    four = likeliest(points([0.0, 0.1, 9.0, 9.1]), one_policy=False)
    assert four.p > 0.01
    assert likeliest(points([0.0, 0.1, 9.0, 9.1]), one_policy=True).p < 1e-8


def test_changes_are_independent_of_direction_and_unit():
    rng = np.random.default_rng(5)
    values = rng.normal(size=20) + 6.0 * (np.arange(20) >= 8)
    (up,) = changes(points(values), 0.01, one_policy=True)
    (down,) = changes(points(-values), 0.01, one_policy=True)
    (scaled,) = changes(points(1e-3 * values, 1e-3), 0.01, one_policy=True)
    assert up.at == down.at == scaled.at == 8
    assert up.p == pytest.approx(down.p) == pytest.approx(scaled.p)
    assert down.upper == pytest.approx(-up.lower)


def test_a_longer_run_of_other_problems_is_no_change_and_a_drop_on_them_is():
    """The mean of other problems differs by what problems differ by; that is no evidence."""
    values = [0.70] * 6 + [0.74] * 6
    sets = ["few"] * 6 + ["many"] * 6
    moved = points(values, 0.01, 0.04, sets)
    assert changes(moved, 0.01, one_policy=True) == []
    assert len(changes(points(values, 0.01, 0.04), 0.01, one_policy=True)) == 1


def test_one_point_of_little_noise_by_chance_proves_nothing():
    """All completions of a run can be alike by chance; its own noise would then be nearly zero."""
    noise = [0.01] * 10 + [0.0001]
    values = [0.95 + 0.01 * (-1) ** i for i in range(10)] + [0.975]
    assert changes(points(values, noise), 0.01, one_policy=True) == []


def test_the_parts_of_all_looks_are_the_whole_risk():
    assert share(0.01, 5, 1) == 0
    assert 5 * sum(share(0.01, 5, runs) for runs in range(2, 100_000)) == pytest.approx(0.01, 1e-4)


def test_a_point_has_the_errors_of_its_completions_and_of_its_problems():
    """Against the variances over many draws, of the same problems and of new ones."""
    rng = np.random.default_rng(0)
    n, k, times = 200, 4, 2000
    skills = rng.beta(0.7, 0.3, n)

    def point(correct):
        rates = correct / k
        return Point.of(rates, rates * (1 - rates) / (k - 1), n * k, 1.0, "all")

    same = [point(rng.binomial(k, skills)) for _ in range(times)]
    new = [point(rng.binomial(k, rng.beta(0.7, 0.3, n))) for _ in range(times)]
    of_same, of_new = np.std([p.value for p in same]), np.std([p.value for p in new])
    assert np.mean([p.noise for p in same]) == pytest.approx(of_same, rel=0.06)
    whole = np.sqrt(np.mean([p.noise**2 + p.spread**2 for p in new]))
    assert whole == pytest.approx(of_new, rel=0.06)


def test_completions_that_are_all_alike_have_some_noise():
    point = Point.of(np.ones(64), np.zeros(64), 256, 1.0, "all")
    assert point.noise == pytest.approx(2**0.5 / 256)
    once = Point.of(np.array([0.0, 1.0] * 32), np.full(64, np.nan), 64, 1.0, "all")
    assert once.noise == pytest.approx((0.25 / 63 + 2 / 64**2) ** 0.5)


def test_measurements_of_one_commit_are_weighted_by_their_completions():
    one, two = points([0.4, 0.7], [0.02, 0.01], completions=[100, 200])
    both = pooled([one, two])
    assert both.value == pytest.approx(0.6)
    assert both.noise == pytest.approx((0.02**2 / 9 + 0.01**2 * 4 / 9) ** 0.5)
    assert both.completions == 300


@pytest.mark.parametrize(
    ("truth", "mutant"),
    [(truth, name) for truth in drifts.UNCHANGED for name in drifts.MUTANTS.get(truth.name, {})],
    ids=str,
)
def test_each_guard_of_the_scan_is_needed(truth, mutant):
    """Histories without a change: without the guard, many have a drift at one of the looks."""
    rng = np.random.default_rng(0)
    rules = {"scan": drifts.scan, mutant: drifts.MUTANTS[truth.name][mutant]}
    found = [drifts.alarms(truth, rules, rng) for _ in range(20)]
    assert sum(each["scan"] for each in found) <= 1
    assert sum(each[mutant] for each in found) >= 3
