"""GRPO's formulas against oracles of their own: statistics, enumeration and finite differences."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.grpo import advantages, clipped_surrogate, entropy, grpo_loss, kl, log_probabilities
from harness.grpo import ratio as importance

NUMBERS = st.floats(-50, 50, allow_subnormal=False)
GROUPS = st.integers(2, 5).flatmap(
    lambda size: st.lists(st.lists(NUMBERS, min_size=size, max_size=size), min_size=1, max_size=4)
)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def by_hand(groups, ddof, eps, scale):
    """The advantages, with Python's exact statistics."""
    sigma = statistics.stdev if ddof else statistics.pstdev
    everything = [reward for group in groups for reward in group]
    for group in groups:
        divide = {
            "none": lambda: 1.0,
            "group": lambda group=group: sigma(group) + eps,
            "batch": lambda: sigma(everything) + eps,
        }[scale]()
        for reward in group:
            flat = min(group) == max(group)
            yield 0.0 if flat else (reward - statistics.mean(group)) / divide


@given(GROUPS, st.sampled_from([0, 1]), st.sampled_from(["group", "batch", "none"]))
def test_advantages_are_the_formula(groups, ddof, scale):
    rewards = double([reward for group in groups for reward in group])
    right = list(by_hand(groups, ddof, 1e-4, scale))
    seen = advantages(rewards, len(groups[0]), ddof, 1e-4, scale=scale)
    np.testing.assert_allclose(seen, right, rtol=1e-7, atol=1e-7)


@given(GROUPS)
def test_advantages_of_a_group_sum_to_zero_and_keep_its_order(groups):
    rewards = double([reward for group in groups for reward in group])
    seen = advantages(rewards, len(groups[0])).view(len(groups), -1)
    assert seen.sum(1).abs().max() < 1e-6
    for group, of_group in zip(groups, seen.tolist(), strict=True):
        order = sorted(range(len(group)), key=group.__getitem__)
        assert all(of_group[a] <= of_group[b] for a, b in itertools.pairwise(order))


def test_two_completions_and_a_gap_of_one():
    assert advantages(double([1, 0]), 2, 0, 0.0).tolist() == [1, -1]
    seen = advantages(double([1, 0]), 2, 1, 1e-4).tolist()
    assert seen == pytest.approx([0.70701, -0.70701], abs=5e-6)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_advantage_zero(ddof, eps, dtype):
    rewards = torch.full((9,), 0.1, dtype=dtype)
    for scale in ("group", "batch", "none"):
        assert not advantages(rewards, 3, ddof, eps, scale=scale).any()


def test_reward_that_is_missing_counts_for_nothing():
    rewards = double([1, math.nan, 3, 5, math.nan, math.nan, math.nan, 7])
    seen = advantages(rewards, 4, 1, 1e-4, skip_nan=True)
    three = advantages(double([1, 3, 5]), 3, 1, 1e-4).tolist()
    assert seen.tolist() == pytest.approx([three[0], 0, three[1], three[2], 0, 0, 0, 0])
    both = advantages(rewards, 4, 1, 1e-4, skip_nan=True, scale="batch")
    assert both[2].item() == pytest.approx(0)
    assert both[3].item() == pytest.approx(2 / (statistics.stdev([1, 3, 5, 7]) + 1e-4))
    assert not advantages(double([math.nan] * 4), 2, skip_nan=True, scale="batch").any()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([1.0, 2.0, 3.0], 2), "3 rewards do not divide into groups of 2"),
        (([1.0, 2.0], 1), "groups of 1"),
        (([], 2), "0 rewards"),
        (([1.0, math.nan], 2), r"rewards \[1\] are not finite"),
        (([math.inf, 1.0], 2), r"rewards \[0\] are not finite"),
        (([1.0, 2.0], 2, 2), "ddof is 2"),
        (([1.0, 2.0], 2, 0, -1.0), "eps is -1"),
        (([1.0, 2.0], 2, 0, math.nan), "eps is nan"),
    ],
)
def test_advantages_name_what_is_wrong(arguments, named):
    rewards, *others = arguments
    with pytest.raises(ValueError, match=named):
        advantages(double(rewards), *others)


def test_advantages_refuse_another_scale_another_shape_and_an_infinite_reward():
    with pytest.raises(ValueError, match="scale 'std' is none of group, batch, none"):
        advantages(double([1, 2]), 2, scale="std")
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        advantages(double([[1, 2]]), 2)
    with pytest.raises(ValueError, match=r"\[1\] are not finite"):
        advantages(double([1, math.inf]), 2, skip_nan=True)


