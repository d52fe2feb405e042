"""GRPO of all weights: whole models are published, proved by every worker, and what is kept is what was published."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from raylign.cluster.rundir import RunDir
from raylign.cluster.weights import base_digest, tensors_digest
from raylign.trainers.adapters import export_weights, open_base
from raylign.trainers.data.inputs import read_inputs
from raylign.trainers.opening import open_run
from raylign.trainers.pipeline import finished, run_recipe
from raylign.trainers.recipe import load_recipe


@pytest.mark.slow
def test_a_run_that_trains_all_weights_publishes_keeps_and_resumes_them(
    tiny_grpo: Callable[..., Path], ray_session: str, tmp_path: Path, tiny_model: Path
) -> None:
    changed = {"adapter": "null", "kl": "null", "steps": 3, "learning_rate": "1e-3", "rollout__workers__start": 2}
    recipe = tiny_grpo("full", **{f"stages__0__{key}": value for key, value in changed.items()})

    def go_on(stop_after: int | None, workers: int) -> RunDir:
        config = load_recipe(recipe)
        run = open_run(config, tmp_path, named=True, resume=True)
        record = run.metrics

        def record_and_stop(stage: str, step: int, values: dict[str, float]) -> None:
            record(stage, step, values)
            run.desire(stop=step + 1 == stop_after)

        run.metrics = record_and_stop
        run.desire(stop=False, rollout=workers)
        run_recipe(config, run, read_inputs(config, run.path), lambda _: None)
        return run

    assert go_on(stop_after=2, workers=2).summary()["status"] == "stopped"
    run = go_on(stop_after=None, workers=1)
    assert run.summary()["status"] == "succeeded"
    assert run.events("resumed")  # the digest of the whole model was that of the checkpoint
    assert all(m["mismatch/max"] < 1e-3 for m in run.all_metrics())  # workers sample from the policy's own weights

    (done,) = finished(run)
    assert done.adapter is None
    assert run.summary()["weights"] == {"version": 3, "digest": base_digest(Path(done.base))}
    kept, _ = export_weights(open_base(Path(done.base)))
    before, _ = export_weights(open_base(tiny_model))
    assert list(kept) == list(before)
    assert tensors_digest(kept) != tensors_digest(before)
    assert "lm_head.weight" not in kept  # tied to the embedding: it travels once
    model = open_base(Path(done.base))
    assert torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)
