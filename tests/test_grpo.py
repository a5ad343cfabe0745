"""GRPO's formulas against oracles of their own: statistics, enumeration and finite differences."""

import itertools
import math
import re
import statistics
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_harness.grpo import (
    advantages,
    clipped_surrogate,
    entropy,
    grpo_loss,
    kl,
    log_probabilities,
)
from grpo_harness.grpo import ratio as importance

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


# Of few digits, so that no two are equal but for a rounding.
ANY_SIZE = st.builds(math.ldexp, st.integers(-99, 99), st.integers(-1070, 1016))


@given(
    st.lists(st.lists(ANY_SIZE, min_size=3, max_size=3), min_size=1, max_size=3),
    st.sampled_from([0, 1]),
    st.sampled_from(["group", "batch"]),
)
def test_no_square_overflows_or_vanishes(groups, ddof, scale):
    """Against exact fractions: the advantages do not depend on the size of the rewards."""
    seen = advantages(double(groups).flatten(), 3, ddof, 0.0, scale=scale).tolist()
    everything = [Fraction(reward) for group in groups for reward in group]
    for i, reward in enumerate(everything):
        own = everything[i - i % 3 : i - i % 3 + 3]
        of = own if scale == "group" else everything
        mean = sum(of) / len(of)
        variance = sum((other - mean) ** 2 for other in of) / (len(of) - ddof)
        gap = reward - sum(own) / 3
        right = math.copysign(root(gap**2 / variance), 1 if gap > 0 else -1) if gap else 0.0
        assert seen[i] == pytest.approx(right, rel=1e-6, abs=1e-6)


def root(square):
    """The square root of a fraction that may be too small for a float."""
    digits = Decimal(square.numerator) / Decimal(square.denominator)
    return float(digits.sqrt())


@pytest.mark.parametrize(
    ("dtype", "reward"), [(torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float32, 1e20)]
)
def test_large_rewards_of_a_small_type(dtype, reward):
    rewards = torch.tensor([reward, -reward, 0, 0], dtype=dtype)
    for scale in ("group", "batch"):
        seen = advantages(rewards, 2, scale=scale)
        sigma = 1 if scale == "group" else math.sqrt(0.5)
        assert seen.dtype == dtype
        assert seen.tolist() == pytest.approx([1 / sigma, -1 / sigma, 0, 0], rel=4e-3)
    with pytest.raises(ValueError, match="too far apart for advantages in"):
        advantages(torch.tensor([3e38, -3e38, -3e38, -3e38]), 4, scale="none")


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_rewards_that_are_counted(dtype, scale):
    rewards = torch.tensor([1, 0, 1, 1, 0, 0], dtype=dtype)
    seen = advantages(rewards, 3, 1, scale=scale)
    assert seen.dtype == torch.float32
    right = list(by_hand([[1, 0, 1], [1, 0, 0]], 1, 1e-4, scale))
    assert seen.tolist() == pytest.approx(right, rel=1e-6)
    # Apart only in a digit that single precision does not have.
    large = torch.tensor([2**24 + 1, 2**24])
    assert advantages(large, 2, 0, 0.0, scale=scale).tolist()[0] > 0


def test_numbers_may_be_numpys_and_of_any_type():
    rewards = double([1, 0, 3, 5])
    right = advantages(rewards, 2, 1, 0.5)
    for two, one in ((2.0, 1.0), (np.int64(2), np.int32(1)), (torch.tensor(2), torch.tensor(1))):
        assert advantages(rewards, two, one, np.float32(0.5)).equal(right)


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


@given(
    st.lists(st.none() | st.floats(-8, 8), min_size=2, max_size=6).filter(any), st.floats(0.1, 4)
)
def test_a_token_that_cannot_be_drawn_adds_nothing(logits, temperature):
    """A logit of -inf (here: None), as top-k leaves it, is as good as no logit."""
    left = [logit for logit in logits if logit is not None]
    every = double([-math.inf if logit is None else logit for logit in logits]).requires_grad_()
    fewer = double(left).requires_grad_()
    seen, right = entropy(every, temperature), entropy(fewer, temperature)
    assert seen.item() == pytest.approx(right.item(), abs=1e-12)
    seen.backward()
    right.backward()
    slopes = iter(fewer.grad.tolist())
    slopes = [0.0 if logit is None else next(slopes) for logit in logits]
    assert every.grad.tolist() == pytest.approx(slopes, abs=1e-12)
    chosen = log_probabilities(every.expand(len(logits), -1), torch.arange(len(logits)))
    kept = log_probabilities(fewer.expand(len(left), -1), torch.arange(len(left)))
    kept = iter(kept.tolist())
    right = [-math.inf if logit is None else next(kept) for logit in logits]
    assert chosen.tolist() == pytest.approx(right)


def test_logits_that_are_no_distribution_are_nan():
    for logits in ([math.nan, 0], [math.inf, 0], [-math.inf, -math.inf]):
        assert entropy(double(logits)).isnan()
        assert log_probabilities(double([logits] * 2), torch.arange(2)).isnan().all()


