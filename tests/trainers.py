"""Trainers as a team would build them, by TRL's documentation, on the embedded policy."""

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
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


class Streamed(GRPOTrainer):
    def __init__(self, train_dataset, **arguments):
        super().__init__(train_dataset=train_dataset.to_iterable_dataset(), **arguments)


class Evaluated(GRPOTrainer):
    def __init__(self, train_dataset, **arguments):
        few = train_dataset.select(range(4))
        super().__init__(train_dataset=train_dataset, eval_dataset=few, **arguments)


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
