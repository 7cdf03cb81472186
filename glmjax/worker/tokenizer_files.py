"""The files of a tokenizer as one archive: what a gateway needs that cannot read the checkpoint's directory."""

from __future__ import annotations

import functools
import hashlib
import io
import zipfile
from pathlib import Path

CHUNK_BYTES = 64 * 1024
"""Of the archive, in one message."""

_NAMES = (
    *("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja"),
)


@functools.lru_cache(maxsize=1)
def packed(path: str) -> tuple[bytes, str]:
    """A ZIP archive of a tokenizer's files, the same for the same files, and its SHA-256 in hexadecimal.

    Args:
        path: the directory.

    Raises:
        FileNotFoundError: it has no tokenizer.json.
    """
    if not (Path(path) / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{path} has no tokenizer.json; start the worker with --tokenizer-path")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in _NAMES:
            if (file := Path(path) / name).is_file():
                archive.writestr(zipfile.ZipInfo(name), file.read_bytes(), zipfile.ZIP_DEFLATED)
    content = buffer.getvalue()
    return content, hashlib.sha256(content).hexdigest()
