"""What an observed step should have computed: `grpo_harness.grpo.formulas` on raw completions.

No TRL code is used. The model is a fresh copy of the base policy with the run's weights before the
step, in double precision, and completions have no left padding. If the run differs,
`Oracle.suspect` looks for the one convention (``conventions.py``) that explains it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_harness.contract.conventions import Conventions, alternatives
from grpo_harness.contract.invariant import GRADIENT_TOLERANCE, average, distance, scale
from grpo_harness.contract.trace import Batch, Step, Tensors, Trace
from grpo_harness.engines.weights import device_of, load_weights
from grpo_harness.grpo import advantages, entropy, grpo_loss, kl, log_probabilities, ratio
from grpo_harness.policy import Policy, load


@dataclass(frozen=True, eq=False)
class Computed:
    """The correct loss and gradient of a step, and figures averaged as TRL logs them.

    ``log_probabilities`` has shape (completions, tokens of the longest).
    """

    loss: float
    gradient: Tensors
    logged: dict[str, float]
    log_probabilities: Tensor


class Oracle:
    """Recomputes steps of runs that started from one policy."""

    def __init__(self, policy: str, *, device: str = "auto") -> None:
        self.policy: Policy = load(policy)
        self.device = device_of(device)
        model = load_weights(self.policy, self.device, torch.float32)
        self.base = {name: p.cpu().clone() for name, p in model.named_parameters()}
        self._model = model.double().requires_grad_(True)
        self._computed: dict[Step, Computed] = {}
        self._suspects: dict[Step, str] = {}

    def truncated(self, completion: Sequence[int]) -> bool:
        """Tell whether a completion was cut off before an end token."""
        return completion[-1] not in self.policy.eos_token_ids

    def log_probabilities(
        self, weights: Tensors, batch: Batch, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Return each token's log-probability and entropy under ``weights``.

        Both have shape (completions, tokens of the longest), are 0 beyond a completion's end, and
        carry the gradient.
        """
        self._set(weights)
        logits, tokens, mask = self._read(batch)
        values = log_probabilities(logits, tokens, temperature)
        return values * mask, entropy(logits, temperature) * mask

    def redraw(
        self, weights: Tensors, batch: Batch, temperature: float, top_p: float = 1.0
    ) -> list[list[bool]]:
        """Draw each token again from the recorded random state, and tell which are the same.

        Sampling one token of each completion at a time uses the same random numbers whatever the
        probabilities are, so every token can be redrawn after the recorded ones before it.
        """
        assert batch.random_state is not None
        generator = torch.Generator(self.device)
        generator.set_state(batch.random_state)
        self._set(weights)
        with torch.no_grad():
            logits, _, _ = self._read(batch)
        probabilities = _nucleus(torch.softmax(logits.float() / temperature, -1), top_p)
        drawn = [
            torch.multinomial(p, 1, generator=generator)[:, 0] for p in probabilities.unbind(1)
        ]
        return [
            [int(drawn[t][i]) == token for t, token in enumerate(completion)]
            for i, completion in enumerate(batch.completion_ids)
        ]

    def advantages(self, rewards: Sequence[float | None], g: int, how: Conventions) -> Tensor:
        """Return the advantages, shape (completions,), of the returned ``rewards``."""
        numbers = [math.nan if reward is None else reward for reward in rewards]
        if how.rewards_of_the_first > 1:
            n = how.rewards_of_the_first
            numbers = [numbers[i - i % n] for i in range(len(numbers))]
        rolled = numbers[-how.groups_off * g :] + numbers[: -how.groups_off * g]
        return advantages(
            # In TRL's precision, because rounding matters for rewards that hardly differ.
            torch.tensor(rolled if how.groups_off else numbers, dtype=torch.float32),
            g,
            how.ddof,
            how.eps,
            scale=how.scale,
            skip_nan=True,
        )

    def step(self, run: Trace, step: Step, how: Conventions | None = None) -> Computed:
        """Recompute ``step`` by the recipe's conventions, or by ``how``."""
        if how is None:
            if step not in self._computed:
                self._computed[step] = self.step(run, step, Conventions.of(run.recipe))
            return self._computed[step]
        batch, g = step.batch, run.recipe.num_generations
        old = reference = None
        with torch.no_grad():
            if step.number > batch.step + 1:
                drew = run.steps[batch.step].weights
                old, _ = self.log_probabilities(drew, batch, how.temperature)
            if how.beta:
                reference, _ = self.log_probabilities(self.base, batch, how.temperature)
        # Last, because the gradient is taken at the model's current weights.
        new, entropies = self.log_probabilities(step.weights, batch, how.temperature)
        old = new.detach() if old is None else old
        reference = new.detach() if reference is None else reference
        given = self.advantages(batch.rewards, g, how).to(new)
        mask = self._mask(batch, how).to(new.device)
        micro_batches = rows_of(step)
        losses, figures = [], []
        for rows in micro_batches:
            # 0 for a micro-batch that has no row of the batch.
            loss = new[rows].sum()
            if rows:
                loss = grpo_loss(
                    new[rows],
                    old[rows],
                    given[rows],
                    mask[rows],
                    loss_type=how.loss_type,
                    epsilon=how.epsilon,
                    epsilon_high=how.epsilon_high,
                    delta=how.delta,
                    beta=how.beta,
                    reference=reference[rows],
                    estimator=how.estimator,
                    kl_times_ratio=how.kl_times_ratio,
                    window_tokens=float(mask.sum()) / run.steps_per_batch or None,
                    max_completion_length=run.recipe.max_completion_length,
                )
            losses.append(loss if how.loss_type == "dapo" else loss / len(micro_batches))
            with torch.no_grad():
                rho = ratio(new[rows], old[rows])
                divergence = kl(new[rows], reference[rows], how.estimator)
                divergence = divergence * rho if how.kl_times_ratio else divergence
                low = (rho < 1 - how.epsilon) & (given[rows] < 0)[:, None]
                high = (rho > 1 + how.epsilon_high) & (given[rows] > 0)[:, None]
                figures.append(_figures(entropies[rows], divergence, low, high, mask[rows]))
        total = torch.stack(losses).sum()
        names, leaves = zip(*self._model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(total, leaves)
        return Computed(
            float(total.detach()),
            {n: grad.float().cpu() for n, grad in zip(names, gradients, strict=True)},
            {
                name: average([figure[name] for figure in figures if name in figure])
                for name in {name: None for figure in figures for name in figure}
            },
            new.detach().cpu(),
        )

    def suspect(self, run: Trace, step: Step) -> str:
        """Describe the gradient of ``step`` if a known mistake explains it."""
        if step not in self._suspects:
            right = self.step(run, step).gradient
            # Single precision is enough to identify a mistake, and twice as fast.
            self._model.float()
            self._suspects[step] = self._suspect(run, step, right)
            self._model.double()
        return self._suspects[step]

    def _suspect(self, run: Trace, step: Step, right: Tensors) -> str:
        times = scale(step.gradient, right)
        if times is not None and abs(times - 1) <= GRADIENT_TOLERANCE:
            return "; the gradient is the right one"
        for what, how in alternatives(run):
            # A plain factor is reported as such, unless another σ (ddof = 0) explains it.
            if times and how.ddof != 0:
                break
            if distance(step.gradient, self.step(run, step, how).gradient) <= GRADIENT_TOLERANCE:
                return f"; it is the gradient of {what}"
        return "" if times is None else f"; it is {times:.4g} times the right one"

    def suspect_advantages(self, run: Trace, batch: Batch, seen: Mapping[int, float]) -> str:
        """Describe the advantages ``seen``, by place, if a known mistake explains them."""
        for what, how in alternatives(run):
            others = self.advantages(batch.rewards, run.recipe.num_generations, how).tolist()
            # Equal rows may have exchanged their places.
            rows = list(zip(batch.prompt_ids, batch.completion_ids, strict=True))
            one = sorted((rows[i], a) for i, a in seen.items())
            two = sorted((rows[i], others[i]) for i in seen)
            pairs = zip(one, two, strict=True)
            if all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5) for (_, a), (_, b) in pairs):
                return f"; they are {what}"
        return ""

    def _set(self, weights: Tensors) -> None:
        with torch.no_grad():
            for name, p in self._model.named_parameters():
                p.copy_(weights[name])

    def _read(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (completions, tokens, vocabulary), tokens and mask of the completions.

        Rows are padded on the right. No token of a causal model sees what follows it, so there is
        nothing to mask and no position to shift.
        """
        pad = torch.nn.utils.rnn.pad_sequence
        rows = zip(batch.prompt_ids, batch.completion_ids, strict=True)
        lines = pad([torch.tensor(prompt + completion) for prompt, completion in rows], True)
        every = self._model(lines.to(self.device)).logits
        sliced = [
            every[i, len(prompt) - 1 : len(prompt) + len(completion) - 1]
            for i, (prompt, completion) in enumerate(
                zip(batch.prompt_ids, batch.completion_ids, strict=True)
            )
        ]
        tokens = pad([torch.tensor(ids) for ids in batch.completion_ids], True)
        mask = pad([torch.ones(len(ids)) for ids in batch.completion_ids], True)
        return pad(sliced, True), tokens.to(self.device), mask.to(self.device)

    def _mask(self, batch: Batch, how: Conventions) -> Tensor:
        kept = [
            0 if how.mask_truncated and self.truncated(ids) else len(ids)
            for ids in batch.completion_ids
        ]
        longest = max(len(ids) for ids in batch.completion_ids)
        return (torch.arange(longest) < torch.tensor(kept)[:, None]).long()


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of most likely tokens that reaches ``top_p``; at least one."""
    ordered, tokens = probabilities.sort(-1, descending=True)
    likelier = ordered.cumsum(-1) - ordered
    kept = torch.where(likelier < top_p, ordered, 0.0)
    # Normalised: a draw depends only on the ratios of probabilities to random numbers.
    return torch.zeros_like(kept).scatter(-1, tokens, kept / kept.sum(-1, keepdim=True))


def _figures(
    entropies: Tensor, divergence: Tensor, low: Tensor, high: Tensor, mask: Tensor
) -> dict[str, float]:
    """Return what TRL logs for a micro-batch: means over tokens, extremes over completions.

    A completion that is masked completely has no share of clipped tokens.
    """
    of_tokens = {
        "entropy": entropies,
        "kl": divergence,
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low | high,
    }
    tokens = mask.sum(1)
    figures = {
        name: float((values * mask).sum() / tokens.sum().clamp(min=1))
        for name, values in of_tokens.items()
    }
    if tokens.any():
        shares = [((x * mask).sum(1) / tokens)[tokens > 0] for x in (low, high)]
        figures["clip_ratio/low_min"] = float(shares[0].min())
        figures["clip_ratio/high_max"] = float(shares[1].max())
    return figures


def rows_of(step: Step) -> list[list[int]]:
    """Return, for each micro-batch, the places of those of its rows that the batch has."""
    pairs = zip(step.batch.prompt_ids, step.batch.completion_ids, strict=True)
    free: dict[object, list[int]] = {}
    for place, pair in enumerate(pairs):
        free.setdefault(pair, []).append(place)
    return [
        [free[row].pop(0) for row in micro_batch.rows if free.get(row)]
        for micro_batch in step.micro_batches
    ]
