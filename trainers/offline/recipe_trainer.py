"""What every stage's trainer does the recipe's way, whichever of Hugging Face's and TRL's it is."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR

from ..schedule import learning_rate
from .optimizers import optimizer_of
from .peft_state import load_state, needs_more, save_state
from .stage import TrainJob


class FollowsRecipe:
    """Put before one of their trainers: `type("SftTrainer", (FollowsRecipe, SFTTrainer), {})`."""

    job: TrainJob

    def create_optimizer(self: Any, model: Any = None) -> Any:
        """The parametrisation's own optimizer, where it has one."""
        if self.optimizer is None:
            self.optimizer = optimizer_of(self.job, model or self.model)
        return super().create_optimizer(model)  # type: ignore[misc]

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The schedule all stages share; it is a function of the step, so nothing of it needs saving."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self._factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _factor(self, step: int) -> float:
        stage, steps = self.job.stage, self.job.steps
        return learning_rate(stage, min(step, steps - 1), steps) / stage.learning_rate

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        if needs_more(self.job) and self.is_world_process_zero():
            save_state(self.model, Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        if needs_more(self.job):
            load_state(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _send_telemetry(self) -> None:
        """TRL would report model and machine to its makers; a run tells nobody."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """A checkpoint needs no README."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        """The rows are tokens already."""
        return dataset


def pad_token(tokenizer: Any) -> int:
    """What fills short rows up; masks leave it out."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
