"""What test_processes.py runs in processes of its own: ``python several.py WHAT ARGUMENTS``."""

import hashlib
import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

from safetensors.torch import save_file

from grpo_harness.contract import watch
from grpo_harness.errors import HarnessError
from grpo_harness.training import load, train
from grpo_harness.training.processes import launch
from grpo_harness.training.trainer import Trainer, Watch

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("trainers.py"))))


def scattered(prompts, completions, **kwargs):
    """Reward a completion by its digest, so that every group has something to learn."""
    return [hashlib.sha256(text.encode()).digest()[0] / 64 for text in completions]


def one_step(argument):
    """Make one step on the completions in ``given``, or draw them and write them there."""
    policy, folder, given, parts = argument
    rank = os.environ.get("RANK", "0")
    recorded = json.loads(Path(given).read_text()) if Path(given).exists() else None
    drawn = []
    draw = Trainer._generate_single_turn

    def replay(self, prompt_ids, *arguments):
        drawn.extend(prompt_ids)
        if recorded is not None:
            return [recorded[json.dumps(ids)].pop(0) for ids in prompt_ids], None
        completion_ids, _ = result = draw(self, prompt_ids, *arguments)
        by_prompt = {}
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
            by_prompt.setdefault(json.dumps(prompt), []).append(completion)
        Path(given).write_text(json.dumps(by_prompt))
        return result

    def gradients(self, args, state, control, model, **kwargs):
        save_file({n: p.grad for n, p in model.named_parameters()}, f"{folder}/{rank}.safetensors")

    Trainer._generate_single_turn = replay
    Watch.on_pre_optimizer_step = gradients
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    recipe = load("smoke").with_values(
        model_name_or_path=policy,
        max_steps=1,
        per_device_train_batch_size=16 // processes // int(parts),
        num_generations=4,
        gradient_accumulation_steps=int(parts),
        max_completion_length=24,
    )
    train(recipe, Path(folder) / "trained", device="cpu", reward=scattered)
    Path(folder, f"{rank}.json").write_text(json.dumps(drawn))


def fail_in_the_second(_):
    """Fail in one process while the other waits for it."""
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        raise HarnessError("the second one has run out of luck")
    torch.distributed.barrier()


def watched(argument):
    """Watch the trainers of a list, one after the other; write what each process says of them."""
    folder, listed = argument
    rank, said = os.environ["RANK"], {}
    for name, (trainer, settings) in json.loads(Path(listed).read_text()).items():
        kind = getattr(made, trainer)
        run = watch(made.build(Path(folder, name), kind, **settings))
        try:
            run.holds()
            said[name] = [None, run.not_looked_at]
        except AssertionError as broken:
            said[name] = [str(broken), run.not_looked_at]
    Path(folder, f"{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    what, processes, *rest = sys.argv[1:]
    work = {"one_step": one_step, "fail": fail_in_the_second, "watched": watched}[what]
    if processes == "1":
        work(rest)
    else:
        launch(work, rest, int(processes))
