"""Trainers as a team would build them, by TRL's documentation, on the embedded policy."""

from pathlib import Path

import torch
import trl
from accelerate.utils import broadcast_object_list, set_seed
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from grpo_harness.policy import PolicyName, find

BASE = find(PolicyName("nano-base")).path

SUMS = [(a, b) for a in (2, 3, 14, 205) for b in (4, 5, 6, 7, 8, 9, 31, 52, 123)]
"""Their prompts are of several lengths."""


def reward_digits(completions, **kwargs):
    """The share of digits: what a random text earns now and then."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(map(str.isdigit, text)) / (len(text) + 1) for text in texts]


def reward_answer(completions, answer, **kwargs):
    """Whether its length is odd where the data set's own answer is: earned half of the time."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(len(text) % 2 == int(a) % 2) for text, a in zip(texts, answer, strict=True)]


def reward_length(completion_ids, **kwargs):
    """Shorter is better, and None where it does not apply."""
    return [None if len(ids) % 3 == 0 else -len(ids) / 10 for ids in completion_ids]


def reward_of_twenty(completions, **kwargs):
    """Large: without division by σ, so are the advantages."""
    return [20 * reward for reward in reward_digits(completions)]


async def reward_later(completions, **kwargs):
    return reward_digits(completions)


def reward_in_place(completions, **kwargs):
    """A function that works on the list that it is given."""
    rewards = reward_digits(completions)
    completions[:] = ["read"] * len(completions)
    return rewards


def reward_short(completions, **kwargs):
    return [1 / (1 + len(text)) for text in completions]


reward_short.__name__ = reward_digits.__name__


class OwnTrainer(GRPOTrainer):
    """A subclass that changes nothing that GRPO computes."""

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self.last_loss = float(loss.detach())
        return loss


class Adapted(GRPOTrainer):
    """Goes on with an adapter that has been trained, whose copy is the reference."""

    def __init__(self, model, **arguments):
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"])
        model = get_peft_model(model, config)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
        super().__init__(model=model, **arguments)


class PaddedByTheEnd(GRPOTrainer):
    """Its pad token is its end token, as in many models."""

    def __init__(self, processing_class, **arguments):
        processing_class.pad_token = processing_class.eos_token
        super().__init__(processing_class=processing_class, **arguments)


class PaddedByAnAnswer(GRPOTrainer):
    """Its pad token is a digit, which the policy draws: also as the last token that it may."""

    def __init__(self, processing_class, **arguments):
        processing_class.pad_token = "1"
        super().__init__(processing_class=processing_class, **arguments)


class Streamed(GRPOTrainer):
    def __init__(self, train_dataset, **arguments):
        super().__init__(train_dataset=train_dataset.to_iterable_dataset(), **arguments)


class Evaluated(GRPOTrainer):
    def __init__(self, train_dataset, **arguments):
        few = train_dataset.select(range(4))
        super().__init__(train_dataset=train_dataset, eval_dataset=few, **arguments)


class OnePrompt(GRPOTrainer):
    """Its data set is one prompt, again and again: equal completions are of several groups."""

    def __init__(self, train_dataset, **arguments):
        again = train_dataset.select([0] * 36)
        super().__init__(train_dataset=again, **arguments)


class OwnLogps(GRPOTrainer):
    """Takes log-probabilities of the model's logits by itself."""

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, **arguments
    ):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        values = torch.log_softmax(logits[:, -logits_to_keep:] / self.temperature, -1)
        own = values.gather(-1, input_ids[:, -logits_to_keep:, None])[..., 0]
        return own, -(values.exp() * values).sum(-1), None


class Stopped(GRPOTrainer):
    """A callback ends the run after two steps."""

    def __init__(self, **arguments):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == 2

        super().__init__(callbacks=[Stop()], **arguments)


class OfTokens(GRPOTrainer):
    """Its advantages have the shape of the tokens."""

    def _generate_and_score_completions(self, inputs):
        drawn = super()._generate_and_score_completions(inputs)
        every = drawn["advantages"][:, None].expand(drawn["completion_ids"].shape)
        return drawn | {"advantages": every}


class OfLaterTokens(OfTokens):
    """Later tokens have less advantage."""

    def _generate_and_score_completions(self, inputs):
        drawn = super()._generate_and_score_completions(inputs)
        less = torch.linspace(1, 0, drawn["advantages"].shape[1])
        return drawn | {"advantages": drawn["advantages"] * less}


