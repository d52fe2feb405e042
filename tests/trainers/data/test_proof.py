"""What `check` says of a stage's data before anything is started."""

from pathlib import Path

import pytest
from raylign.cluster.errors import InputError
from raylign.trainers.data.proof import overlap, prove_stage, refuse_overlap, render_mask
from raylign.trainers.data.rows import kind_of_stage, load_rows
from raylign.trainers.data.template import Tokenizer, load_tokenizer
from raylign.trainers.stages import CptStage, DataConfig, DpoStage, OnlineStage, SftStage, StageConfig

DATA = DataConfig(path="rows.jsonl")


def turn(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def prompt(question: str) -> dict[str, list[dict[str, str]]]:
    return {"prompt": [{"role": "user", "content": question}]}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model)


def test_counts_are_those_of_the_rows(tokenizer: Tokenizer) -> None:
    proof = prove_stage(SftStage(data=DATA, max_length=64), [turn("hi", "yo"), turn("hi", "hello")], tokenizer)
    assert (proof.rows, proof.tokens, proof.supervised, proof.longest) == (2, 25 + 28, 3 + 6, 28)
    assert len(proof.require()) == 2


def test_of_a_demonstration_the_last_answer_is_learned_and_bounds_are_the_rollouts(tokenizer: Tokenizer) -> None:
    fields = {"type": "spin", "data": DATA, "rewards": [{"type": "format", "pattern": "x"}]}
    bounds = {"max_prompt_tokens": 64, "sampling": {"max_tokens": 4}}
    stage = OnlineStage.model_validate({**fields, "rollout": bounds})
    asked = [*turn("hi", "yo")["messages"], {"role": "user", "content": "so"}]
    rows = [{"prompt": asked, "completion": [{"role": "assistant", "content": text}]} for text in ("abc", "abcd")]
    proof = prove_stage(stage, rows, tokenizer)
    text = render_mask(proof.encoded[0], tokenizer)
    bold = "".join(text.plain[s.start : s.end] for s in text.spans if "bold" in str(s.style))
    assert bold == "abc<|im_end|>"
    assert (proof.supervised, len(proof.encoded)) == (4, 1)
    assert proof.refusals[0].reason.startswith("an answer of 5 tokens, more than rollout.sampling.max_tokens 4: raise")


def test_refusals_name_their_rows(tokenizer: Tokenizer) -> None:
    rows = [turn("hi", "yo"), {"messages": turn("hi", "yo")["messages"][:1]}, turn("hi", "")]
    proof = prove_stage(SftStage(data=DATA), rows, tokenizer)
    assert [r.row for r in proof.refusals] == [2, 3]
    assert proof.facts()["refused"] == 2
    with pytest.raises(InputError, match=r"stage sft, data row 2: no supervised tokens.*1 more"):
        proof.require()


def test_the_mask_is_drawn_token_by_token(tokenizer: Tokenizer) -> None:
    proof = prove_stage(SftStage(data=DATA), [turn("hi", "yo")], tokenizer)
    text = render_mask(proof.encoded[0], tokenizer)
    assert text.plain == "<|im_start|>user⏎\nhi<|im_end|>⏎\n<|im_start|>assistant⏎\nyo<|im_end|>⏎\n"
    bold = "".join(text.plain[s.start : s.end] for s in text.spans if "bold" in str(s.style))
    assert bold == "yo<|im_end|>"


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        (SftStage(data=DATA, max_length=1024, truncate=True), "sft/alpaca_en_demo.json"),
        (DpoStage(data=DATA, max_length=16384), "preference/dpo_en_demo.json"),
        (CptStage(data=DATA, max_length=1024, truncate=True), "sft/wiki_demo.txt"),
    ],
)
def test_real_rows_are_proven(shared_data: Path, tokenizer: Tokenizer, stage: StageConfig, file: str) -> None:
    rows = load_rows(DATA, shared_data / file, kind_of_stage(stage))
    proof = prove_stage(stage, rows, tokenizer)
    assert proof.supervised > 0
    unproven = {r.reason.split(":")[0] for r in proof.refusals}
    assert unproven <= {"no supervised tokens"}, unproven
    assert len(proof.refusals) < len(rows) / 20


def test_evaluation_prompts_in_training_are_found() -> None:
    asked = [prompt("12+34"), prompt("5+6"), prompt("7+8")]
    training = [{"text": "so 12+34=46 and 15+6=21"}, turn("7+8", "15"), prompt("9+9")]
    assert overlap(asked, training) == ["12+34", "7+8"]
    with pytest.raises(InputError, match=r"trains on 2 of the evaluation's prompts, the first is '12\+34'"):
        refuse_overlap(asked, training, "sft")
    refuse_overlap([prompt("5+6")], training, "sft")
