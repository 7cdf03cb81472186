"""Blanks as GLM writes them: the text with a mask, then what belongs there (GLM, arXiv 2103.10360, section 2.1).

    prefix [MASK] suffix <sop> middle <eop>      a blank within a text
    prefix [gMASK] <sop> continuation <eop>      a blank at its end

GLM-5's positions have one dimension, so the middle simply follows; with several blanks the parts after `<sop>` come in
any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from glmjax.model.tokenizer import Tokenizer


class BlankTokens(NamedTuple):
    """Ids of the tokens that blanks are written with.

    Attributes:
        mask: `[MASK]`, where a blank is.
        gmask: `[gMASK]`, a blank at the end.
        sop: `<sop>`, before what belongs into a blank.
        eop: `<eop>`, after it.
    """

    mask: int
    gmask: int
    sop: int
    eop: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> BlankTokens:
        """Those of a vocabulary.

        Raises:
            ValueError: it lacks one of them.
        """
        names = ("[MASK]", "[gMASK]", "<sop>", "<eop>")
        ids = [tokenizer.token_id(name) for name in names]
        missing = [name for name, i in zip(names, ids, strict=True) if i is None]
        if missing:
            raise ValueError(f"the vocabulary has no {', '.join(missing)}; use a GLM tokenizer to fill blanks")
        return cls(*ids)

    def prompt(self, prefix: Sequence[int], suffix: Sequence[int]) -> list[int]:
        """What a model continues with the middle and `eop`; without a suffix the blank is at the end."""
        blank = [self.mask, *suffix] if suffix else [self.gmask]
        return [*prefix, *blank, self.sop]
