"""What an observed step should have computed: `grpo_harness.grpo.formulas` on raw completions.

No TRL code is used. The model is a copy of the one that training started from, with the run's
weights before the step, in double precision, and completions have no left padding. If the run
differs, `Oracle.suspect` looks for the one convention (``conventions.py``) that explains it.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from grpo_harness.contract.conventions import Conventions, alternatives
from grpo_harness.contract.invariant import GRADIENT_TOLERANCE, average, distance, norm, scale
from grpo_harness.contract.trace import Batch, Step, Tensors, Tokens, Trace
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
    """Recomputes steps of runs that started from one model.

    ``base`` are the weights that it started from, and ``ends`` the end tokens. A completion's text
    and a prompt's tokens are the tokenizer's, with the ``template`` arguments of the chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        ends: Iterable[int],
        *,
        reference: Tensors | None = None,
        template: Mapping[str, Any] | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.base = copied(model)
        self.tokenizer, self.ends, self.policy = tokenizer, frozenset(ends), policy
        self.device = next(model.parameters()).device
        self._reference, self._template = reference, dict(template or {})
        self._model = model.double()
        self._computed: dict[Step, Computed] = {}
        self._suspects: dict[Step, str] = {}

    @classmethod
    def of_policy(cls, name: str, *, device: str = "auto") -> Self:
        """Return the oracle of runs that start from the policy of that name."""
        policy = load(name)
        model = load_weights(policy, device_of(device), torch.float32).requires_grad_(True)
        return cls(model, policy.tokenizer, policy.eos_token_ids, policy=policy)

    @classmethod
    def of_trainer(cls, trainer: Any) -> Self:
        """Return the oracle of a run of ``trainer``, which is about to train."""
        model = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model)).eval()
        for module in model.modules():
            # TRL puts a forward of its own over the model's.
            module.__dict__.pop("forward", None)
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        reference = getattr(trainer, "ref_model", None)
        return cls(
            model,
            tokenizer,
            end_tokens(model, tokenizer),
            reference=None if reference is None else copied(reference, every=True),
            template=trainer.args.chat_template_kwargs,
        )

    def truncated(self, completion: Sequence[int]) -> bool:
        """Tell whether a completion was cut off. As in TRL, drawn padding ends one too."""
        return completion[-1] not in {*self.ends, self.tokenizer.pad_token_id}

    def texts(self, completions: Sequence[Tokens]) -> list[str]:
        """Return completions as texts."""
        rows = list(map(list, completions))
        decoded: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return decoded

    def prompt_tokens(self, prompts: Sequence[Any]) -> list[Tokens]:
        """Return the tokens of prompts, as `prompt_tokens` does."""
        return prompt_tokens(self.tokenizer, prompts, self._template)

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
        self, weights: Tensors, batch: Batch, temperature: float, **limits: Any
    ) -> list[list[bool]]:
        """Draw each token again from the recorded random state, and tell which are the same.

        Sampling one token of each completion at a time uses the same random numbers whatever the
        probabilities are, so every token can be redrawn after the recorded ones before it.
        ``limits`` are ``top_k``, ``top_p`` and ``min_p``, as in transformers.
        """
        assert batch.random_state is not None
        generator = torch.Generator(self.device)
        generator.set_state(batch.random_state)
        self._set(weights)
        with torch.no_grad():
            logits, _, _ = self._read(batch)
        probabilities = _limited(torch.softmax(logits.float() / temperature, -1), **limits)
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

    def rounding(self, rewards: Sequence[float | None], g: int, how: Conventions) -> Tensor:
        """Return how far single precision may take the advantages of ``rewards`` from the right.

        It matters in a group whose rewards are nearly equal, since it is divided by their σ too.
        """
        numbers = [0.0 if reward is None else reward for reward in rewards]
        largest = torch.tensor(numbers).double().view(-1, g).abs().amax(1).repeat_interleave(g)
        unscaled = dataclasses.replace(how, scale="none")
        shown, divided = (self.advantages(rewards, g, one).double() for one in (unscaled, how))
        # Where an advantage is 0, σ may be too.
        factor = torch.where(shown != 0, divided / shown, 1 if how.scale == "none" else 1 / how.eps)
        return 2**-22 * largest * factor

    def uncancelled(self, run: Trace, step: Step) -> float:
        """Return the norm of a step's gradient if none of its parts cancelled another.

        Single precision is relative to it: completions that are all alike leave almost nothing, and
        so does the KL term of a policy that has hardly moved.
        """
        how = Conventions.of(run.config)
        return norm(self.step(run, step, how, absolute=True).gradient)

    def step(
        self, run: Trace, step: Step, how: Conventions | None = None, *, absolute: bool = False
    ) -> Computed:
        """Recompute ``step`` by the config's conventions, or by ``how``.

        With ``absolute`` every advantage is taken as positive, and larger by β.
        """
        if how is None:
            if step not in self._computed:
                self._computed[step] = self.step(run, step, Conventions.of(run.config))
            return self._computed[step]
        batch = step.batch
        old = reference = None
        with torch.no_grad():
            if step.number > batch.step + 1:
                drew = run.steps[batch.step].weights
                old, _ = self.log_probabilities(drew, batch, how.temperature)
            if how.beta:
                with self._as_reference() as weights:
                    reference, _ = self.log_probabilities(weights, batch, how.temperature)
        # Last, because the gradient is taken at the model's current weights.
        new, entropies = self.log_probabilities(step.weights, batch, how.temperature)
        old = new.detach() if old is None else old
        reference = new.detach() if reference is None else reference
        right = self.advantages(batch.rewards, run.config.num_generations, how).double()
        micro_batches = rows_of(step, right.tolist())
        given = self._given(run, step, how, right, micro_batches).to(new)
        given = given.abs() + how.beta if absolute else given
        mask = self._mask(batch, how).to(new.device)
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
                    max_completion_length=run.config.max_completion_length,
                )
            losses.append(loss if how.loss_type == "dapo" else loss / len(micro_batches))
        for first in range(0, len(micro_batches), run.processes):
            rows = [i for made in micro_batches[first : first + run.processes] for i in made]
            with torch.no_grad():
                rho = ratio(new[rows], old[rows])
                divergence = kl(new[rows], reference[rows], how.estimator)
                divergence = divergence * rho if how.kl_times_ratio else divergence
                low = (rho < 1 - how.epsilon) & (given[rows] < 0)[:, None]
                high = (rho > 1 + how.epsilon_high) & (given[rows] > 0)[:, None]
                figures.append(_figures(entropies[rows], divergence, low, high, mask[rows]))
        total = torch.stack(losses).sum()
        parameters = dict(self._model.named_parameters())
        names = list(step.weights)
        leaves = [parameters[name] for name in names]
        gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return Computed(
            float(total.detach()),
            {n: grad.float().cpu() for n, grad in zip(names, gradients, strict=True)},
            {
                name: average([figure[name] for figure in figures if name in figure])
                for name in {name: None for figure in figures for name in figure}
            },
            new.detach().cpu(),
        )

    def _given(
        self,
        run: Trace,
        step: Step,
        how: Conventions,
        right: Tensor,
        micro_batches: Sequence[Sequence[int]],
    ) -> Tensor:
        """Return the advantages, each as the loss was given it if rounding explains it."""
        given = right.clone()
        room = self.rounding(step.batch.rewards, run.config.num_generations, how)
        for rows, micro_batch in zip(micro_batches, step.micro_batches, strict=True):
            for place, seen in zip(rows, micro_batch.advantages.tolist(), strict=False):
                if abs(seen - float(right[place])) <= float(room[place]):
                    given[place] = seen
        return given

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
            others = self.advantages(batch.rewards, run.config.num_generations, how).tolist()
            # Equal rows may have exchanged their places.
            rows = list(zip(batch.prompt_ids, batch.completion_ids, strict=True))
            one = sorted((rows[i], a) for i, a in seen.items())
            two = sorted((rows[i], others[i]) for i in seen)
            pairs = zip(one, two, strict=True)
            if all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5) for (_, a), (_, b) in pairs):
                return f"; they are {what}"
        return ""

    def _set(self, weights: Tensors) -> None:
        parameters = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, values in weights.items():
                parameters[name].copy_(values)

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[Tensors]:
        """Make the model the reference policy; yield the weights to set in it."""
        adapters = getattr(self._model, "peft_config", None)
        if adapters is None:
            yield self.base if self._reference is None else self._reference
        elif "ref" in adapters:
            self._model.set_adapter("ref")
            yield {}
            self._model.set_adapter("default")
        else:
            with self._model.disable_adapter():
                yield {}

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


