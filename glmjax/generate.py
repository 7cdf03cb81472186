"""``python -m glmjax.generate``: complete a prompt in the terminal."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from glmjax.decoding import Generation
from glmjax.glm import load
from glmjax.kept_programs import compilation_cache
from glmjax.model.checkpoint import Fp8, LoadFormat
from glmjax.model.config import GlmConfig
from glmjax.nano import NANO
from glmjax.sampling_flags import SamplingFlags

_INTERRUPTED = 130  # the shell's exit status for Ctrl-C


@dataclasses.dataclass(frozen=True)
class Arguments(SamplingFlags):
    """Complete a prompt or fill a blank; the text streams to standard output, a line of statistics ends it on standard error.

    Attributes:
        prompt: text to complete, or with --chat the user's message; if absent, standard input without its last newline.
        model_path: directory of a checkpoint; default the model in the box.
        tokenizer_path: directory of tokenizer.json, where it is not beside the weights.
        load_format: where weights come from; "dummy" makes random ones.
        dtype: of weights and activations; default float32 on CPU, bfloat16 elsewhere.
        kv_cache_dtype: of cached rows; default that of the model.
        fp8: keep an FP8 checkpoint's matrices as FP8, or dequantise them while loading.
        infill: instead of a prompt, the texts before and after a blank, which the model fills.
        chat: apply the checkpoint's chat template to the prompt.
        system: system message, with --chat.
    """

    prompt: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="PROMPT")]] = None
    model_path: Path = NANO
    tokenizer_path: Path | None = None
    load_format: LoadFormat = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None
    kv_cache_dtype: Literal["float32", "bfloat16", "fp8"] | None = None
    fp8: Fp8 = "keep"
    infill: Annotated[tuple[str, str] | None, tyro.conf.arg(metavar="PREFIX SUFFIX")] = None
    chat: bool = False
    system: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Generate; returns the exit status: 0, 2 after a message where the request cannot be served, 130 after Ctrl-C.

    Args:
        argv: the command line; default the process's own.

    Raises:
        SystemExit: after --help (0) or flags that cannot be read (2).
    """
    arguments = tyro.cli(Arguments, prog="python -m glmjax.generate", args=argv)
    try:
        before, after = _texts(arguments)
        generation = _begin(arguments, before, after)
    except (ValueError, OSError) as error:
        print(f"glmjax.generate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED
    if not arguments.chat:
        print(before, end="", flush=True)
    interrupted = False
    try:
        for token in generation:
            print(token.text, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    print(after or "", flush=True)
    end = "interrupted" if interrupted else generation.finish_reason
    print(_summary(generation, end, sampled=arguments.temperature > 0), file=sys.stderr)
    return _INTERRUPTED if interrupted else 0


def _texts(arguments: Arguments) -> tuple[str, str | None]:
    """The prompt, and the text behind the blank where there is one."""
    if arguments.infill is None:
        return _read_prompt() if arguments.prompt is None else arguments.prompt, None
    if arguments.prompt is not None or arguments.chat:
        raise ValueError("--infill takes the place of a prompt and of --chat; give one of them")
    return arguments.infill


def _read_prompt() -> str:
    if sys.stdin.isatty():
        print("glmjax.generate: reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
    return sys.stdin.read().removesuffix("\n")


def _begin(arguments: Arguments, text: str, suffix: str | None) -> Generation:
    """Refuses what it can before the weights are loaded, which may take long."""
    if arguments.system is not None and not arguments.chat:
        raise ValueError("--system is a message of a chat; give --chat too")
    params = arguments.sampling()
    params.validate(GlmConfig.from_dir(arguments.model_path).vocab_size)
    glm = load(
        arguments.model_path,
        dtype=arguments.dtype,
        load_format=arguments.load_format,
        fp8=arguments.fp8,
        kv_cache_dtype=arguments.kv_cache_dtype,
        tokenizer_path=arguments.tokenizer_path,
    )
    if suffix is not None:
        return glm.infill(text, suffix, params)
    if not arguments.chat:
        return glm.generate(text, params)
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    return glm.generate([*system, {"role": "user", "content": text}], params)


def _summary(generation: Generation, end: str | None, sampled: bool) -> str:
    stats = generation.statistics
    parts = [f"{stats.prompt_tokens} prompt tokens, {stats.new_tokens} new ({end})"]
    if stats.new_tokens:
        parts.append(f"first token after {stats.first_token_seconds:.2f} s with compilation")
    if stats.tokens_per_second:
        parts.append(f"then {stats.tokens_per_second:.1f} tokens/s")
    if sampled:
        parts.append(f"seed {stats.seed}")
    return f"[{'; '.join(parts)}]"


if __name__ == "__main__":
    compilation_cache()  # the next start then takes a second or two
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    sys.exit(main())