def test_token_ids_of_any_whole_type():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    right = log_probabilities(logits, torch.tensor([0, 3, 2]))
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert log_probabilities(logits, torch.tensor([0, 3, 2], dtype=dtype)).equal(right)


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


def test_an_infinite_bound_is_none():
    rho, given = double([[0.1, 9.0], [0.1, 9.0]]), double([1, -1])
    seen = clipped_surrogate(rho, given, math.inf, delta=math.inf)
    assert seen.equal(rho * given[:, None])


def test_surrogate_takes_an_advantage_per_completion_or_per_token():
    rho = double([[0.5, 1.1], [1.5, 0.9]])
    given = double([2, -1])
    each = given[:, None].expand(2, 2)
    assert clipped_surrogate(rho, given).equal(clipped_surrogate(rho, each))
    assert clipped_surrogate(rho[:, 0], given).equal(clipped_surrogate(rho, given)[:, 0])


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


def test_mask_of_any_type_and_window_as_a_tensor(batch):
    new, old, given, mask, _ = batch
    right = grpo_loss(new, old, given, mask, loss_type="dapo", window_tokens=25)
    for dtype in (torch.bool, torch.int32, torch.float32):
        window = torch.tensor(25)
        same = {"loss_type": "dapo", "window_tokens": window}
        assert grpo_loss(new, old, given, mask.to(dtype), **same).equal(right)


def test_no_token_no_loss(batch):
    new, old, given, mask, _ = batch
    nothing = torch.zeros_like(mask)
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
        loss = grpo_loss(new, old, given, nothing, loss_type=loss_type, max_completion_length=48)
        assert loss.item() == 0


REWARDS = double([1, 0, -1, 0.5])
NEW = double([[-0.5, -1.0, -2.0], [-0.1, -0.3, -0.2]])
GIVEN = double([1, -1])
MASK = torch.ones(2, 3)
IDS = torch.zeros(2, 3, dtype=torch.long)
LOGITS_OF_IDS = torch.zeros(2, 3, 5)
RHO = NEW.exp()
WRONG = NEW.clone()
WRONG[1, 2] = math.nan


def advantages_of(rewards=REWARDS, group_size=2, **options):
    return advantages(rewards, group_size, **options)


def log_probabilities_of(logits=LOGITS_OF_IDS, tokens=IDS, temperature=1.0):
    return log_probabilities(logits, tokens, temperature)


def surrogate_of(rho=RHO, given=GIVEN, epsilon=0.2, **options):
    return clipped_surrogate(rho, given, epsilon, **options)


def loss_of(new=NEW, old=NEW, given=GIVEN, mask=MASK, **options):
    return grpo_loss(new, old, given, mask, **options)