def _limited(
    probabilities: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float | None = None
) -> Tensor:
    """Keep the ``top_k`` most likely tokens, the least of them that reach ``top_p``, and so on.

    ``min_p`` is relative to the likeliest token. At least one token is kept.
    """
    ordered, tokens = probabilities.sort(-1, descending=True)
    if top_k:
        ordered[..., top_k:] = 0.0
    ordered = ordered / ordered.sum(-1, keepdim=True)
    likelier = ordered.cumsum(-1) - ordered
    kept = torch.where(likelier < top_p, ordered, 0.0)
    if min_p:
        kept = torch.where(ordered >= min_p * ordered[..., :1], kept, 0.0)
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


def rows_of(step: Step, advantages: Sequence[float] | None = None) -> list[list[int]]:
    """Return, for each micro-batch, the places of those of its rows that the batch has.

    Of equal rows, which a batch has if it asks a prompt twice, each takes the place of which the
    ``advantages`` of the batch are the nearest to its own.
    """
    pairs = zip(step.batch.prompt_ids, step.batch.completion_ids, strict=True)
    free: dict[object, list[int]] = {}
    for place, pair in enumerate(pairs):
        free.setdefault(pair, []).append(place)

    def take(row: object, seen: float) -> int:
        places = free[row]
        nearest = 0
        if advantages is not None:
            gaps = [abs(advantages[place] - seen) for place in places]
            nearest = gaps.index(min(gaps))
        return places.pop(nearest)

    return [
        [
            take(row, seen)
            for row, seen in zip(micro_batch.rows, micro_batch.advantages.tolist(), strict=False)
            if free.get(row)
        ]
        for micro_batch in step.micro_batches
    ]


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a completion: those of the model, and the tokenizer's."""
    declared = model.generation_config.eos_token_id
    ends = [] if declared is None else torch.tensor(declared).view(-1).tolist()
    return {*ends, tokenizer.eos_token_id}


def copied(model: Any, *, every: bool = False) -> Tensors:
    """Return a copy of the trainable weights, or of ``every`` weight."""
    return {
        name: p.detach().cpu().clone()
        for name, p in model.named_parameters()
        if p.requires_grad or every
    }


def prompt_tokens(
    tokenizer: Any, prompts: Sequence[Any], template: Mapping[str, Any] | None = None
) -> list[Tokens]:
    """Return the tokens of prompts: a text is taken as it is, and a conversation is rendered."""
    if all(isinstance(prompt, str) for prompt in prompts):
        rows = tokenizer(text=list(prompts))["input_ids"]
    else:
        how = {"tokenize": False, "add_generation_prompt": True, **(template or {})}
        texts = [tokenizer.apply_chat_template(prompt, **how) for prompt in prompts]
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [tuple(row) for row in rows]
