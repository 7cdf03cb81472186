"""Hugging Face's side of `benchmarks.compare_hf`: a resident process that answers JSON lines, in an environment of its own.

Started as ``python worker.py --cache DIR --threads N``; needs torch and transformers, and nothing of glmjax. Its
first line says what it is and where the checkpoint lies. Then every line ``{"prompt": [id, …], "new_tokens": n}`` on
standard input is answered by one on standard output, until the input ends.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM, StoppingCriteria

SEED = 0
WARM_UP = 64, 4
"""Tokens of the prompt that comes before all others, and new ones."""

CONFIG = Path(__file__).parents[2] / "configs" / "small.json"
"""62.8 million parameters; more than 512 visible positions make the indexer select."""


class Clock(StoppingCriteria):
    """Stops nothing; notes when each token came."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def checkpoint(cache: Path) -> Path:
    """The checkpoint of random weights, written the first time; another configuration or version has another folder."""
    made_of = json.dumps([CONFIG.read_text(), SEED, torch.__version__, transformers.__version__])
    directory = cache / f"model-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"
    if not directory.exists():
        torch.manual_seed(SEED)
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            model = GlmMoeDsaForCausalLM(GlmMoeDsaConfig.from_json_file(CONFIG)).float()
            model.save_pretrained(Path(unfinished) / "model")
            (Path(unfinished) / "model").rename(directory)
    return directory


def greeting(model: GlmMoeDsaForCausalLM, directory: Path) -> dict[str, Any]:
    """What the parent should know: the checkpoint, the numbers in it, and what transformers chose to run it with."""
    return {
        "checkpoint": str(directory),
        "parameters": sum(tensor.numel() for tensor in model.state_dict().values()),
        "threads": torch.get_num_threads(),
        "attention": getattr(model.config, "_attn_implementation", None),
        "experts": getattr(model.config, "_experts_implementation", None),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@torch.inference_mode()
def generate(model: GlmMoeDsaForCausalLM, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """Greedy continuation; times are taken as glmjax takes them, the first decode step left out of the speed."""
    ids_BT, clock = torch.tensor([prompt]), Clock()
    began = time.perf_counter()
    out = model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=[clock],
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.cat(out.logits).float().topk(2).values
    decoding = clock.times[-1] - clock.times[1] if new_tokens > 2 else 0.0
    return {
        "ids": out.sequences[0, len(prompt) :].tolist(),
        "margins": (best[:, 0] - best[:, 1]).tolist(),
        "first_token_seconds": clock.times[0] - began,
        "tokens_per_second": (new_tokens - 2) / decoding if decoding else 0.0,
    }


def main() -> None:
    """Answer until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not come between the lines

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    directory = checkpoint(arguments.cache)
    model = GlmMoeDsaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    length, new_tokens = WARM_UP
    generate(model, list(range(length)), new_tokens)
    answer(greeting(model, directory))
    for line in sys.stdin:
        answer(generate(model, **json.loads(line)))


if __name__ == "__main__":
    main()
