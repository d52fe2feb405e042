"""vLLM in its own environment: reads a job a line from stdin, answers a line a job. Started by `vllm_peer.py`.

It runs under another interpreter and imports nothing of this repository.
"""

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """`vllm_server.py SETTINGS`: the settings are JSON for `vllm.LLM`; a job has `prompts` and `lengths`."""
    # vLLM and its libraries print: the answers keep the real stdout for themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    llm = LLM(**json.loads(sys.argv[1]))
    _answer(answers, {"ready": True})
    for line in sys.stdin:
        _answer(answers, _generate(llm, json.loads(line)))


def _generate(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    # As TRL's vLLM path asks: T = 1 and the sampled token's log-prob.
    params = [
        SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, logprobs=0, detokenize=False)
        for length in job["lengths"]
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    wall, cpu = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "lengths": [len(output.outputs[0].token_ids) for output in outputs],
    }


def _answer(answers: Any, content: dict[str, Any]) -> None:
    print(json.dumps(content), file=answers, flush=True)


if __name__ == "__main__":
    main()
