"""Tokenizers of the tasks, each an ordinary Hugging Face fast tokenizer.

`save_pretrained` writes a folder that AutoTokenizer reads without network and without this package.
"""

import json
from collections.abc import Sequence

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..config import ConfigError, one_line
from ..model.configuration_armt import UNLIMITED, ARMTConfig

# AutoTokenizer reads the configuration of a folder first. Unless the model type is registered, it would ask whether to
# run the code in the folder of an exported model.
AutoConfig.register(ARMTConfig.model_type, ARMTConfig, exist_ok=True)
# A word or a punctuation mark.
WORD = r"\w+|[^\w\s]"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer `byte`, or one by Hugging Face name or folder. Raises ConfigError if there is none."""
    if name == "byte":
        return byte_tokenizer()
    try:
        # Not the base model's limit: tools that read the exported tokenizer would cut the text.
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, model_max_length=UNLIMITED)
    except (OSError, ValueError, KeyError) as error:
        reason = one_line(error, limit=160)
        raise ConfigError(f"tokenizer={name}: cannot be loaded ({reason}); give byte, a folder or a name") from None


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of UTF-8 bytes: tokens 0..255, then <bos> 256, <eos> 257, <pad> 258.

    It is a byte-level BPE without merges, so decode(encode(text)) == text for any text.
    """
    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrap(tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def character_tokenizer(characters: str, special: dict[str, str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per character, ids in order. It ignores white space and rejects others.

    special: roles such as ``eos_token``, each with one of the characters.
    """
    tokenizer = Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.decoder = decoders.Fuse()
    return wrap(tokenizer, **special)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer for a small vocabulary: <pad> 0, <eos> 1, <unk> 2, then the given words and punctuation."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    return wrap(tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    """Turn a `tokenizers` tokenizer into a Hugging Face one that keeps white space when it decodes."""
    tokens = {role: AddedToken(token, special=True, normalized=False) for role, token in special.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=UNLIMITED, **tokens
    )


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Return the token ids int32 [n] of plain text. A special token spelled out in the text stays text."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return np.array(ids, dtype=np.int32)


class Encoder:
    """A tokenizer for much text: its results are those of `encode`, on all cores and in a fraction of the memory."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        # A copy, because what is set here would change the tokenizer.
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None
        if self.backend is not None:
            self.backend.no_padding()
            self.backend.no_truncation()
            self.backend.encode_special_tokens = True
        self.bytes = self.backend is not None and spells_bytes(self.backend)

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids [n] of each text."""
        if self.bytes:
            return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
        if self.backend is None:
            return [encode(self.tokenizer, text) for text in texts]
        # The library's own threads share the texts. It leaves out the places of tokens in the text, which take longest.
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def identity(self) -> str:
        """Return a text that differs between tokenizers that give different tokens."""
        if self.backend is not None:
            return self.backend.to_str()
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return f"{type(self.tokenizer).__name__} {self.tokenizer.init_kwargs!r} {vocabulary}"


def spells_bytes(backend: Tokenizer) -> bool:
    """Return whether the tokens of a text are its bytes in UTF-8, as those of `byte_tokenizer` are."""
    if backend.get_vocab_size(with_added_tokens=False) != 256:
        return False
    found, known = (json.loads(one.to_str()) for one in (backend, byte_tokenizer().backend_tokenizer))
    # Special tokens in a text stay text; others would not.
    return all(token["special"] for token in found["added_tokens"]) and all(
        found[part] == known[part] for part in ("normalizer", "pre_tokenizer", "model")
    )


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer puts before a text, such as BOS; empty for many tokenizers."""
    plain, whole = (list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (False, True))
    starts = range(len(whole) - len(plain) + 1)
    return whole[: next((i for i in starts if whole[i : i + len(plain)] == plain), 0)]


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int] | Tensor, skip_special_tokens: bool = False) -> str:
    """Return the text of the token ids [n]."""
    text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str), f"one sequence of ids was decoded to {type(text).__name__}"
    return text


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills up short rows: pad, else eos, else 0. It is masked."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if isinstance(i, int))
