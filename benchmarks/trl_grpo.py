"""One run of TRL's GRPOTrainer on the quickstart's task: `python -m benchmarks.trl_grpo SPEC`; see `grpo.py`."""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from trl import GRPOTrainer

from .models import load_model
from .trl_peer import config_of

_FORM = re.compile("[0-9+=;]*=[0-9]+")
_PHASES = {"_generate_single_turn": "generate", "_calculate_rewards": "score"}


class Timed(GRPOTrainer):
    """Notes how long generation and rewards of a step take; `rates` are the learning rates of its steps."""

    def __init__(self, *given: Any, rates: list[float], **options: Any) -> None:
        super().__init__(*given, **options)
        self.took: dict[str, float] = {}
        self._rates = rates
        for method, phase in _PHASES.items():
            setattr(self, method, self._noted(getattr(self, method), phase))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The rates that were given."""
        if self.lr_scheduler is None:
            given, peak = self._rates, self.args.learning_rate
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer, lambda step: given[min(step, len(given) - 1)] / peak
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _noted(self, call: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def noted(*given: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = call(*given, **options)
            self.took[phase] = self.took.get(phase, 0.0) + time.perf_counter() - began
            return result

        return noted


class Lines(TrainerCallback):
    """Writes a line at the end of each step; what is neither generation nor reward is the update."""

    def __init__(self, out: Path) -> None:
        self._out, self.trainer = out, None
        self._began, self._ended = 0.0, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._ended = time.time()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        reward = logs.get("rewards/exact_match/mean")
        if reward is None:
            return
        took = {name: round(value, 5) for name, value in self.trainer.took.items()}
        took["update"] = self._ended - self._began - sum(took.values())
        self.trainer.took.clear()
        line = {"seconds": self._ended, "reward": reward, **{f"seconds/{name}": value for name, value in took.items()}}
        with self._out.open("a") as file:
            file.write(json.dumps(line) + "\n")


def main(spec: dict[str, Any]) -> None:
    """Train as the spec says."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoTokenizer

    sys.path.insert(0, spec["sums"])
    import sums  # pyright: ignore[reportMissingImports]

    def exact_match(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        pairs = zip(completions, answer, strict=True)
        return [sums.exact_match(completion[0]["content"], {"answer": right}) for completion, right in pairs]

    def well_formed(completions: list[Any], **_: Any) -> list[float]:
        return [float(bool(_FORM.fullmatch(completion[0]["content"]))) for completion in completions]

    rows = [json.loads(line) for line in Path(spec["prompts"]).read_text().splitlines()]
    data = {
        "prompt": [[{"role": "user", "content": row["prompt"]}] for row in rows],
        "answer": [row["answer"] for row in rows],
    }
    out = Path(spec["out"])
    lines = Lines(out)
    config = config_of(
        out.parent / "trl",
        per_device_train_batch_size=spec["batch"],
        num_generations=spec["group"],
        max_completion_length=spec["max_tokens"],
        learning_rate=spec["learning_rate"],
        adam_beta1=spec["betas"][0],
        adam_beta2=spec["betas"][1],
        max_steps=spec["steps"],
        reward_weights=[1.0, 0.1],
        scale_rewards="batch",
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=spec["seed"],
    )
    lines.trainer = Timed(
        model=PeftModel.from_pretrained(load_model(Path(spec["base"]), "fp32"), spec["adapter"], is_trainable=True),
        reward_funcs=[exact_match, well_formed],
        args=config,
        train_dataset=Dataset.from_dict(data),
        processing_class=AutoTokenizer.from_pretrained(spec["base"]),
        callbacks=[lines],
        rates=spec["rates"],
    )
    lines.trainer.train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
