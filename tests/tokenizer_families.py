"""Small tokenizers that imitate well-known families: how each splits text, which tokens it adds, and what its template
does to contents. They are trained here on a few lines.

Each can be built with other spellings of its special tokens, all else being the same. The usual spellings are ordinary
text to such a tokenizer, and tests compare with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from chat_templates import GEMMA, LLAMA3, MARKED, MISTRAL, PHI3, PLAIN, QWEN3
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog.\n\nIt's 2026, and <b>nobody</b> was hurt: [see] (below) | above.",
    "user assistant system model start end of text header id eot turn im INST begin pad unk think tool call s eos bos",
    "<s> </s> <| |> <|x|> [A] [/A] <x> </x> <start_of_x> <|start_x_id|>" * 8,
    "Größe, naïve, Привет, 你好, مرحبا.  Two  spaces,\ttabs,\r\nbreaks.\n",
]
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
# The role tokens are literals, so that they can be spelled otherwise.
PHI3_SAID = PHI3.replace(
    "'<|' + m.role + '|>\n'",
    "{'system': '<|system|>', 'user': '<|user|>', 'assistant': '<|assistant|>'}[m.role] + '\\n'",
)

Spelling = Callable[[str], str]
"""A function from a special token to its spelling."""


@dataclass(frozen=True)
class Manner:
    """A family of tokenizers.

    Attributes:
        special: added tokens that are special.
        words: added tokens that are not special.
        end: the token that ends turns, added as not special; None if a special token ends them.
        cut: a function that builds a tokenizer without vocabulary.
        flags: flags that are set for all special tokens.
        bytes_in_vocabulary: True if text without a piece is encoded as byte pieces.
    """

    template: str
    special: tuple[str, ...]
    eos: str
    cut: Callable[[], Tokenizer]
    words: tuple[str, ...] = ()
    end: str | None = None
    bos: str | None = None
    unknown: str | None = None
    flags: tuple[str, ...] = ()
    bytes_in_vocabulary: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """Tokens that the text of a message must never become."""
        return (*self.special, *([self.end] if self.end else []))

    def tokenizer(self, spelling: Spelling = lambda text: text) -> Any:
        special = [spelling(text) for text in self.special]
        unknown = spelling(self.unknown) if self.unknown else None
        bpe = self.cut()
        if isinstance(bpe.model, models.Unigram):
            letters = sorted({*"".join(CORPUS).replace(" ", "▁"), *map(chr, range(33, 127))})
            pieces = [(text, 0.0) for text in special] + [(letter, -5.0) for letter in letters]
            bpe.model = models.Unigram([*pieces, ("▁the", -6.0)], special.index(str(unknown)))
        else:
            byte_pieces = [f"<0x{i:02X}>" for i in range(256)] if self.bytes_in_vocabulary else []
            alphabet = [] if self.bytes_in_vocabulary else pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(
                vocab_size=700, initial_alphabet=alphabet, special_tokens=[*special, *byte_pieces], show_progress=False
            )
            bpe.train_from_iterator(CORPUS, trainer)
            bpe = remove_added_tokens(bpe, unknown)
        bpe.add_special_tokens([AddedToken(text, **dict.fromkeys(self.flags, True)) for text in special])
        ordinary_tokens = (*self.words, *([spelling(self.end)] if self.end else []))
        bpe.add_tokens([AddedToken(text, normalized=False, special=False) for text in ordinary_tokens])
        template = self.template.strip()
        for text in sorted(self.marks, key=len, reverse=True):
            template = template.replace(text, spelling(text))
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            eos_token=spelling(self.eos),
            bos_token=self.bos and spelling(self.bos),
            unk_token=unknown,
            pad_token=spelling(self.eos),
            chat_template=template,
        )


def remove_added_tokens(trained: Tokenizer, unknown: str | None) -> Tokenizer:
    """Remove the tokens that training added, so that byte pieces are ordinary pieces, and set the unknown token."""
    import json

    config = json.loads(trained.to_str()) | {"added_tokens": []}
    config["model"]["unk_token"] = unknown
    return Tokenizer.from_str(json.dumps(config))


def byte_level(words: str | None = None, whole: bool = False, normalizer: Any = None) -> Callable[[], Tokenizer]:
    """Return a function that builds a byte-level BPE without vocabulary.

    Args:
        words: a regular expression that splits text before its bytes are merged; None uses GPT-2's.
        whole: True if a word that is a piece is encoded as that piece without merges.
    """

    def build_tokenizer() -> Tokenizer:
        tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
        split = [] if words is None else [pre_tokenizers.Split(Regex(words), "isolated")]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, to_bytes])
        tokenizer.decoder = decoders.ByteLevel()
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        return tokenizer

    return build_tokenizer


def sentence_pieces(model: Callable[[], Any], prefix: str, normal: Sequence[Any] = ()) -> Callable[[], Tokenizer]:
    """Return a function that builds a tokenizer in the manner of SentencePiece, without vocabulary.

    Args:
        prefix: where a blank is added in front: `never`, `first` (of the whole text) or `always` (of each part of it).
        normal: normalizers that run first.
    """

    def build_tokenizer() -> Tokenizer:
        tokenizer = Tokenizer(model())
        blanks: list[Any] = [*normal, normalizers.Replace(" ", "▁")]
        if prefix == "first":
            tokenizer.normalizer = normalizers.Sequence([*normal])
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), *blanks] if prefix == "always" else blanks
            )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            + ([] if prefix == "never" else [decoders.Strip(" ", 1, 0)])
        )
        return tokenizer

    return build_tokenizer


def byte_fallback() -> Any:
    return models.BPE(byte_fallback=True, fuse_unk=True)


MANNERS = {
    "llama3": Manner(
        LLAMA3,
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|eom_id|>",
            "<|python_tag|>",
            *(f"<|reserved_special_token_{i}|>" for i in (0, 1, 10)),
        ),
        "<|end_of_text|>",
        byte_level(WORDS, whole=True),
        bos="<|begin_of_text|>",
    ),
    "qwen": Manner(
        QWEN3,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<｜end▁of▁sentence｜>"),
        "<|im_end|>",
        byte_level(WORDS, normalizer=normalizers.NFC()),
        words=("<think>", "</think>", "<tool_call>"),
    ),
    "gemma": Manner(
        GEMMA,
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        sentence_pieces(byte_fallback, "never"),
        words=("\n\n", "<table>", "<unused0>"),
        bos="<bos>",
        unknown="<unk>",
        bytes_in_vocabulary=True,
    ),
    "mistral": Manner(
        MISTRAL,
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[IMG]"),
        "</s>",
        sentence_pieces(byte_fallback, "first"),
        bos="<s>",
        unknown="<unk>",
        bytes_in_vocabulary=True,
    ),
    "llama2": Manner(
        MISTRAL,
        ("<unk>", "<s>", "</s>"),
        "</s>",
        sentence_pieces(byte_fallback, "always"),
        bos="<s>",
        unknown="<unk>",
        bytes_in_vocabulary=True,
    ),
    "phi3": Manner(
        PHI3_SAID,
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|endoftext|>",
        sentence_pieces(byte_fallback, "first"),
        flags=("rstrip",),
        bytes_in_vocabulary=True,
        unknown="<|endoftext|>",
    ),
    # Its vocabulary lists special tokens as ordinary pieces, so the model finds them in any text, also in a text whose
    # letters the normaliser turns into them.
    "unigram": Manner(
        PLAIN.replace("'\n'", "eos_token"),
        ("<unk>", "<s>", "</s>"),
        "</s>",
        sentence_pieces(lambda: models.Unigram([("<unk>", 0.0)], 0), "first", [normalizers.NFKC()]),
        unknown="<unk>",
    ),
    # The token that ends a turn is not special.
    "marked": Manner(
        MARKED,
        ("<|endoftext|>", "<|im_start|>"),
        "<|endoftext|>",
        byte_level(),
        words=("<tool>",),
        end="<|im_end|>",
    ),
    # The template writes no text between contents.
    "bare": Manner(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}",
        ("<s>", "</s>"),
        "</s>",
        byte_level(),
        bos="<s>",
    ),
}
