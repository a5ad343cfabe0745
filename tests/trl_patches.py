"""Ways in which an upgrade could break GRPO, as patches to the installed TRL and what it stands on.

Each takes pytest's ``monkeypatch``. As a plugin (``-p trl_patches``) the module applies the one
that the environment names, so that a whole pytest run has it from the start.
"""

import inspect
import os
import random
import textwrap
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from trl.trainer import grpo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer

VARIABLE = "TRL_PATCH"


def rewrite(monkeypatch, method, old, new):
    """Replace a piece of a method's own source."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(GRPOTrainer, method))))
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {method}"
    # Outside its class a method must be told whose super() is meant.
    source = source.replace(old, new).replace("super()", "super(GRPOTrainer, self)")
    found = {}
    exec(source, vars(grpo_trainer), found)  # noqa: S102 - the installed library's own source
    monkeypatch.setattr(GRPOTrainer, method, found[method])


def wrap(monkeypatch, method, around, of=GRPOTrainer):
    """Put ``around(original, self, ...)`` in place of a method."""
    original = getattr(of, method)

    def patched(self, *args, **kwargs):
        return around(original, self, *args, **kwargs)

    monkeypatch.setattr(of, method, patched)


def ddof_0(monkeypatch):
    original = grpo_trainer.nanstd

    def population(tensor, dim=None, keepdim=False):
        n = tensor.numel() if dim is None else tensor.shape[dim]
        return original(tensor, dim=dim, keepdim=keepdim) * ((n - 1) / n) ** 0.5

    monkeypatch.setattr(grpo_trainer, "nanstd", population)


def ddof_0_behind_the_logs(monkeypatch):
    def around(original, self, inputs):
        output = original(self, inputs)
        g = self.num_generations
        return {**output, "advantages": output["advantages"] * (g / (g - 1)) ** 0.5}

    wrap(monkeypatch, "_generate_and_score_completions", around)


def temperature_ignored(monkeypatch):
    original = grpo_trainer.add_fused_lm_head

    def ignoring(model, **options):
        return original(model, **{**options, "temperature": 1.0})

    monkeypatch.setattr(grpo_trainer, "add_fused_lm_head", ignoring)


def epsilon_0(monkeypatch):
    rewrite(
        monkeypatch,
        "_compute_loss",
        "torch.clamp(coef_1, 1 - self.epsilon_low, 1 + self.epsilon_high)",
        "torch.clamp(coef_1, 1, 1)",
    )


def epsilon_0_in_the_trainer(monkeypatch):
    def around(original, self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.epsilon_low = self.epsilon_high = 0.0

    wrap(monkeypatch, "__init__", around)


def bnpo_for_dapo(monkeypatch):
    rewrite(monkeypatch, "_compute_loss", 'elif self.loss_type == "bnpo":', "elif True:")


def k1_for_k3(monkeypatch):
    rewrite(
        monkeypatch,
        "_compute_loss",
        "torch.exp(ref_per_token_logps - per_token_logps) - "
        "(ref_per_token_logps - per_token_logps) - 1",
        "per_token_logps - ref_per_token_logps",
    )


def halved_under_accumulation(monkeypatch):
    def around(original, self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss / 2 if self.args.gradient_accumulation_steps > 1 else loss

    wrap(monkeypatch, "_compute_loss", around)


def rewards_broadcast(monkeypatch):
    def around(original, self, *args, **kwargs):
        rewards = original(self, *args, **kwargs)
        return rewards[:1].expand_as(rewards).clone()

    wrap(monkeypatch, "_calculate_rewards", around)


def first_completion_scored_for_all(monkeypatch):
    def around(original, self, inputs, prompts, completions, ids):
        n = len(prompts)
        return original(self, inputs, prompts, completions[:1] * n, ids[:1] * n)

    wrap(monkeypatch, "_calculate_rewards", around)


def rollouts_from_the_base(monkeypatch):
    base = {}

    def around(original, self, *args, **kwargs):
        now = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        base.setdefault(id(self), now)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(base[id(self)][name])
            drawn = original(self, *args, **kwargs)
            for name, p in self.model.named_parameters():
                p.copy_(now[name])
        return drawn

    wrap(monkeypatch, "_generate_single_turn", around)


def rollouts_from_another_model(monkeypatch):
    from grpo_harness.engines.weights import load_weights
    from grpo_harness.policy import load

    other = load_weights(load("nano-base"), torch.device("cpu"), torch.float32)

    def around(original, self, *args, **kwargs):
        if self.state.global_step == 0:
            return original(self, *args, **kwargs)
        wrapped, self.model_wrapped = self.model_wrapped, other
        try:
            return original(self, *args, **kwargs)
        finally:
            self.model_wrapped = wrapped

    wrap(monkeypatch, "_generate_single_turn", around)


def nan_filter_forced(monkeypatch):
    def around(original, self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.args.logging_nan_inf_filter = True

    wrap(monkeypatch, "__init__", around)


def nan_to_num_on_the_loss(monkeypatch):
    def around(original, self, *args, **kwargs):
        return torch.nan_to_num(original(self, *args, **kwargs))

    wrap(monkeypatch, "_compute_loss", around)


def nan_filtered_out_of_the_step(monkeypatch):
    def around(original, self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        for p in self.model.parameters():
            torch.nan_to_num(p.grad, out=p.grad)
        return torch.nan_to_num(loss)

    wrap(monkeypatch, "training_step", around)


def advantages_of_the_wrong_group(monkeypatch):
    def around(original, self, inputs):
        output = original(self, inputs)
        return {**output, "advantages": output["advantages"].roll(self.num_generations)}

    wrap(monkeypatch, "_generate_and_score_completions", around)


def advantages_of_the_wrong_group_in_the_loss(monkeypatch):
    def score(original, self, inputs):
        output = original(self, inputs)
        return {**output, "rolled": output["advantages"].roll(self.num_generations)}

    def compute(original, self, model, inputs):
        return original(self, model, {**inputs, "advantages": inputs["rolled"]})

    wrap(monkeypatch, "_generate_and_score_completions", score)
    wrap(monkeypatch, "_compute_loss", compute)


def attention_mask_left_out(monkeypatch):
    def around(original, self, model, input_ids, attention_mask, *args, **kwargs):
        return original(self, model, input_ids, torch.ones_like(attention_mask), *args, **kwargs)

    wrap(monkeypatch, "_get_per_token_logps_and_entropies", around)


def epsilon_high_ignored(monkeypatch):
    rewrite(
        monkeypatch,
        "_compute_loss",
        "torch.clamp(coef_1, 1 - self.epsilon_low, 1 + self.epsilon_high)",
        "torch.clamp(coef_1, 1 - self.epsilon_low, 1 + self.epsilon_low)",
    )


def epsilon_low_hard_coded(monkeypatch):
    rewrite(
        monkeypatch,
        "_compute_loss",
        "torch.clamp(coef_1, 1 - self.epsilon_low, 1 + self.epsilon_high)",
        "torch.clamp(coef_1, 1 - 0.2, 1 + self.epsilon_high)",
    )


def delta_ignored(monkeypatch):
    rewrite(monkeypatch, "_compute_loss", "if self.args.delta is not None:", "if False:")


def kl_times_the_clipped_ratio(monkeypatch):
    rewrite(
        monkeypatch,
        "_compute_loss",
        "per_token_kl = per_token_kl * coef_1",
        "per_token_kl = per_token_kl * coef_1.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)",
    )


def low_min_is_the_maximum(monkeypatch):
    rewrite(monkeypatch, "_compute_loss", "nanmin(gathered_low_clip)", "nanmax(gathered_low_clip)")


def high_max_is_0(monkeypatch):
    rewrite(
        monkeypatch,
        "_compute_loss",
        "nanmax(gathered_high_clip)",
        "(0 * nanmax(gathered_high_clip))",
    )


def tokens_of_the_whole_window(monkeypatch):
    rewrite(
        monkeypatch,
        "_compute_loss",
        "normalizer * self.current_gradient_accumulation_steps / self.args.steps_per_generation",
        "normalizer",
    )


def dr_grpo_by_the_longest(monkeypatch):
    rewrite(
        monkeypatch,
        "_compute_loss",
        "(per_token_loss.size(0) * self.max_completion_length)",
        "per_token_loss.numel()",
    )


def longer(by):
    def patch(monkeypatch):
        def around(original, self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.generation_config.max_new_tokens += by

        wrap(monkeypatch, "__init__", around)

    return patch


a_token_more, a_token_less = longer(1), longer(-1)


def last_token_out_of_the_loss(monkeypatch):
    def around(original, self, model, inputs):
        mask = inputs["completion_mask"].clone()
        mask[torch.arange(len(mask)), mask.sum(1) - 1] = 0
        return original(self, model, {**inputs, "completion_mask": mask})

    wrap(monkeypatch, "_compute_loss", around)


def top_p_ignored(monkeypatch):
    def around(original, self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.generation_config.top_p = 1.0

    wrap(monkeypatch, "__init__", around)


def no_shuffle(monkeypatch):
    def around(original, self, *args, **kwargs):
        original(self, *args, **{**kwargs, "shuffle": False})

    wrap(monkeypatch, "__init__", around, grpo_trainer.RepeatSampler)


def same_prompts_each_step(monkeypatch):
    def around(original, self):
        every = list(original(self))
        one = self.batch_size * self.mini_repeat_count * self.repeat_count
        return iter(every[:one] * (len(every) // one))

    wrap(monkeypatch, "__iter__", around, grpo_trainer.RepeatSampler)


def seed_ignored(monkeypatch):
    def around(original, self, *args, **kwargs):
        if self.state.global_step == 0:
            torch.manual_seed(random.SystemRandom().randrange(2**31))
        return original(self, *args, **kwargs)

    wrap(monkeypatch, "_generate_single_turn", around)


def seed_constant(monkeypatch):
    def around(original, self, *args, **kwargs):
        torch.manual_seed(1)
        return original(self, *args, **kwargs)

    wrap(monkeypatch, "_generate_single_turn", around)


def seed_does_not_reach_the_sampler(monkeypatch):
    def around(original, self, *args, **kwargs):
        original(self, *args, **{**kwargs, "seed": 0})

    wrap(monkeypatch, "__init__", around, grpo_trainer.RepeatSampler)


def schedule(share):
    """Return a ``create_scheduler`` whose rate has that share of the full one in each step."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        def now(step):
            return share(step / num_training_steps)

        # Some releases of transformers hand the optimizer over, and some do not.
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, now)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    return create_scheduler


