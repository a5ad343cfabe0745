"""What the contract has no formula for among a trainer's settings.

An invariant that such a setting touches is left out, by name: it neither passes nor fails.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import nn

from grpo_harness.contract.adam import SCHEDULES
from grpo_harness.contract.trace import Trace
from grpo_harness.grpo import LossType
from grpo_harness.rewards.functions import reward_name
from grpo_harness.text import escape

_LOSS = ("loss_equals_the_oracles", "gradient_equals_the_oracles")
_FIGURES = (*_LOSS, "figures_of_the_policy_are_the_oracles", "on_policy_the_ratio_is_one")
_FORWARD = (*_FIGURES, "log_probabilities_are_the_policys", "rollouts_are_the_current_policys")
_UPDATE = ("every_update_is_adamws",)
_SCHEDULE = (*_UPDATE, "rates_logged_are_the_schedules")
_TEXT = (
    *("prompts_are_the_templates", "what_is_drawn_is_scored_and_trained_on"),
    *("rewards_are_the_completions", "counts_are_those_of_the_completions"),
    *("the_mask_is_the_completions", *_FORWARD),
)
_REWARDS = ("rewards_are_the_completions", "advantages_are_group_relative", *_FIGURES)

Setting = tuple[str, Callable[[Any], Any], tuple[str, ...]]


def _of(name: str, usual: Any = False) -> Callable[[Any], bool]:
    """Tell whether a field of the config has another value than the one with formulas."""
    return lambda trainer: getattr(trainer.args, name, usual) != usual


SETTINGS: tuple[Setting, ...] = (
    ("rollouts by vLLM", _of("use_vllm"), ("rollouts_are_the_current_policys",)),
    (
        "vLLM importance sampling",
        lambda t: t.args.use_vllm and t.args.vllm_importance_sampling_correction,
        _FIGURES,
    ),
    (
        "continuous batching",
        _of("use_transformers_continuous_batching"),
        ("rollouts_are_the_current_policys",),
    ),
    ("a rollout function", lambda t: getattr(t, "rollout_func", None), _TEXT),
    ("tools", lambda t: getattr(t, "tools", None), _TEXT),
    (
        "environments",
        lambda t: getattr(t, "environment_factories", None),
        # An environment may add to the prompt.
        (*_TEXT, *_REWARDS, "every_problem_has_its_turn"),
    ),
    ("images", lambda t: getattr(t, "_is_vlm", False), _TEXT),
    (
        "a response template",
        lambda t: any(
            getattr(t.processing_class, name, None)
            for name in ("response_template", "response_schema")
        ),
        ("what_is_drawn_is_scored_and_trained_on", "rewards_are_the_completions"),
    ),
    (
        "reward models",
        lambda t: any(isinstance(reward, nn.Module) for reward in t.reward_funcs),
        (*_REWARDS, *_TEXT[:2], "every_problem_has_its_turn"),
    ),
    (
        "a data set that is streamed",
        lambda t: not hasattr(t.train_dataset, "__len__"),
        ("every_problem_has_its_turn", "prompts_are_the_templates"),
    ),
    ("repetition_penalty", _of("repetition_penalty", 1.0), ("rollouts_are_the_current_policys",)),
    (
        "generation_kwargs",
        _of("generation_kwargs", None),
        ("rollouts_are_the_current_policys", "counts_are_those_of_the_completions"),
    ),
    ("half precision", lambda t: _half(t), (*_FORWARD, "gradients_are_clipped_as_asked", *_UPDATE)),
    ("dropout", lambda t: _dropout(t.model), _FORWARD),
    ("neftune_noise_alpha", _of("neftune_noise_alpha", None), _FORWARD),
    ("loss_type {args.loss_type}", lambda t: t.args.loss_type not in get_args(LossType), _FIGURES),
    (
        "importance_sampling_level {args.importance_sampling_level}",
        _of("importance_sampling_level", "token"),
        _FIGURES,
    ),
    (
        "multi_objective_aggregation {args.multi_objective_aggregation}",
        _of("multi_objective_aggregation", "sum_then_normalize"),
        ("advantages_are_group_relative", *_FIGURES),
    ),
    ("top_entropy_quantile", _of("top_entropy_quantile", 1.0), _LOSS),
    ("entropy_coef", _of("entropy_coef", 0.0), _LOSS),
    ("use_adaptive_entropy", _of("use_adaptive_entropy"), _LOSS),
    ("off_policy_mask_threshold", _of("off_policy_mask_threshold", None), _LOSS),
    ("the router's loss", lambda t: getattr(t, "aux_loss_enabled", False), _LOSS),
    ("sync_ref_model", _of("sync_ref_model"), _FIGURES),
    (
        "generation batches that do not divide into whole steps",
        lambda t: t.args.steps_per_generation % t.args.gradient_accumulation_steps,
        (
            *("rows_are_complete_and_finite", "advantages_are_group_relative", *_TEXT),
            "every_problem_has_its_turn",
        ),
    ),
    (
        "completions that several steps use",
        lambda t: (
            t.args.num_iterations * t.args.steps_per_generation > t.args.gradient_accumulation_steps
        ),
        ("on_policy_the_ratio_is_one",),
    ),
    (
        "an optimizer or a schedule of your own",
        lambda t: t.optimizer is not None or t.lr_scheduler is not None,
        _SCHEDULE,
    ),
    (
        "optimizer {args.optim.value}",
        lambda t: t.args.optim not in {"adamw_torch", "adamw_torch_fused"} or t.args.optim_args,
        _UPDATE,
    ),
    (
        "schedule {args.lr_scheduler_type.value}",
        lambda t: t.args.lr_scheduler_type not in SCHEDULES or t.args.lr_scheduler_kwargs,
        _SCHEDULE,
    ),
    ("logging_nan_inf_filter", _of("logging_nan_inf_filter"), ("a_nan_is_seen",)),
    (
        "load_best_model_at_end",
        _of("load_best_model_at_end"),
        ("only_updates_move_the_weights", "what_is_saved_is_what_was_trained"),
    ),
)
"""Settings without a formula: a name, when a trainer has it, and the invariants that it touches."""


def exclusions(trainer: Any) -> Mapping[str, str]:
    """Return the invariants that are left out for ``trainer``, and the settings that are why."""
    left_out: dict[str, list[str]] = {}
    for what, applies, names in SETTINGS:
        if applies(trainer):
            for name in dict.fromkeys(names):
                left_out.setdefault(name, []).append(what.format(args=trainer.args))
    return {name: ", ".join(why) for name, why in left_out.items()}


def unvaried(run: Trace) -> Mapping[str, str]:
    """Return what a run cannot tell because rewards are the same within each of its groups.

    Where all are, every advantage is 0, however it is computed. Where those of one function are,
    the advantages are the same with any weight of it.
    """
    batches = list(dict.fromkeys(step.batch for step in run.steps))
    g = int(run.config.num_generations)
    same = "rewards that are the same within every group"
    if not any(_varies(batch.rewards, g) for batch in batches):
        return {"advantages_are_group_relative": f"{same}: start from a policy that earns others"}
    flat = [
        reward_name(reward)
        for place, reward in enumerate(run.rewards)
        if (scored := [b.scored[place].rewards for b in batches if place in b.scored])
        and not any(_varies(rewards, g) for rewards in scored)
    ]
    return {"reward_weights": f"{same}: {', '.join(map(escape, flat))}"} if flat else {}


def _varies(rewards: Sequence[float | None], g: int) -> bool:
    """Tell whether some group of ``g`` completions has two rewards."""
    groups = (rewards[i : i + g] for i in range(0, len(rewards), g))
    return any(len(set(group) - {None}) > 1 for group in groups)


def _half(trainer: Any) -> bool:
    wide = (torch.float32, torch.float64)
    narrow = any(p.dtype not in wide for p in trainer.model.parameters())
    return bool(trainer.args.bf16 or trainer.args.fp16 or narrow)


def _dropout(model: nn.Module) -> bool:
    def rate(module: nn.Module) -> Any:
        modular = isinstance(module, nn.modules.dropout._DropoutNd)
        return module.p if modular else getattr(module, "attention_dropout", 0.0)

    rates = [rate(module) for module in model.modules()]
    return any(isinstance(value, float) and value > 0 for value in rates)