NO_TENSOR = "is [1, 2], not a tensor"
INVALID = [
    (advantages_of, {"rewards": double([1, 2, 3])}, "3 rewards do not divide into groups of 2"),
    (advantages_of, {"rewards": double([])}, "0 rewards"),
    (advantages_of, {"rewards": double([1, math.nan])}, "rewards [1] are not finite: [nan]"),
    (advantages_of, {"rewards": double([math.inf, 1])}, "rewards [0] are not finite: [inf]"),
    (
        advantages_of,
        {"rewards": double([1, math.inf, 1, math.nan]), "skip_nan": True},
        "rewards [1] are not finite",
    ),
    (advantages_of, {"rewards": double([[1, 2]])}, "shape (1, 2), not (completions,)"),
    (advantages_of, {"rewards": double(1)}, "shape (), not (completions,)"),
    (advantages_of, {"rewards": [1, 2]}, "rewards " + NO_TENSOR),
    (advantages_of, {"rewards": torch.tensor([1j, 2])}, "rewards is of torch.complex64"),
    *(
        (advantages_of, {"group_size": size}, f"group_size is {size!r}, not a whole number from 2")
        for size in (1, 0, -2, 2.5, math.nan, math.inf, True, "2", None, [2, 2])
    ),
    *(
        (advantages_of, {"ddof": ddof}, f"ddof is {ddof!r}, not a whole number from 0 to 1")
        for ddof in (2, -1, 0.5, math.nan, True, "1", None)
    ),
    *(
        (advantages_of, {"eps": eps}, f"eps is {eps!r}, not a finite number from 0")
        for eps in (-1.0, math.nan, math.inf, True, "0", None)
    ),
    (advantages_of, {"scale": "std"}, "scale 'std' is none of group, batch, none"),
    *(
        (of, {"temperature": temperature}, f"temperature is {temperature!r}, not a finite number")
        for of in (log_probabilities_of, lambda **options: entropy(NEW, **options))
        for temperature in (0, -1, math.nan, math.inf, True, "1", None)
    ),
    (entropy, {"logits": double(1)}, "logits have shape (), not (..., vocab)"),
    (entropy, {"logits": torch.zeros(2, 0)}, "logits have shape (2, 0), not (..., vocab)"),
    (entropy, {"logits": [1, 2]}, "logits " + NO_TENSOR),
    (
        log_probabilities_of,
        {"tokens": IDS[0]},
        "logits of shape (2, 3, 5) do not fit tokens of shape (3,)",
    ),
    (log_probabilities_of, {"tokens": IDS + 5}, "ids from 0 to 4: it is 5 at [0, 0]"),
    (
        log_probabilities_of,
        {"tokens": torch.tensor([[0, 1, 2], [3, 4, -100]])},
        "ids from 0 to 4: it is -100 at [1, 2]",
    ),
    (log_probabilities_of, {"tokens": IDS.float()}, "tokens are of torch.float32"),
    (log_probabilities_of, {"tokens": IDS.bool()}, "tokens is of torch.bool"),
    (log_probabilities_of, {"tokens": IDS.to("meta")}, "tokens is on meta, and logits on cpu"),
    *(
        (of, {}, f"{name} does not have the shape of new, (2, 3), but (1, 3)")
        for name, of in (
            ("old", lambda: importance(NEW, NEW[:1])),
            ("reference", lambda: kl(NEW, NEW[:1])),
            ("old", lambda: loss_of(old=NEW[:1])),
            ("mask", lambda: loss_of(mask=MASK[:1])),
            ("reference", lambda: loss_of(reference=NEW[:1])),
        )
    ),
    (lambda: importance(NEW, 0.0), {}, "old is 0.0, not a tensor"),
    (lambda: kl(NEW, NEW, "k2"), {}, "KL estimator 'k2' is none of k1, k3"),
    *(
        (of, {"given": given}, f"advantages have shape {tuple(given.shape)}, not (2,) or (2, 3)")
        for of in (surrogate_of, loss_of)
        for given in (double([1]), double(1), NEW[:1], NEW[:, :1], double([1, 2, 3]), NEW.T)
    ),
    *((of, {"given": [1, 2]}, "advantages " + NO_TENSOR) for of in (surrogate_of, loss_of)),
    (
        surrogate_of,
        {"rho": torch.ones(2, 3, 2), "given": GIVEN},
        "advantages have shape (2,), not (2,) or (2, 3, 2)",
    ),
    *(
        (of, {name: bound}, f"{name} is {bound!r}, not a number")
        for of in (surrogate_of, loss_of)
        for name in ("epsilon", "epsilon_high", "delta")
        for bound in (-0.1, math.nan, True, "1")
    ),
    (surrogate_of, {"delta": 0}, "delta is 0, not a number above 0"),
    (loss_of, {"loss_type": "ppo"}, "loss_type 'ppo' is none of grpo, bnpo, dr_grpo, dapo"),
    (loss_of, {"estimator": "k2"}, "KL estimator 'k2' is none of k1, k3"),
    *(
        (loss_of, {"beta": beta, "reference": NEW}, f"beta is {beta!r}, not a finite number")
        for beta in (-1, math.nan, math.inf, True, "1", None)
    ),
    (loss_of, {"beta": 0.1}, "there is no reference"),
    (loss_of, {"loss_type": "dr_grpo"}, "dr_grpo divides by max_completion_length: give it"),
    *(
        (
            loss_of,
            {"loss_type": kind, "max_completion_length": length},
            f"max_completion_length is {length!r}, not a whole number from 1 on",
        )
        for kind in ("dr_grpo", "grpo")
        for length in (0, -5, 2.5, math.nan, math.inf, True, "48")
    ),
    *(
        (
            loss_of,
            {"loss_type": kind, "window_tokens": window},
            f"window_tokens is {window!r}, not a finite number above 0",
        )
        for kind in ("dapo", "grpo")
        for window in (0, -5, math.nan, math.inf, True, "48", [1, 2])
    ),
    *(
        (loss_of, {"mask": value * MASK}, f"mask is not 0 or 1 everywhere: it is {value} at [0, 0]")
        for value in (0.5, -1.0, 2.0, math.nan, math.inf)
    ),
    (loss_of, {"mask": [1, 2]}, "mask " + NO_TENSOR),
    (loss_of, {"mask": MASK.to("meta")}, "mask is on meta, and new on cpu"),
    *(
        (
            loss_of,
            {"new": new, "old": new, "mask": torch.ones_like(new)},
            f"new has shape {tuple(new.shape)}, not (completions, tokens) with at least one",
        )
        for new in (NEW[:0], NEW[0], NEW[None], double(1))
    ),
    *(
        (
            loss_of,
            {name: WRONG},
            f"{name} is not finite on every sampled token: it is nan at [1, 2]",
        )
        for name in ("new", "old", "reference")
    ),
    (loss_of, {"given": GIVEN / 0}, "advantages is not finite on every sampled token: it is inf"),
    (
        loss_of,
        {"old": NEW - 800},
        "ratio is not finite on every sampled token: it is inf at [0, 0]",
    ),
    (
        loss_of,
        {"reference": NEW + 800, "beta": 0.1, "estimator": "k3"},
        "kl is not finite on every sampled token: it is inf at [0, 0]",
    ),
]


@pytest.mark.parametrize(("of", "options", "says"), INVALID, ids=[case[2] for case in INVALID])
def test_invalid_arguments_are_named(of, options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        of(**options)


def test_the_arguments_that_the_invalid_ones_replace_are_valid():
    for of in (advantages_of, log_probabilities_of, surrogate_of, loss_of):
        assert of().isfinite().all()
