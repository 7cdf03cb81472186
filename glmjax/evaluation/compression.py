"""What a general compressor makes of the same bytes: the yardstick for bits per byte."""

import lzma
from collections.abc import Sequence

from glmjax.training.corpus import Document


def xz_size(documents: Sequence[Document]) -> int:
    """Bytes of ``xz -9`` of the documents, one after the other."""
    return len(lzma.compress(b"".join(document.text.encode() for document in documents), preset=9))


def xz_size_after(documents: Sequence[Document], before: Sequence[Document]) -> int:
    """Bytes that the documents add where ``xz -9`` has read others before: what it learns from those.

    The window of ``-9`` is 64 MiB; of what lies further back it knows nothing.
    """
    return xz_size([*before, *documents]) - xz_size(before)
