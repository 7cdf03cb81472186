"""``python -m glmjax.generate``: complete a prompt in the terminal."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from glmjax.glm import NANO, load
from glmjax.model.checkpoint import Fp8, LoadFormat
from glmjax.model.sampling_params import SamplingParams

_DEFAULTS = SamplingParams()
_flag = tyro.conf.arg


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Complete a prompt; the text streams to standard output, a line of statistics ends it on standard error.

    Attributes:
        prompt: text to complete, or with --chat the user's message; read from standard input if absent.
        model_path: directory of a checkpoint; default the model in the box.
        tokenizer_path: directory of tokenizer.json, where it is not beside the weights.
        load_format: where weights come from; "dummy" makes random ones.
        dtype: of weights and activations; default float32 on CPU, bfloat16 elsewhere.
        fp8: keep an FP8 checkpoint's matrices as FP8, or dequantise them while loading.
        chat: apply the checkpoint's chat template to the prompt.
        system: system message, with --chat.
        max_new_tokens: most tokens to generate.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 is off.
        top_p: keep the smallest set of tokens with this mass; 1 is off.
        min_p: keep tokens at least this likely relative to the best; 0 is off.
        repetition_penalty: above 1 discourages tokens seen in prompt or output.
        frequency_penalty: subtracted per occurrence in the output.
        presence_penalty: subtracted once if in the output.
        stop: strings that end the text.
        ignore_eos: go on after end-of-sequence tokens.
        random_seed: fixes sampled output; default random, and printed.
    """

    prompt: tyro.conf.Positional[str | None] = None
    model_path: Path = NANO
    tokenizer_path: Path | None = None
    load_format: LoadFormat = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None
    fp8: Fp8 = "keep"
    chat: Annotated[bool, _flag()] = False
    system: str | None = None
    max_new_tokens: int = 256
    temperature: float = _DEFAULTS.temperature
    top_k: int = _DEFAULTS.top_k
    top_p: float = _DEFAULTS.top_p
    min_p: float = _DEFAULTS.min_p
    repetition_penalty: float = _DEFAULTS.repetition_penalty
    frequency_penalty: float = _DEFAULTS.frequency_penalty
    presence_penalty: float = _DEFAULTS.presence_penalty
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    random_seed: int | None = None

    def sampling(self) -> SamplingParams:
        """The fields that `SamplingParams` has, under its names."""
        names = {field.name for field in dataclasses.fields(SamplingParams)}
        chosen = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return SamplingParams(**chosen, seed=self.random_seed)


def main(arguments: Arguments) -> int:
    """Generate; returns the exit status: 0, or 2 after a message where the request cannot be served."""
    text = sys.stdin.read() if arguments.prompt is None else arguments.prompt
    try:
        glm = load(
            arguments.model_path,
            dtype=arguments.dtype,
            load_format=arguments.load_format,
            fp8=arguments.fp8,
            tokenizer_path=arguments.tokenizer_path,
        )
        prompt: str | list[dict[str, str]] = text
        if arguments.chat:
            system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
            prompt = [*system, {"role": "user", "content": text}]
        generation = glm.generate(prompt, arguments.sampling())
    except (ValueError, FileNotFoundError) as error:
        print(f"glmjax.generate: {error}", file=sys.stderr)
        return 2
    if not arguments.chat:
        print(text, end="", flush=True)
    try:
        for token in generation:
            print(token.text, end="", flush=True)
    except KeyboardInterrupt:
        generation.finish_reason = "interrupted"
    stats = generation.statistics
    sampled = f", seed {stats.seed}" if arguments.temperature > 0 else ""
    print(flush=True)
    print(
        f"[{stats.prompt_tokens} prompt tokens, {stats.new_tokens} new ({generation.finish_reason}); "
        f"first token {stats.first_token_seconds:.2f} s with compilation, then {stats.tokens_per_second:.1f} tokens/s"
        f"{sampled}]",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, prog="python -m glmjax.generate")))