@given(st.lists(NUMBERS, min_size=2, max_size=6), st.floats(0.1, 4))
def test_log_probabilities_and_entropy_of_a_distribution(logits, temperature):
    scaled = np.array(logits) / temperature
    weights = np.exp(scaled - scaled.max())
    p = weights / weights.sum()
    n = len(logits)
    seen = log_probabilities(double([logits] * n), torch.arange(n), temperature)
    np.testing.assert_allclose(seen.exp(), p, rtol=1e-9, atol=1e-12)
    nats = -sum(x * math.log(x) for x in p if x > 0)
    assert entropy(double(logits), temperature).item() == pytest.approx(nats, abs=1e-9)


@pytest.mark.parametrize("temperature", [0, -1, math.nan])
def test_temperature_must_be_above_zero(temperature):
    with pytest.raises(ValueError, match="temperature is"):
        log_probabilities(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), temperature)
    with pytest.raises(ValueError, match="temperature is"):
        entropy(torch.zeros(1, 3), temperature)


def test_log_probabilities_refuse_tokens_of_another_shape():
    with pytest.raises(ValueError, match="do not fit tokens"):
        log_probabilities(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))


@given(st.floats(0.01, 5), NUMBERS, st.floats(0, 0.9), st.floats(0, 0.9), st.floats(1, 4))
def test_surrogate_by_cases(rho, advantage, low, high, delta):
    """The minimum, written out: A > 0 is bounded from above, A < 0 from below."""
    bounded = min(rho, delta)
    if advantage >= 0:
        right = advantage * min(bounded, max(rho, 1 - low), 1 + high)
    else:
        right = advantage * max(bounded, min(max(rho, 1 - low), 1 + high))
    seen = clipped_surrogate(
        double([[rho]]), double([advantage]), low, epsilon_high=high, delta=delta
    )
    assert seen.item() == pytest.approx(right, rel=1e-12, abs=1e-12)


def test_surrogate_refuses_negative_bounds():
    one = torch.ones(1, 1)
    for options in ({"epsilon": -0.1}, {"epsilon_high": -0.1}, {"delta": 0}):
        with pytest.raises(ValueError, match=r"epsilon is|delta is"):
            clipped_surrogate(one, one, **options)


LOGITS = double([0.3, -1.2, 0.8, 0.1])
REFERENCE = torch.log_softmax(double([-0.5, 0.4, 0.2, 1.0]), 0)


def mean_gradient(of_token):
    """The mean over every token, by the policy's own probabilities, of a term's gradient."""
    logits = LOGITS.clone().requires_grad_()
    new = torch.log_softmax(logits, 0)
    weights = new.detach().exp()
    (weights * of_token(new, new.detach())).sum().backward()
    return logits.grad


def divergence_gradient(forward):
    logits = LOGITS.clone().requires_grad_()
    new = torch.log_softmax(logits, 0)
    p, q = (new, REFERENCE) if forward else (REFERENCE, new)
    (p.exp() * (p - q)).sum().backward()
    return logits.grad


def test_both_estimators_are_the_divergence_in_the_mean():
    new = torch.log_softmax(LOGITS, 0)
    right = (new.exp() * (new - REFERENCE)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((new.exp() * kl(new, REFERENCE, estimator)).sum(), right)
    assert (kl(new, REFERENCE, "k3") >= 0).all()
    assert (kl(new, REFERENCE, "k1") < 0).any()


def test_k1_regularises_nothing_and_k3_times_the_ratio_does():
    k1 = mean_gradient(lambda new, _: kl(new, REFERENCE, "k1"))
    torch.testing.assert_close(k1, torch.zeros_like(k1))
    times = mean_gradient(lambda new, old: kl(new, REFERENCE, "k3") * importance(new, old))
    torch.testing.assert_close(times, divergence_gradient(forward=True))
    plain = mean_gradient(lambda new, _: kl(new, REFERENCE, "k3"))
    torch.testing.assert_close(plain, divergence_gradient(forward=False))


def test_unknown_estimator():
    with pytest.raises(ValueError, match="'k2' is none of k1, k3"):
        kl(LOGITS, REFERENCE, "k2")


@pytest.fixture
def batch():
    """Two groups of two completions of 4, 2, 3 and 1 tokens, with what stands beyond them."""
    generator = torch.Generator().manual_seed(3)
    new = -torch.rand(4, 4, generator=generator, dtype=torch.float64)
    old = new + 0.4 * torch.randn(4, 4, generator=generator, dtype=torch.float64)
    reference = new + 0.4 * torch.randn(4, 4, generator=generator, dtype=torch.float64)
    mask = (torch.arange(4) < torch.tensor([[4], [2], [3], [1]])).long()
    beyond = torch.where(mask.bool(), 0.0, math.nan)
    given = advantages(double([1, 0, -1, 0.5]), 2)
    return new + beyond, old + beyond, given, mask, reference + beyond


def loss_by_hand(batch, loss_type, beta, estimator, times, window):
    """The loss in plain loops over completions and tokens."""
    new, old, given, mask, reference = batch
    means, total, tokens = [], 0.0, 0
    for i in range(4):
        terms = []
        for t in range(int(mask[i].sum())):
            rho = math.exp(new[i, t] - old[i, t])
            a = given[i].item()
            surrogate = min(rho * a, min(max(rho, 0.8), 1.28) * a)
            gap = (reference[i, t] - new[i, t]).item()
            divergence = -gap if estimator == "k1" else math.exp(gap) - gap - 1
            terms.append(-surrogate + beta * divergence * (rho if times else 1))
        means.append(sum(terms) / len(terms))
        total, tokens = total + sum(terms), tokens + len(terms)
    return {
        "grpo": sum(means) / 4,
        "bnpo": total / tokens,
        "dr_grpo": total / (4 * 48),
        "dapo": total / window,
    }[loss_type]


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize(
    ("beta", "estimator", "times"), [(0, "k1", False), (0.3, "k1", False), (0.3, "k3", True)]
)
def test_loss_and_gradient(batch, loss_type, beta, estimator, times):
    new, old, given, mask, reference = batch
    options = {
        "loss_type": loss_type,
        "epsilon_high": 0.28,
        "beta": beta,
        "reference": reference,
        "estimator": estimator,
        "kl_times_ratio": times,
        "window_tokens": 25,
        "max_completion_length": 48,
    }

    def at(values):
        return grpo_loss(values, old, given, mask, **options)

    right = loss_by_hand(batch, loss_type, beta, estimator, times, 25)
    assert at(new).item() == pytest.approx(right, rel=1e-12)

    leaf = new.clone().requires_grad_()
    at(leaf).backward()
    step = 1e-6
    for i, t in mask.nonzero().tolist():
        shift = torch.zeros_like(new)
        shift[i, t] = step
        slope = (at(new + shift) - at(new - shift)).item() / (2 * step)
        assert leaf.grad[i, t].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)
    assert not leaf.grad[~mask.bool()].any(), "a token beyond the mask has a gradient"


