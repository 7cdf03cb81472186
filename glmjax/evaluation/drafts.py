"""``python -m glmjax.eval drafts``: how many of the MTP layer's drafts the model accepts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glmjax.evaluation.arguments import Dtype, Evaluation, encode, read_or_held_out
from glmjax.evaluation.coupling import Coupling, coupling
from glmjax.evaluation.loops import WINDOW, before_loop
from glmjax.evaluation.report import Report, percent, table
from glmjax.evaluation.rollout import Continued, continued
from glmjax.model.checkpoint import Fp8
from glmjax.model.sampling_params import SamplingParams

SAMPLED = "temperature 1"


@dataclasses.dataclass(frozen=True)
class Drafts(Evaluation):
    """Continue code by speculative decoding, and count which drafts are accepted: greedily and at temperature 1.

    Drafts and target share their noise, so at temperature 1 a draft is accepted where both draw the same token. Text
    that repeats itself is easy to draft: a sequence loops where 48 of its tokens repeat with a period of at most 24. Such
    sequences are counted, and what they do from there on is left out.

    At temperature 1 it is also computed how often drafts would be accepted on the same text by rejection sampling, which
    no way of accepting surpasses (`glmjax.evaluation.coupling`): what is lost by output that does not depend on drafts.

    Attributes:
        num_draft: drafts in a round.
        sequences: most prompts to continue, spread evenly over the texts.
        prompt_tokens: length of each prompt, a piece of a text.
        new_tokens: to look at after each; 48 more are generated, to tell whether the last of them loop.
        prompts: text files to continue, those that are longer than that; default modules of the standard library that
            the model in the box never saw.
        seed: of the first sequence at temperature 1; the others' follow it.
        dtype: of weights, activations and cached rows; default float32 on CPU, bfloat16 elsewhere.
        fp8: keep an FP8 checkpoint's matrices as FP8, or dequantise them while loading.
    """

    num_draft: int = 3
    sequences: int = 64
    prompt_tokens: int = 256
    new_tokens: int = 64
    prompts: tuple[Path, ...] = ()
    seed: int = 0
    dtype: Dtype | None = None
    fp8: Fp8 = "keep"

    def run(self) -> Report:
        """See `Evaluation`."""
        if min(self.num_draft, self.sequences, self.prompt_tokens) < 1 or self.new_tokens < 2:
            raise ValueError("--num-draft, --sequences and --prompt-tokens must be at least 1, --new-tokens at least 2")
        glm = self.glm(self.dtype, self.fp8)
        if glm.weights.mtp is None:
            raise ValueError(f"{self.model_path} has no MTP weights, which draft; give a checkpoint that has them")
        generated, limit = self.new_tokens + WINDOW, glm.config.max_position_embeddings
        if (length := self.prompt_tokens + generated + self.num_draft) > limit:
            raise ValueError(
                f"prompt, {generated} new tokens and drafts, {length} in all, exceed the model's context of {limit}; "
                "ask for fewer --prompt-tokens or --new-tokens"
            )
        texts = encode(glm, read_or_held_out(self.prompts))
        prompts = pieces(texts, self.prompt_tokens, self.sequences)
        if not prompts:
            raise ValueError(f"no text has more than {self.prompt_tokens} tokens; set --prompt-tokens to fewer")
        sequences = {
            name: continued(glm, prompts, params, generated, self.num_draft)
            for name, params in (
                ("greedy", SamplingParams(temperature=0)),
                (SAMPLED, SamplingParams(temperature=1, seed=self.seed)),
            )
        }
        found = {name: acceptance(of, self.num_draft, self.new_tokens) for name, of in sequences.items()}
        coupled = coupling(glm, prompts, sequences[SAMPLED], self.num_draft, self.new_tokens)
        return _report(len(prompts), self.prompt_tokens, self.new_tokens, found, coupled)


def pieces(texts: Sequence[np.ndarray], length: int, most: int) -> list[np.ndarray]:
    """Pieces of texts that something follows: the first of each text, the second, …, of which `most` at even distances.

    Args:
        texts: token ids.
        length: of a piece.
        most: how many.
    """
    found = [text[i : i + length] for text in texts for i in range(0, len(text) - length, length)]
    return [found[i * len(found) // most] for i in range(most)] if len(found) > most else found


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """Of drafts, over rounds before a sequence loops.

    Attributes:
        rounds: verify steps; each proposes one draft of every position.
        accepted: drafts accepted at each position, which needs those before it accepted.
        tokens: emitted in these rounds.
        looping: how many sequences loop.
    """

    rounds: int
    accepted: tuple[int, ...]
    tokens: int
    looping: int

    @property
    def accept_length(self) -> float | None:
        """Tokens per verify step; None without a step."""
        return self.tokens / self.rounds if self.rounds else None

    @property
    def shares(self) -> tuple[float | None, ...]:
        """Accepted of all drafts at each position."""
        return tuple(_share(n, self.rounds) for n in self.accepted)

    @property
    def conditional(self) -> tuple[float | None, ...]:
        """Accepted of those drafts before which all were accepted."""
        return tuple(_share(n, of) for n, of in zip(self.accepted, (self.rounds, *self.accepted), strict=False))


def acceptance(sequences: Sequence[Continued], num_draft: int, new_tokens: int) -> Acceptance:
    """Count accepted drafts, over the rounds whose tokens all come before the sequence loops.

    Args:
        sequences: generated with `num_draft` drafts a round.
        num_draft: how many.
        new_tokens: of each sequence to look at; a loop can be told where `WINDOW` more follow.
    """
    kept, looping = [], 0
    for ids, counts in sequences:
        end = before_loop(ids, new_tokens)
        looping += end < min(len(ids), new_tokens)
        kept += [n for n, after in zip(counts, 1 + np.cumsum(counts), strict=True) if after <= end]
    accepted = tuple(sum(n > position for n in kept) for position in range(1, num_draft + 1))
    return Acceptance(len(kept), accepted, sum(kept), looping)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _report(
    sequences: int, prompt_tokens: int, new_tokens: int, found: dict[str, Acceptance], coupled: Coupling
) -> Report:
    lines = [f"{sequences} prompts of {prompt_tokens} tokens, {new_tokens} new tokens of each"]
    for name, of in found.items():
        length = "–" if of.accept_length is None else f"{of.accept_length:.2f}"
        rows = [("draft", "proposed", "accepted", "of all", "after accepted")]
        rows += [
            (f"{position}", f"{of.rounds:,}", f"{n:,}", percent(share), percent(conditional))
            for position, (n, share, conditional) in enumerate(
                zip(of.accepted, of.shares, of.conditional, strict=True), start=1
            )
        ]
        lines += [
            "",
            f"{name}: {length} tokens per verify step; {of.looping} of {sequences} sequences loop",
            table(rows),
        ]
    lines += ["", *_compared(coupled)]
    numbers = {
        "sequences": sequences,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        **{
            name.replace(" ", "_"): {
                **dataclasses.asdict(of),
                "accept_length": of.accept_length,
                "accepted_share": of.shares,
                "accepted_share_after_accepted": of.conditional,
            }
            for name, of in found.items()
        },
        "coupling": {**dataclasses.asdict(coupled), "gain": coupled.gain},
    }
    return Report("\n".join(lines), numbers)


def _compared(of: Coupling) -> list[str]:
    """Ways of accepting, a column each, beside what was observed under shared noise."""
    columns = {**of.expected, "observed": of.observed}
    rows = [("after accepted", *columns)]
    rows += [
        (f"draft {n + 1}", *(percent(column.after_accepted[n]) for column in columns.values()))
        for n in range(len(of.observed.after_accepted))
    ]
    lengths = [column.accept_length for column in columns.values()]
    rows.append(("tokens per step", *("–" if length is None else f"{length:.3f}" for length in lengths)))
    gain = "–" if of.gain is None else f"{of.gain:.3f}"
    return [
        f"{SAMPLED}, the same text: rejection sampling would emit {gain} times the tokens per verify step; "
        f"{of.rounds:,} steps observed",
        table(rows),
    ]