class Counter:
    """An environment with one tool, which says more than the data set's prompt does."""

    def reset(self, **kwargs):
        self.count = 0
        return "Count to one."

    def count_on(self) -> int:
        """Count on."""
        self.count += 1
        return self.count

    def get_reward(self):
        return float(self.count)


class InAnEnvironment(GRPOTrainer):
    def __init__(self, processing_class, **arguments):
        templates = Path(trl.__file__).parent / "chat_templates"
        processing_class.chat_template = (templates / "qwen3.jinja").read_text("utf-8")
        arguments |= {"processing_class": processing_class, "environment_factory": Counter}
        super().__init__(**arguments)


class Rolled(GRPOTrainer):
    """Its completions come from a function."""

    def __init__(self, **arguments):
        def rollout(prompts, trainer):
            asked = trainer.processing_class(text=prompts)["input_ids"]
            end = trainer.processing_class.eos_token_id
            texts = trainer.processing_class(text=["7", "no"])["input_ids"]
            drawn = [[*texts[n % 2], end] for n, _ in enumerate(prompts)]
            return {"prompt_ids": asked, "completion_ids": drawn, "logprobs": None}

        super().__init__(rollout_func=rollout, **arguments)


class OwnOptimizer(GRPOTrainer):
    def __init__(self, model, **arguments):
        sgd = torch.optim.SGD(model.parameters(), 1e-3)
        super().__init__(model=model, optimizers=(sgd, None), **arguments)


class Judged(GRPOTrainer):
    """Scored by a reward model."""

    def __init__(self, reward_funcs, **arguments):
        judge = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1)
        super().__init__(reward_funcs=[judge], **arguments)


class LengthTerm(GRPOTrainer):
    """A subclass whose loss is not GRPO's."""

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        return loss * (1 + 0.01 * inputs["completion_mask"].shape[1])


class OfItsOwnBatch(GRPOTrainer):
    """Of several processes: each divides by the σ of its own rewards."""

    def _calculate_rewards(self, inputs, *arguments):
        rewards = super()._calculate_rewards(inputs, *arguments)
        self.all, first = rewards.sum(1), self.accelerator.process_index * len(inputs)
        self.own = self.all[first : first + len(inputs)]
        return rewards

    def _generate_and_score_completions(self, inputs):
        drawn = super()._generate_and_score_completions(inputs)
        drawn["advantages"] *= (self.all.std() + 1e-4) / (self.own.std() + 1e-4)
        return drawn


class OfItsOwnTokens(GRPOTrainer):
    """Each process divides by the tokens of its own completions."""

    def _compute_loss(self, model, inputs):
        tokens = inputs["completion_mask"].sum() * self.accelerator.num_processes
        return super()._compute_loss(model, inputs | {"num_items_in_batch": tokens})


class OfItsOwnFigures(GRPOTrainer):
    """Each process logs the mean reward of its own completions."""

    def _generate_and_score_completions(self, inputs):
        drawn = super()._generate_and_score_completions(inputs)
        rewards = next(iter(self._logs["rewards"].values()))
        self._metrics["train"]["reward"] = [sum(list(rewards)[: len(inputs)]) / len(inputs)]
        return drawn


class SamePrompts(GRPOTrainer):
    """Every process asks what the first one asks."""

    def _generate_and_score_completions(self, inputs):
        return super()._generate_and_score_completions(broadcast_object_list([inputs])[0])


class SameSeed(GRPOTrainer):
    """Every process draws with the same random numbers."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        set_seed(self.args.seed)


class NotAveraged(GRPOTrainer):
    """Every process trains with its own gradients."""

    def training_step(self, model, *arguments):
        with model.no_sync():
            return super().training_step(model, *arguments)


def prompts(conversations):
    texts = [f"{a} + {b} =" for a, b in SUMS]
    if not conversations:
        return texts
    return [[{"role": "user", "content": text}] for text in texts]


def build(
    folder,
    trainer=GRPOTrainer,
    rewards=reward_digits,
    conversations=False,
    peft=None,
    second_end=False,
    **config,
):
    """A trainer as in TRL's documentation: a model, rewards, arguments and a data set."""
    arguments = {
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 16,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    rows = {"prompt": prompts(conversations), "answer": [str(a + b) for a, b in SUMS]}
    model = AutoModelForCausalLM.from_pretrained(BASE)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    if second_end:  # a digit, which the policy writes often
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("1")]
        model.generation_config.eos_token_id = ends
    return trainer(
        model=model,
        reward_funcs=rewards,
        args=GRPOConfig(output_dir=str(folder), **{**arguments, **config}),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        peft_config=peft,
    )
