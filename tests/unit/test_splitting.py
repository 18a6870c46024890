"""A text that is tokenised part by part has the tokens of the whole text."""

import functools
from random import Random

import numpy as np
import pytest
from support.paths import ROOT
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from armt_dist.data.text.splitting import CONTEXT, REACH, split_text
from armt_dist.data.tokenizers import Encoder, byte_tokenizer, character_tokenizer, encode, wrap

PLAY = (ROOT / "benchmarks/data/plays/macbeth.txt").read_text()[:120_000]
WORDS = "你好,世界。 naïve — don't 12345 3.14\r\n\r\n\t\tfoo_bar  baz!!\n\n\n\U0001f389 e\u0301 \u00a0x <eos>\n"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(model, trainer, pre_tokenizer=None, normalizer=None, decoder=None):
    tokenizer = Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoder or decoders.ByteLevel()
    tokenizer.train_from_iterator([line + "\n" for line in (PLAY + WORDS).split("\n")], trainer)
    return wrap(tokenizer, eos_token="<eos>")


def bpe(pre_tokenizer):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False),
        pre_tokenizer,
    )


def llama2():
    """Train merges that know no words but by the mark before each, which is also put before a text."""
    marks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"], show_progress=False)
    learnt = trained(models.BPE(unk_token="<unk>"), trainer, pre_tokenizers.Metaspace(prepend_scheme="always"))
    backend = learnt.backend_tokenizer
    backend.normalizer = marks
    backend.pre_tokenizer = pre_tokenizers.Sequence([])
    return wrap(backend, eos_token="<eos>")


KINDS = {
    "bytes": byte_tokenizer,
    "gpt2": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama3": lambda: bpe(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
    "llama2": llama2,
    "unigram": lambda: trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=600, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
        pre_tokenizers.Metaspace(),
        normalizers.NFKC(),
    ),
    "wordpiece": lambda: trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=900, special_tokens=["<unk>"], show_progress=False),
        pre_tokenizers.BertPreTokenizer(),
        normalizers.BertNormalizer(),
    ),
}


@functools.cache
def tokenizer_of(kind):
    return KINDS[kind]()


@functools.cache
def encoder_of(kind):
    return Encoder(tokenizer_of(kind))


def in_parts(kind, text, part, piece):
    """Return the tokens of a text that comes in pieces, and the number of its parts."""
    encoder = encoder_of(kind)
    found = list(split_text((text[i : i + piece] for i in range(0, len(text), piece)), encoder, part))
    return np.concatenate([encoder([one.text])[0][one.skip :] for one in found]), len(found)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_whole_text(kind):
    for text in (PLAY, WORDS * 300, PLAY.replace("\n", "\n\n"), PLAY.replace("\n", " ")):
        whole = encode(tokenizer_of(kind), text)
        for part, piece in ((1000, 700), (3000, 10**6)):
            tokens, parts = in_parts(kind, text, part, piece)
            assert parts > (len(text) - REACH - CONTEXT) // (part + REACH) > 1
            assert np.array_equal(tokens, whole), (kind, part, len(tokens), len(whole))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_odd_texts(kind, seed):
    atoms = [
        "the",
        "king",
        " ",
        " ",
        "\n",
        "\r\n\n",
        "\t ",
        "  ",
        "'s",
        ".",
        "...",
        "12",
        "_x",
        "é",
        "你好",
        "e\u0301",
        "\U0001f389",
    ]
    text = "".join(Random(seed).choices(atoms, k=8000))
    tokens, parts = in_parts(kind, text, 100, 5000)
    assert parts > 100 and np.array_equal(tokens, encode(tokenizer_of(kind), text))


def test_a_text_without_spaces():
    text = PLAY.replace(" ", "").replace("\n", "")
    tokens, parts = in_parts("gpt2", text, 1000, 10**6)
    assert parts > 10
    whole = encode(tokenizer_of("gpt2"), text)
    assert "".join(tokenizer_of("gpt2").convert_ids_to_tokens(tokens)) == "".join(
        tokenizer_of("gpt2").convert_ids_to_tokens(whole)
    )
    assert abs(len(tokens) - len(whole)) <= parts, "more than a token more for each border"


def test_where_no_border_is_right_the_text_is_still_whole():
    def longest(texts):
        """One token for a text, so that no border is one of its tokens."""
        return [np.array([len(text)]) for text in texts]

    parts = list(split_text([PLAY], longest, 1000))
    assert "".join(part.text for part in parts) == PLAY and not any(part.skip for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_agrees_with_the_tokenizer(kind):
    texts = ["", "a", "Exeunt <eos> <unk>", WORDS, PLAY[:5000]]
    for text, ids in zip(texts, encoder_of(kind)(texts), strict=True):
        assert np.array_equal(ids, encode(tokenizer_of(kind), text)), text[:40]


def test_only_bytes_are_taken_for_bytes():
    assert encoder_of("bytes").bytes and not encoder_of("gpt2").bytes
    special = byte_tokenizer()
    special.add_tokens(["thou"])
    assert not Encoder(special).bytes
    assert encode(special, "thou").tolist() == Encoder(special)(["thou"])[0].tolist() == [259]
    assert not Encoder(character_tokenizer("abc$", {"eos_token": "$"})).bytes
    names = {Encoder(one).identity() for one in (byte_tokenizer(), special, tokenizer_of("gpt2"))}
    assert len(names) == 3