def test_on_policy_the_grpo_loss_is_zero_and_its_gradient_is_not(batch):
    new, _, given, mask, _ = batch
    leaf = new.clone().requires_grad_()
    loss = grpo_loss(leaf, leaf.detach(), given, mask)
    loss.backward()
    assert abs(loss.item()) < 1e-16
    right = -given[:, None] / mask.sum(1, keepdim=True) / 4 * mask
    torch.testing.assert_close(leaf.grad, right)


@given(st.lists(st.integers(1, 6), min_size=4, max_size=4))
def test_dapo_adds_up_over_the_parts_of_a_step_and_bnpo_does_not_average(lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    new = -torch.rand(4, 6, generator=generator, dtype=torch.float64)
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    given = advantages(double([1, 0, -1, 0.5]), 2)

    def part(rows, **options):
        return grpo_loss(new[rows], new[rows], given[rows], mask[rows], **options).item()

    window = {"loss_type": "dapo", "window_tokens": sum(lengths)}
    whole = part(slice(None), **window)
    halves = [part(slice(0, 2), **window), part(slice(2, 4), **window)]
    assert sum(halves) == pytest.approx(whole, abs=1e-12)
    assert part(slice(None), loss_type="dapo") == pytest.approx(whole, abs=1e-12)
    assert part(slice(None), loss_type="bnpo") == pytest.approx(whole, abs=1e-12)


def test_no_token_no_loss(batch):
    new, old, given, mask, _ = batch
    nothing = torch.zeros_like(mask)
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
        loss = grpo_loss(new, old, given, nothing, loss_type=loss_type, max_completion_length=48)
        assert loss.item() == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss_type": "ppo"}, "loss_type 'ppo' is none of grpo, bnpo, dr_grpo, dapo"),
        ({"beta": -1}, "beta is -1"),
        ({"beta": 0.1}, "there is no reference"),
        ({"beta": 0.1, "reference": torch.zeros(1, 2)}, "reference has not the shape of new"),
        ({"loss_type": "dr_grpo"}, "give it"),
        ({"loss_type": "dapo", "window_tokens": 0}, "window_tokens is 0"),
        ({"epsilon": -0.1}, "epsilon is -0.1"),
    ],
)
def test_loss_names_what_is_wrong(batch, options, named):
    new, old, given, mask, _ = batch
    with pytest.raises(ValueError, match=named):
        grpo_loss(new, old, given, mask, **options)


def test_loss_refuses_what_is_not_finite(batch):
    new, old, given, mask, _ = batch
    wrong = new.clone()
    wrong[1, 1] = math.nan
    with pytest.raises(ValueError, match="new is not finite on every sampled token"):
        grpo_loss(wrong, old, given, mask)
    with pytest.raises(ValueError, match="old is not finite on every sampled token"):
        grpo_loss(new, wrong, given, mask)
    with pytest.raises(ValueError, match="not all advantages are finite"):
        grpo_loss(new, old, given * math.nan, mask)
