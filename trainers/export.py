"""Export: a model, its adapter merged in, as safetensors, in bitsandbytes' 4 or 8 bits, or as GGUF; and the gate.

What was exported is compared with what was trained before it gets its place: on fixed prompts, by KL and by greedy
tokens, and again as the native engine serves it. Outside the limits nothing is written.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..cluster.errors import InputError, RunFailed
from ..cluster.imports import importing
from .adapters import merge_adapter, open_base, open_draft, open_model, save_model

Format = Literal["safetensors", "bnb-4bit", "bnb-8bit", "gguf"]
FORMATS: tuple[str, ...] = Format.__args__  # type: ignore[attr-defined]
PROMPTS = ("The capital of France is", "2 + 2 =", "def add(a, b):\n", "Once upon a time", "Dear Sir or Madam,")
"""What the gate asks unless it is given others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How far an export may be from what was trained."""

    kl: float = 0.1
    """Nats a token, mean over the prompts' own tokens, from the trained model to the exported."""
    agreement: float = 0.9
    """Share of prompt tokens after which both have the same likeliest token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One form of the model against the trained one."""

    form: str
    kl: float | None
    """None where only tokens can be had, from the engine."""
    agreement: float

    def within(self, limits: Limits) -> bool:
        """Whether it may be exported."""
        return (self.kl is None or self.kl <= limits.kl) and self.agreement >= limits.agreement


def export(
    base: Path,
    adapter: Path | None,
    out: Path,
    *,
    to: str,
    prompts: Sequence[str] = PROMPTS,
    limits: Limits | None = None,
    llama_cpp: Path | None = None,
) -> list[dict[str, Any]]:
    """Write the model as `to` and say how far each form is from the trained one.

    GGUF is made by the converter of the checkout `llama_cpp`, of the merged model, which alone is compared. Raises
    `InputError` where a tool is missing, and `RunFailed` with the numbers where the gate refuses; nothing stays then.
    """
    _check(to, out, llama_cpp)
    limits = limits or Limits()
    ids = _ids(base, prompts)
    trained = _logprobs(open_model(base, adapter, None, seed=0), ids)
    with open_draft(out) as draft:
        merged = draft / "merged"
        merge_adapter(base, adapter, merged) if adapter else save_model(open_base(base), base, merged)
        found = [compare("merged", trained, _logprobs(open_base(merged), ids)), _served(merged, trained, ids)]
        if to.startswith("bnb"):
            found.append(compare(to, trained, _quantise(merged, draft, to, ids)))
        bad = [c for c in found if not c.within(limits)]
        if bad:
            listed = "; ".join(_said(c) for c in found)
            raise RunFailed(
                f"the export is refused: {', '.join(c.form for c in bad)} is outside the limits (KL at most "
                f"{limits.kl:g}, agreement at least {limits.agreement:g}): {listed}"
            )
        _finish(merged, draft, to, llama_cpp)
    return [asdict(c) for c in found]


def compare(form: str, trained: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> Compared:
    """Mean KL(trained ‖ other) and the share of equal likeliest tokens over log-probs `[T, V]` of each prompt."""
    kl = np.concatenate([(np.exp(p) * (p - q)).sum(-1) for p, q in zip(trained, other, strict=True)])
    same = np.concatenate([p.argmax(-1) == q.argmax(-1) for p, q in zip(trained, other, strict=True)])
    return Compared(form=form, kl=float(kl.mean()), agreement=float(same.mean()))


def _check(to: str, out: Path, llama_cpp: Path | None) -> None:
    if to not in FORMATS:
        raise InputError(f"format {to!r} is none of {', '.join(FORMATS)}")
    if out.exists():
        raise InputError(f"{out} is there already: name another folder, or remove it")
    if to == "gguf" and (llama_cpp is None or not _converter(llama_cpp).is_file()):
        where = f"{llama_cpp} has no convert_hf_to_gguf.py" if llama_cpp else "no path was given"
        raise InputError(f"gguf needs llama.cpp's own converter: {where}; give a checkout with --llama-cpp")
    if to.startswith("bnb"):
        try:
            with importing():
                import bitsandbytes  # noqa: F401  # pyright: ignore[reportUnusedImport]
        except ImportError as error:
            raise InputError(f"{to} needs bitsandbytes: pip install 'raylign[qlora]' ({error})") from error


def _converter(llama_cpp: Path) -> Path:
    return llama_cpp / "convert_hf_to_gguf.py"


def _ids(base: Path, prompts: Sequence[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    if not found or not all(found):
        raise InputError("the gate needs prompts of at least one token each")
    return found


def _logprobs(model: Any, ids: Sequence[list[int]]) -> list[np.ndarray]:
    import torch

    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # it would repack its weight, which small layers do not survive
    model.eval()
    with torch.inference_mode():
        return [model(torch.tensor([row])).logits[0].float().log_softmax(-1).numpy() for row in ids]


def _served(folder: Path, trained: Sequence[np.ndarray], ids: Sequence[list[int]]) -> Compared:
    """The native engine's first greedy token after every prompt, against the trained model's."""
    from ..rollout.native.engine import NativeEngine
    from ..rollout.records import GenerationRequest, Sampling, SeedKey

    engine = NativeEngine(folder, slots=8, max_length=max(map(len, ids)) + 2)
    for number, row in enumerate(ids):
        engine.submit(
            GenerationRequest(
                request_id=str(number),
                prompt=np.array(row, np.int32),
                sampling=Sampling(temperature=0.0, max_tokens=1),
                seed=SeedKey(0, 0, number),
            )
        )
    same = {}
    while engine.busy:
        for event in engine.step():
            same[event.request_id] = event.token == int(trained[int(event.request_id)][-1].argmax())
    return Compared(form="served", kl=None, agreement=float(np.mean(list(same.values()))))


def _quantise(merged: Path, draft: Path, to: str, ids: Sequence[list[int]]) -> list[np.ndarray]:
    """Write the model in bitsandbytes' form into the draft; the log-probs of what was written."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    if to == "bnb-4bit":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(merged, quantization_config=config, dtype=torch.float32)
    save_model(model, merged, draft / "quantised")
    return _logprobs(AutoModelForCausalLM.from_pretrained(draft / "quantised", dtype=torch.float32), ids)


def _finish(merged: Path, draft: Path, to: str, llama_cpp: Path | None) -> None:
    """Leave in the draft what the export is, and no more."""

    if to == "gguf":
        assert llama_cpp is not None, "checked before"
        command = [sys.executable, str(_converter(llama_cpp)), str(merged), "--outfile", str(draft / "model.gguf")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it said nothing"]
            raise RunFailed(f"llama.cpp's converter failed with {done.returncode}: {lines[-1]}")
        (draft / "Modelfile").write_text("FROM ./model.gguf\n")
    else:
        source = draft / "quantised" if to.startswith("bnb") else merged
        for path in list(source.iterdir()):
            path.rename(draft / path.name)
    for part in ("merged", "quantised"):
        shutil.rmtree(draft / part, ignore_errors=True)


def _said(c: Compared) -> str:
    return f"{c.form} {'' if c.kl is None else f'KL {c.kl:.4g}, '}agreement {c.agreement:.3g}"
