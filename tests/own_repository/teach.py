"""Teach a tiny policy to answer (policies/base): GRPO (train.yaml) starts from it."""

import random
from pathlib import Path

import torch
from our.data import training_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo_harness.nano

START = Path(grpo_harness.nano.__file__).parent / "base"
LAYERS = 2
FORMS = ("<answer>{}</answer>",) * 6 + ("{}", "The answer is {}.", "It is <answer>{}</answer>")


def teach(model, tokenizer, rows, steps, batch=32, learning_rate=2e-3):
    """Show the model true answers, six of nine in the form that is asked for."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = (
            learning_rate * min(1, (step + 1) / 10) * (1 - step / steps)
        )
        ids, labels = [], []
        for row in rng.choices(rows, k=batch):
            asked = tokenizer.apply_chat_template(
                row["prompt"], tokenize=False, add_generation_prompt=True
            )
            reply = rng.choice(FORMS).format(row["solution"]) + tokenizer.eos_token
            a, b = (
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, reply)
            )
            ids.append(torch.tensor(a + b))
            labels.append(torch.tensor([-100] * len(a) + b))
        pad = torch.nn.utils.rnn.pad_sequence
        logits = model(pad(ids, batch_first=True)).logits[:, :-1]
        wanted = pad(labels, batch_first=True, padding_value=-100)[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def main():
    """Write the policy: the first layers of nano-base, taught."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(START)
    few = {"num_hidden_layers": LAYERS, "layer_types": ["full_attention"] * LAYERS}
    model = AutoModelForCausalLM.from_pretrained(START, dtype=torch.float32, **few)
    teach(model, tokenizer, training_rows().to_list(), steps=120)
    model.save_pretrained("policies/base")
    tokenizer.save_pretrained("policies/base")


if __name__ == "__main__":
    main()
