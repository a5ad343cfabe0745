"""The team's trainer."""

from trl import GRPOTrainer


class Trainer(GRPOTrainer):
    """TRL's trainer, which also logs the share of different completions."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        ids = batch["completion_ids"].tolist()
        self._metrics["train"]["completions/different"].append(len(set(map(tuple, ids))) / len(ids))
        return batch
