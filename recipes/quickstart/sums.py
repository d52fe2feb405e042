"""The quickstart's task: adding two three-digit numbers, by showing the work or by blurting out a number.

    123+456:3+6+0=09;2+5+0=07;1+4+0=05;=579

One column a step, units first: digit + digit + carry = two digits. `prepare` writes the training text, the
demonstrations, the prompts, pairs of a right and a wrong answer, the held-out questions, and an untrained model folder
(config and tokenizer, no weights).
Which questions are held out is a property of the question itself, so no seed can mix them into training.
"""

import json
import random
from pathlib import Path

SYMBOLS = [*"0123456789", *"+=;: .?"]
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
WORDS = ["user", "assistant", "\n"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HELD_OUT_SEED = 12345


def held_out(a: int, b: int) -> bool:
    """Whether a question belongs to the evaluation: about one in fifty, by the numbers alone."""
    return (a * 7919 + b * 104729) % 50 == 0


def draw(rng: random.Random, *, held: bool = False) -> tuple[int, int]:
    """Two three-digit numbers of the training questions, or of the held-out ones."""
    while True:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        if held_out(a, b) == held:
            return a, b


def worked(a: int, b: int, rng: random.Random | None = None, slips: float = 0.0) -> str:
    """The sum column by column; each column's total is wrong with probability `slips`, and carried on wrong."""
    steps, digits, carry = [], "", 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        if rng and rng.random() < slips:
            total = rng.randint(0, 19)
        steps.append(f"{x}+{y}+{carry}={total:02d};")
        carry, digits = total // 10, str(total % 10) + digits
    return f"{''.join(steps)}={carry or ''}{digits}"


def short(a: int, b: int) -> str:
    """The sum at once."""
    return f"={a + b}"


def answer(completion: str) -> str:
    """What stands behind the last `=`."""
    return completion.rpartition("=")[2]


def exact_match(completion: str, row: dict) -> float:
    """1.0 when the completion's answer is the row's."""
    return float(answer(completion) == row["answer"])


def prepare(
    out: Path,
    seed: int,
    *,
    documents: int = 25600,
    worked_documents: float = 0.75,
    chat_documents: float = 0.1,
    demonstrations: int = 2000,
    worked_demonstrations: float = 0.35,
    slips: float = 0.1,
    prompts: int = 4000,
    preferences: int = 4000,
    questions: int = 240,
) -> None:
    """Write everything the quickstart reads into `out`."""
    rng = random.Random(seed)
    _write_model(out / "untrained")
    _write(out / "text.jsonl", [_document(rng, worked_documents, chat_documents) for _ in range(documents)])
    rows = [
        _demonstration(a, b, worked(a, b, rng, slips) if rng.random() < worked_demonstrations else short(a, b))
        for a, b in (draw(rng) for _ in range(demonstrations))
    ]
    _write(out / "demonstrations.jsonl", rows)
    clean = [_demonstration(a, b, worked(a, b)) for a, b in (draw(rng) for _ in range(demonstrations))]
    _write(out / "clean_demonstrations.jsonl", clean)
    _write(out / "prompts.jsonl", [_question(*draw(rng)) for _ in range(prompts)])
    _write(out / "preferences.jsonl", [_preference(*draw(rng), rng) for _ in range(preferences)])
    asked, apart = _distinct(random.Random(HELD_OUT_SEED), questions), random.Random(HELD_OUT_SEED)
    _write(out / "held_out.jsonl", [_question(a, b) for a, b in asked])
    _write(out / "held_out_preferences.jsonl", [_preference(a, b, apart) for a, b in asked])


def _distinct(rng: random.Random, count: int) -> list[tuple[int, int]]:
    found: dict[tuple[int, int], None] = {}
    while len(found) < count:
        found[draw(rng, held=True)] = None
    return list(found)


def _document(rng: random.Random, worked_share: float, chat_share: float) -> dict[str, str]:
    """A line of text; a tenth is chat (echoing a number), so that the base model knows the form but not the task."""
    if rng.random() < chat_share:
        number = rng.randint(0, 9999)
        turns = (("user", number), ("assistant", number))
        return {"text": "\n" + "".join(f"<|im_start|>{role}\n{n}<|im_end|>\n" for role, n in turns)}
    a, b = draw(rng)
    return {"text": f"\n{a}+{b}:{worked(a, b) if rng.random() < worked_share else short(a, b)}.\n"}


def _demonstration(a: int, b: int, reply: str) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": reply}]}


def _preference(a: int, b: int, rng: random.Random) -> dict[str, str]:
    """A right answer before a wrong one, in the forms that a policy's right and wrong answers have.

    Blurting a number out is seldom right, so most right answers are worked; half of the wrong ones are too.
    """
    right = worked(a, b) if rng.random() < 0.9 else short(a, b)
    return {"prompt": f"{a}+{b}", "chosen": right, "rejected": _wrong(a, b, rng)}


def _wrong(a: int, b: int, rng: random.Random) -> str:
    """Columns of which one slipped, or a number with one digit off."""
    if rng.random() < 0.5:
        return short(a, b + rng.choice((-100, -10, -1, 1, 10, 100)))
    while True:
        text = worked(a, b, rng, slips=0.3)
        if answer(text) != str(a + b):
            return text


def _question(a: int, b: int) -> dict[str, str]:
    return {"prompt": f"{a}+{b}", "answer": str(a + b)}


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_model(folder: Path) -> None:
    """A Llama of 643 thousand parameters with a word-level tokenizer of 25 tokens, as a folder without weights."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS, *SYMBOLS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("user|assistant|\n|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["</s>", "<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": vocabulary["<|im_end|>"]}
    LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=384,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
        architectures=["LlamaForCausalLM"],
        **ids,
    ).save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)