def lr_schedule_ignored(monkeypatch):
    monkeypatch.setattr(transformers.Trainer, "create_scheduler", schedule(lambda _: 1.0))


def lr_linear_always(monkeypatch):
    monkeypatch.setattr(transformers.Trainer, "create_scheduler", schedule(lambda x: 1 - x))


def logged_lr_wrong(monkeypatch):
    def around(original, self, logs, *args, **kwargs):
        if "learning_rate" in logs:
            logs["learning_rate"] *= 2
        return original(self, logs, *args, **kwargs)

    wrap(monkeypatch, "log", around)


def no_grad_clip(monkeypatch):
    def around(original, self, parameters, max_norm, norm_type=2):
        return original(self, parameters, float("inf"), norm_type)

    wrap(monkeypatch, "clip_grad_norm_", around, accelerate.Accelerator)


def adam_second_step_reset(monkeypatch):
    def around(original, self, *args, **kwargs):
        self.state.clear()
        return original(self, *args, **kwargs)

    wrap(monkeypatch, "step", around, torch.optim.AdamW)


def sgd_after_1(monkeypatch):
    def around(original, self, *args, **kwargs):
        for group in self.param_groups if self.state else ():
            group["betas"] = (0.0, 0.5)
        return original(self, *args, **kwargs)

    wrap(monkeypatch, "step", around, torch.optim.AdamW)


