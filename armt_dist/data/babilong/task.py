"""BABILong (arXiv 2402.10790): the facts of a bAbI story scattered in a long text, the question at the end.

    input   ... some sentences . Mary moved to the garden. more sentences ... Where is Mary? garden <eos>
    label   .   .    .         . .    .     .  .   .       .    .         ... .     .  garden <eos>  .

Facts keep their order. The text between them consists of consecutive sentences of the background, from a random place
on, and fills N = n * segment_tokens exactly. Only the answer and eos are scored (`.` is not).
"""

import re
from collections import Counter
from functools import cached_property, lru_cache, partial
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...config import ConfigError
from ..lengths import Measure, Unit, babilong_lengths
from ..sampling import SPLITS, Order, Split, row_words
from ..sections import BabilongConfig, PublishedConfig
from ..task import IGNORE, Batch, Difficulty, Run, Stateless, excerpt, real_tokens
from ..text.files import find_files, read_text
from ..tokenizers import WORD, decode, encode, leading_tokens, load_tokenizer, padding_id, word_tokenizer
from . import published
from . import stories as babi
from .stories import Story

FILLER = (
    "a about after again air all always among and around because before below between by clouds cold day down early "
    "evening every far field from great hill in it long morning much never night of old on over rain river road sea "
    "slowly small snow some stone summer sun that then they through tree under very was water were wind winter with"
)
FILLER_SENTENCES = 4000


class Background(NamedTuple):
    """Token ids int32 [n] of continuous text, and which of them end a sentence, bool [n]."""

    tokens: np.ndarray
    ends: np.ndarray
    begins: np.ndarray
    """Token after each end, int64: where a stretch may begin. Kept, because finding them reads the whole text."""

    @classmethod
    def of(cls, tokens: np.ndarray, ends: np.ndarray) -> "Background":
        """Return a text with the places where its sentences begin."""
        return cls(tokens, ends, np.flatnonzero(ends) + 1)


