"""Trainers as a team would build them, by TRL's documentation, on the embedded policy."""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from grpo_harness.policy import PolicyName, find

BASE = find(PolicyName("nano-base")).path

SUMS = [(a, b) for a in range(2, 8) for b in range(3, 9)]


def reward_digits(completions, **kwargs):
    """The share of digits: what a random text earns now and then."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(map(str.isdigit, text)) / (len(text) + 1) for text in texts]


def reward_answer(completions, answer, **kwargs):
    """Whether the data set's own answer is in the text."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(a in text) for text, a in zip(texts, answer, strict=True)]


def reward_length(completion_ids, **kwargs):
    """Shorter is better, and None where it does not apply."""
    return [None if len(ids) % 3 == 0 else -len(ids) / 10 for ids in completion_ids]


async def reward_later(completions, **kwargs):
    return reward_digits(completions)


class OwnTrainer(GRPOTrainer):
    """A subclass that changes nothing that GRPO computes."""

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self.last_loss = float(loss.detach())
        return loss


class LengthTerm(GRPOTrainer):
    """A subclass whose loss is not GRPO's."""

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        return loss * (1 + 0.01 * inputs["completion_mask"].shape[1])


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
    model=None,
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
    return trainer(
        model=AutoModelForCausalLM.from_pretrained(BASE),
        reward_funcs=rewards,
        args=GRPOConfig(output_dir=str(folder), **{**arguments, **config}),
        train_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(BASE),
        peft_config=peft,
    )