def skip_every_second_step(monkeypatch):
    def around(original, self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return original(self, *args, **kwargs) if self.calls % 2 else None

    wrap(monkeypatch, "step", around, torch.optim.AdamW)


def double_update(monkeypatch):
    def around(original, self, *args, **kwargs):
        again = bool(self.state)
        result = original(self, *args, **kwargs)
        return original(self, *args, **kwargs) if again else result

    wrap(monkeypatch, "step", around, torch.optim.AdamW)


def weight_decay_dropped(monkeypatch):
    def around(original, self, *args, **kwargs):
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        return original(self, *args, **kwargs)

    wrap(monkeypatch, "step", around, torch.optim.AdamW)


def weights_averaged_between_steps(monkeypatch):
    def around(original, self, *args, **kwargs):
        for p in self.model.parameters():
            p.data.mul_(0.9999)
        return original(self, *args, **kwargs)

    wrap(monkeypatch, "_maybe_log_save_evaluate", around, transformers.Trainer)


def resume_loses_optimizer(monkeypatch):
    monkeypatch.setattr(
        transformers.Trainer, "_load_optimizer_and_scheduler", lambda self, checkpoint: None
    )


def resume_loses_rng(monkeypatch):
    monkeypatch.setattr(transformers.Trainer, "_load_rng_state", lambda self, checkpoint: None)


def bf16_weights_saved(monkeypatch):
    def around(original, self, folder, *args, **kwargs):
        weights = kwargs.pop("state_dict", None) or self.state_dict()
        rounded = {name: values.bfloat16().float() for name, values in weights.items()}
        return original(self, folder, *args, **kwargs, state_dict=rounded)

    wrap(monkeypatch, "save_pretrained", around, transformers.PreTrainedModel)


def advantages_clamped(monkeypatch):
    def around(original, self, inputs):
        output = original(self, inputs)
        return {**output, "advantages": output["advantages"].clamp(-5, 5)}

    wrap(monkeypatch, "_generate_and_score_completions", around)


def mask_cut_after_32(monkeypatch):
    def around(original, self, inputs):
        output = original(self, inputs)
        output["completion_mask"][:, 32:] = 0
        return output

    wrap(monkeypatch, "_generate_and_score_completions", around)


def loss_cut_after_32(monkeypatch):
    def around(original, self, model, inputs):
        mask = inputs["completion_mask"].clone()
        mask[:, 32:] = 0
        return original(self, model, {**inputs, "completion_mask": mask})

    wrap(monkeypatch, "_compute_loss", around)


def second_end_ignored(monkeypatch):
    def around(original, self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.eos_token_ids = [self._tokenizer.eos_token_id]

    wrap(monkeypatch, "__init__", around)


def beginning_twice(monkeypatch):
    monkeypatch.setattr("grpo_harness.training.data._once_special", lambda tokenizer, text: text)


def template_not_saved(monkeypatch):
    def around(original, self, *args, **kwargs):
        template, self.chat_template = self.chat_template, None
        saved = original(self, *args, **kwargs)
        self.chat_template = template
        return saved

    wrap(monkeypatch, "save_pretrained", around, transformers.PreTrainedTokenizerBase)


def generation_config_not_saved(monkeypatch):
    def around(original, self, folder, *args, **kwargs):
        original(self, folder, *args, **kwargs)
        (Path(folder) / "generation_config.json").unlink(missing_ok=True)

    wrap(monkeypatch, "save_pretrained", around, transformers.PreTrainedModel)


def problems_not_listed(monkeypatch):
    from grpo_harness.training import run

    original = run.write_curves

    def around(rows, folder):
        original(rows, folder)
        (folder / "problems.txt").write_text("")

    monkeypatch.setattr(run, "write_curves", around)


def pytest_configure(config):
    globals()[os.environ[VARIABLE]](pytest.MonkeyPatch())
