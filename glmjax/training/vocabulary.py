"""The nano model's vocabulary: byte-level BPE over the training documents, with GLM's special tokens at its end.

    python -m glmjax.training.vocabulary configs/nano

writes `tokenizer.json` and `tokenizer_config.json`, the two files that every GLM checkpoint has, so that nano's
tokenizer is loaded by the same code. Any text is encoded without loss: what has no merge is spelled in bytes.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import tyro
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from glmjax.training import corpus

VOCAB_SIZE = 4096

END_OF_TEXT = "<|endoftext|>"

CONTROL_TOKENS = (
    END_OF_TEXT,
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
"""Structure that a reader never sees: special, so `decode` skips them by default."""

MARKUP_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
)
"""Structure that parsers of the output read: one token each, but not special, as in GLM, so `decode` keeps them."""

SPECIAL_TOKENS = CONTROL_TOKENS + MARKUP_TOKENS
"""In order of id; the last of them is the last token of the vocabulary."""

SPLIT = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word with the one character before it: ` return`, `.append`, `_name`, `(self`
        r"\p{N}{1,3}",  # at most three digits
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation with the line's end: `):\n`
        r"\s*[\r\n]+",  # blank lines
        r"\s+",  # an indentation, whole
    )
)
"""GPT-4's and GLM's pattern with two changes for code. No branch for English contractions, which would tear `'text'`
into `'t` and `ext`. And an indentation is one piece (there, its last space goes to the word after it), so that a prompt
that ends in a newline or in an indentation has the tokens it would have in a file."""

CHAT_TEMPLATE = """\
{%- macro visible(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
[gMASK]<sop>
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
<|observation|>{{ '\\n<tool_response>' }}{{ visible(message.content) }}</tool_response>
{%- elif message.role in ('system', 'user', 'assistant') -%}
{{ '<|' ~ message.role ~ '|>\\n' }}{{ visible(message.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
"""
"""GLM's layout of a conversation, without its tools and thinking, which nano was not taught."""


def train(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Learns a tokenizer. The same texts in the same order give the same tokenizer.

    Args:
      texts: what to learn from, one document at a time.
      vocab_size: size of the vocabulary with the special tokens; it is smaller where the texts run out of pairs.

    Raises:
      ValueError: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and the special tokens need at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([_added(token) for token in SPECIAL_TOKENS])
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict:
    """What `tokenizer_config.json` says: the roles of the special tokens and the chat template."""
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in CONTROL_TOKENS,
        }
        for token in SPECIAL_TOKENS
    }
    return {
        "added_tokens_decoder": added,
        "additional_special_tokens": list(CONTROL_TOKENS),
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def write(tokenizer: Tokenizer, out_dir: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` into a folder, which is made if need be."""
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_dir / "tokenizer.json"), pretty=False)
    config = json.dumps(tokenizer_config(tokenizer), ensure_ascii=False, indent=1)
    (out_dir / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")


def bytes_per_token(tokenizer: Tokenizer, documents: Iterable[corpus.Document]) -> float:
    """How many UTF-8 bytes of the documents one token stands for on average."""
    documents = list(documents)
    encodings = tokenizer.encode_batch_fast([document.text for document in documents])
    return sum(document.num_bytes for document in documents) / sum(map(len, encodings))


def main(out_dir: tyro.conf.Positional[Path]) -> None:
    """Learns the vocabulary from the training documents and writes the tokenizer's files.

    Args:
      out_dir: the folder to write to, for example configs/nano.
    """
    documents = corpus.load()
    tokenizer = train(document.text for document in documents.training)
    write(tokenizer, out_dir)
    print(
        f"{tokenizer.get_vocab_size()} tokens, {corpus.digest(documents.training)[:16]} of {len(documents.training)} files"
    )
    for name, part in (("training", documents.training), ("held out", documents.held_out)):
        print(f"{name}: {bytes_per_token(tokenizer, part):.3f} bytes per token")


def _added(token: str) -> AddedToken:
    return AddedToken(token, special=token in CONTROL_TOKENS, normalized=False)


if __name__ == "__main__":
    tyro.cli(main)
