"""Stages as a training worker runs them, without Ray: rows proven, the trainer made, its outcome written."""

from pathlib import Path
from typing import Any

from raylign.trainers.data.proof import prove_stage
from raylign.trainers.data.template import load_tokenizer
from raylign.trainers.offline.stage import OfflineStage, TrainJob, row_order, rows_table
from raylign.trainers.offline.worker import _in_order, _model

STEPS = 4


def question(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{n}+1"}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def rows(kind: str, count: int = 32) -> list[dict[str, Any]]:
    """Rows that a few steps can learn, as the data readers give them."""
    match kind:
        case "text":
            return [{"text": f"{n}+1={n + 1}"} for n in range(count)]
        case "messages":
            return [{"messages": question(n) + said("11" + "1" * (n % 3))} for n in range(count)]
        case "preference":
            return [
                {"prompt": question(n), "chosen": said("11"), "rejected": said("99" * (1 + n % 2))}
                for n in range(count)
            ]
        case "unpaired":
            return [
                {"prompt": question(n), "completion": said("19"[n % 2] * 3), "label": n % 2 == 0} for n in range(count)
            ]
        case _:
            steps = ["first 1", "then 9"]
            return [{"prompt": question(n), "completions": steps, "labels": [True, False]} for n in range(count)]


def job(stage: OfflineStage, base: Path, root: Path, **options: Any) -> TrainJob:
    given = {"adapter": None, "init_random": False, "seed": 5, "steps": stage.steps or STEPS} | options
    places = {"run_dir": root, "checkpoints": root / "checkpoints", "model_out": root / "model"}
    return TrainJob(stage=stage, name=stage.type, base=base, **given, **places)


def trainer_of(job: TrainJob, data: list[dict[str, Any]], scratch: Path) -> Any:
    """The trainer that a worker makes, before its first step."""
    from raylign.trainers.offline.hf_trainer import make_trainer

    table = rows_table(prove_stage(job.stage, data, load_tokenizer(job.base)).require())
    order = row_order(job.seed, table.num_rows, job.stage.batch_size, job.steps)
    return make_trainer(job, _model(job), _in_order(table, order), scratch)


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]