class Babilong(Stateless):
    """The task `babilong`; `n` counts segments."""

    measure: Measure = "accuracy"
    unit: Unit = "segments"

    def __init__(self, config: BabilongConfig, tokenizer: PreTrainedTokenizerBase, run: Run) -> None:
        self.segment_tokens = babilong_lengths(run.segment_tokens).segment_tokens
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"tokenizer={config.tokenizer}: has no eos token to end an answer; use another")
        self.config = config
        self.run = run
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.prefix = np.array(leading_tokens(tokenizer) if config.leading_tokens else [], dtype=np.int32)
        self.encode = lru_cache(maxsize=4096)(lambda text: encode(tokenizer, text))
        self.stories = load_stories(config, config.published) if config.published else None
        training = read_background(config.background, tokenizer)
        other = config.validation_background
        validation = training if other is None else read_background(other, tokenizer)
        self.background = {"train": training, "validation": validation}

    def sequence_tokens(self, n: int) -> int:
        """Return the tokens N of `n` segments. Raises ConfigError if the shortest story does not fit."""
        tokens = n * self.segment_tokens
        if self.stories is None and tokens < self.fewest_tokens:
            least = -(-self.fewest_tokens // self.segment_tokens)
            raise ConfigError(
                f"segments={n} of {self.segment_tokens} tokens cannot hold the facts and question of "
                f"{', '.join(self.config.tasks)}; use at least {least}"
            )
        return tokens

    @cached_property
    def fewest_tokens(self) -> int:
        """Tokens that are enough for the shortest story of each task, whatever its words."""
        fact, question = (max(len(self.encode(" " + s)) for s in babi.sentences() if s.endswith(end)) for end in ".?")
        word = max(len(self.encode(" " + s)) for s in (*babi.PLACES, *babi.THINGS, *babi.PEOPLE, *babi.GIVERS))
        count, size = max(babi.PUZZLES[task].fewest for task in self.config.tasks), self.segment_tokens
        if self.config.aligned and fact > size:
            raise ConfigError(
                f"segment_tokens={size}: with data.babilong.aligned a fact of {fact} tokens must fit in one"
            )
        if self.config.aligned:
            # No fact begins the segment of the prefix.
            return (count + bool(len(self.prefix))) * size + question + word + 1
        return len(self.prefix) + count * fact + question + word + 1

    def batch(self, split: Split, step: int, rows: range, difficulty: Difficulty) -> Batch:
        """Return `rows` of the global batch of `step`."""
        tokens = self.sequence_tokens(difficulty.draw(self.run.seed, split, step))
        input_ids = np.full((len(rows), tokens), padding_id(self.tokenizer), dtype=np.int64)
        labels = np.full((len(rows), tokens), IGNORE, dtype=np.int64)
        mask = np.ones((len(rows), tokens), dtype=np.int64)
        numbers, needed = [], []
        words = row_words(self.run.seed, split, step, rows, 1)[:, 0]
        for i, (row, word) in enumerate(zip(rows, words, strict=True)):
            random = Random(int(word))
            number, story, scored = self.choose(split, step, row, random, tokens)
            ids, answer, fact = self.lay_out(story, split, random, tokens)
            end = len(ids)
            input_ids[i, :end] = ids
            mask[i, end:] = 0
            if scored:
                labels[i, end - answer - 1 : end - 1] = ids[-answer:]
            numbers.append(number)
            needed.append(fact)
        attention_mask = None if mask.all() else torch.from_numpy(mask)
        parts = torch.from_numpy(input_ids), torch.from_numpy(labels), attention_mask
        return Batch(*parts, numbers, needed=torch.tensor(needed))

    def choose(self, split: Split, step: int, row: int, random: Random, tokens: int) -> tuple[int, Story, bool]:
        """Return the sample number of a row, its story, which fits in `tokens`, and whether it is scored."""
        if self.stories is not None:
            stories = self.stories[split]
            assert self.run.global_batch is not None, "published samples are finite: make_task needs global_batch"
            number, scored = Order(len(stories), self.run.seed, split, self.run.global_batch).number(step, row)
            return number, stories[number], scored
        task = random.choice(self.config.tasks)
        puzzle = babi.PUZZLES[task]
        count = random.randint(puzzle.fewest, max(puzzle.fewest, min(self.config.facts, puzzle.most)))
        while True:
            story = babi.tell(random, task, count)
            if self.fits(story, tokens):
                return row, story, True
            assert count > puzzle.fewest, f"{task} does not fit in {tokens} tokens"
            count -= 1

    def fits(self, story: Story, tokens: int) -> bool:
        """Return whether the story fits in `tokens`; if aligned, whether every fact gets its own segment."""
        *facts, question, answer = map(len, self.parts(story))
        before = tokens - question - answer - 1
        if self.config.aligned:
            return len(facts) + bool(len(self.prefix)) <= before // self.segment_tokens
        return len(self.prefix) + sum(facts) <= before

    def parts(self, story: Story) -> list[np.ndarray]:
        """Return the token ids of each fact, the question and the answer, without eos."""
        return [self.encode(" " + text) for text in (*story.facts, story.question, story.answer)]

    def lay_out(self, story: Story, split: Split, random: Random, tokens: int) -> tuple[np.ndarray, int, int]:
        """Return the token ids of a sample, the length of the answer with eos at its end, and `Batch.needed`."""
        *facts, question, answer = self.parts(story)
        answer = np.append(answer, self.tokenizer.eos_token_id)
        fill = tokens - len(self.prefix) - sum(map(len, facts)) - len(question) - len(answer)
        if fill < 0:
            raise ConfigError(
                f"segments={tokens // self.segment_tokens} of {self.segment_tokens} tokens: a published sample has "
                f"{tokens - fill}; use at least {-(-(tokens - fill) // self.segment_tokens)}"
            )
        # Published BABILong samples contain their background.
        if self.pads():
            fill = 0
        spread = (
            partial(align, segment_tokens=self.segment_tokens, taken=len(self.prefix))
            if self.config.aligned
            else scatter
        )
        parts = spread(facts, self.background[split], fill, random)
        needed = -1
        if story.supporting:
            # A stretch of the background comes before every fact.
            needed += len(self.prefix) + sum(map(len, parts[: 2 * max(story.supporting) + 2]))
        return np.concatenate([self.prefix, *parts, question, answer]), len(answer), needed

    def size(self, split: Split) -> int | None:
        """Return the number of published stories; None if they are generated."""
        return None if self.stories is None else len(self.stories[split])

    def pads(self) -> bool:
        """Return whether samples contain their background, so that nothing fills them up."""
        return self.config.published is not None and self.config.published.set == "RMT-team/babilong"

    def show(self, batch: Batch, row: int = 0) -> str:
        """Return the beginning and the end of one sample as text."""
        return excerpt(decode(self.tokenizer, real_tokens(batch, row)))


def load_stories(config: BabilongConfig, section: PublishedConfig) -> dict[Split, list[Story]]:
    """Load the published stories of all tasks by split. Raises ConfigError."""
    by_task = [published.load_published(section, task) for task in config.tasks]
    return {split: [story for stories in by_task for story in stories[split]] for split in SPLITS}


def scatter(facts: list[np.ndarray], background: Background, fill: int, random: Random) -> list[np.ndarray]:
    """Place the facts in order between the sentences of `fill` tokens of background; return the parts in order."""
    text, ends = stretch(background, fill, random)
    gaps = np.flatnonzero(np.append(True, ends))
    return weave(facts, text, sorted(random.choices(gaps.tolist(), k=len(facts))))


def align(
    facts: list[np.ndarray], background: Background, fill: int, random: Random, segment_tokens: int, taken: int
) -> list[np.ndarray]:
    """Place the facts in order at the beginnings of different segments, the last segment excepted.

    taken: tokens before the text; where there are any, the first segment has no fact.
    """
    text, _ = stretch(background, fill, random)
    # The segment of the question is not filled here, so it is not counted.
    segments = (taken + fill + sum(map(len, facts))) // segment_tokens
    begins = sorted(random.sample(range(bool(taken), segments), k=len(facts)))
    before = np.cumsum([taken, *map(len, facts)])[:-1]
    return weave(facts, text, (np.array(begins) * segment_tokens - before).tolist())


def stretch(background: Background, tokens: int, random: Random) -> tuple[np.ndarray, np.ndarray]:
    """Cut `tokens` tokens from a random sentence on out of the background, which repeats if it is shorter.

    Returns them and which of them end a sentence.
    """
    start = random.choice(background.begins)
    window = np.arange(start, start + tokens) % len(background.tokens)
    return background.tokens[window], background.ends[window]


def weave(facts: list[np.ndarray], text: np.ndarray, places: list[int]) -> list[np.ndarray]:
    """Insert every fact before the token of the text at its place; places ascend."""
    stretches = np.split(text, places)
    return [part for pair in zip(stretches, facts, strict=False) for part in pair] + stretches[len(facts) :]


def babilong_tokenizer(config: BabilongConfig) -> PreTrainedTokenizerBase:
    """Build the tokenizer of the section; `word` depends on the files alone, so all ranks build the same one."""
    if config.tokenizer != "word":
        return load_tokenizer(config.tokenizer)
    own = {word for sentence in babi.sentences() for word in re.findall(WORD, sentence)}
    counts = Counter(word for text in texts(config.background) for word in re.findall(WORD, text) if word not in own)
    common = sorted(counts, key=lambda word: (-counts[word], word))[: config.vocabulary]
    return word_tokenizer([*sorted(own), *common])


def read_background(files: str | list[str] | None, tokenizer: PreTrainedTokenizerBase) -> Background:
    """Tokenise the sentences of the background files; None: random sentences."""
    sentences = [
        " " + " ".join(s.split()) for text in texts(files) for s in re.findall(r"[^.!?]*[.!?]+|[^.!?]+$", text)
    ]
    ids = [encode(tokenizer, sentence) for sentence in sentences if len(sentence) > 1]
    ends = np.zeros(sum(map(len, ids)), dtype=bool)
    ends[np.cumsum([len(sentence) for sentence in ids]) - 1] = True
    return Background.of(np.concatenate(ids), ends)


def texts(files: str | list[str] | None) -> list[str]:
    """Read the background files; for None, make one text of random sentences, the same every time."""
    if files is not None:
        return [read_text(file.path, "background") for file in find_files(files, "background")]
    random = Random(0)
    sentences = (random.choices(FILLER.split(), k=random.randint(4, 9)) for _ in range(FILLER_SENTENCES))
    return [" ".join(" ".join(words).capitalize() + "." for words in sentences)]
