"""Groups that are carried from step to step come out of a checkpoint as they went in."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from raylign.cluster.errors import RunFailed
from raylign.rollout.records import FinishReason, Origin, Sample, Span
from raylign.trainers.online.ahead import Prompt
from raylign.trainers.online.carried import keep_carried, kept_carried

PROMPTS = [Prompt(ids=np.array([7, n], np.int32), row={"prompt": f"word {n}"}) for n in range(3)]


def sample(finish_reason: FinishReason | None, *spans: Span) -> Sample:
    count = sum(span.tokens for span in spans)
    tokens, logprobs = np.arange(count, dtype=np.int32), np.log(np.linspace(0.1, 0.9, count)).astype(np.float32)
    return Sample(tokens=tokens, logprobs=logprobs, finish_reason=finish_reason, spans=spans, text="é" * count)


def test_what_is_kept_is_read_bit_for_bit(tmp_path: Path) -> None:
    groups = [PROMPTS[row].group(Origin(step, index, row)) for step, index, row in ((4, 1, 2), (5, 0, 0))]
    given = [
        (sample("stop", Span(3, 2, "d2")), sample(None, Span(4, 2, "d2"), Span(4, 3, "d3"))),
        (sample(None, Span(4, 3, "d3")), sample("length", Span(1, 3, "d3"))),
    ]
    made = [replace(g, samples=s) for g, s in zip(groups, given, strict=True)]
    keep_carried(tmp_path, made)
    read = kept_carried(tmp_path, PROMPTS)
    for got, group in zip(read, made, strict=True):
        assert (got.origin, got.row, got.prompt.tolist()) == (group.origin, group.row, group.prompt.tolist())
        for a, b in zip(got.samples, group.samples, strict=True):
            assert (a.tokens.tolist(), a.logprobs.tobytes()) == (b.tokens.tolist(), b.logprobs.tobytes())
            assert (a.tokens.dtype, a.logprobs.dtype) == (np.int32, np.float32)
            assert (a.finish_reason, a.spans) == (b.finish_reason, b.spans)
            assert a.text == (b.text if b.finish_reason else "")  # what goes on is decoded anew


def test_nothing_is_written_of_no_groups_and_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    keep_carried(tmp_path, [])
    assert not list(tmp_path.iterdir())
    assert kept_carried(tmp_path, PROMPTS) == []
    with pytest.raises(RunFailed, match=r"the carried groups cannot be written to .*gone/carried\.safetensors"):
        keep_carried(tmp_path / "gone", [replace(PROMPTS[0].group(Origin(0, 0, 0)), samples=(sample("stop"),))])
