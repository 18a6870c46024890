"""The data section of the run configuration: which task, and its settings. Needs neither torch nor transformers."""

import math
import re
import string
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..config import ConfigError, Section, Seed, validate

ALPHABET = string.digits + string.ascii_lowercase + string.ascii_uppercase
# Strings are drawn as one 64-bit number modulo their count. Up to this count the bias is below 2^-32.
MAX_STRINGS = 2**32
# Of a vocabulary of words; each is a row of the embedding.
MAX_WORDS = 10**6


class RetrievalConfig(Section):
    """Keys and values are strings of `key_length` and `value_length` symbols."""

    key_length: Annotated[int, Field(ge=1)] = 1
    """Symbols of a key. Example: 3"""
    value_length: Annotated[int, Field(ge=1)] = 1
    """Symbols of a value. Example: 2"""
    symbols: Annotated[int, Field(ge=2, le=len(ALPHABET))] = 16
    """Number of different symbols. Example: 32"""

    @model_validator(mode="after")
    def strings_can_be_numbered(self) -> "RetrievalConfig":
        """Check that there are not too many strings."""
        for name in ("key_length", "value_length"):
            # Not the power itself, which may have any number of digits.
            if getattr(self, name) * math.log2(self.symbols) > math.log2(MAX_STRINGS):
                raise ValueError(
                    f"{name}={getattr(self, name)} of {self.symbols} symbols: more than 2^32 strings; shorten it"
                )
        return self


# Builders of the `datasets` library that read text from plain files, and all others that come with it: pandas unpickles
# what it reads, and none of the rest is for text. A test compares them with the installed version's.
BUILDERS = ("arrow", "csv", "json", "parquet", "text")
OTHER_BUILDERS = (
    *("audiofolder", "conll", "eval", "fasta", "fastq", "genbank", "harbor", "hdf5", "iceberg", "imagefolder", "lance"),
    *("meshfolder", "mmcif", "niftifolder", "pandas", "pdb", "pdffolder", "tsfile", "videofolder", "vortex"),
    *("webdataset", "xml", "cache", "generator", "pickle", "spark", "sql"),
)


class HubDataset(Section):
    """Arguments of `datasets.load_dataset`; `name` json, text, csv, parquet or arrow with `data_files` reads files."""

    name: str
    """Name of the data set on the Hugging Face Hub, or arrow, csv, json, parquet or text. Example: deepmind/pg19"""
    config: str | None = None
    """Configuration of the data set. Example: wikitext-103-raw-v1"""
    data_files: str | list[str] | None = None
    """Local files for name json, text or parquet. Example: books/*.jsonl"""
    split: str = "train"
    """Split to train on. Example: train[:90%]"""
    validation_split: str | None = None
    """Split to validate on; null: none. Example: validation"""

    @model_validator(mode="after")
    def reads_plain_files(self) -> "HubDataset":
        """Refuse builders that are not for text, some of which run what they read."""
        if self.name in OTHER_BUILDERS:
            raise ValueError(
                f"dataset.name={self.name}: not for text; use one of {', '.join(BUILDERS)}, or a data set on the Hub"
            )
        return self


class DatasetConfig(HubDataset):
    """Arguments of `datasets.load_dataset`; `name` json, text, csv, parquet or arrow with `data_files` reads files."""

    column: str = "text"
    """Column that holds the text. Example: content"""
    streaming: bool = True
    """Whether the split is read in order while training; false: all of it is tokenised into memory and shuffled."""
    validation_texts: Annotated[int, Field(ge=1)] = 64
    """Texts read from the beginning of the validation split. Example: 128"""


class TextConfig(Section):
    """Give `files` or `dataset`. Each entry of `files` is a file, a folder or a glob."""

    files: str | list[str] | None = None
    """UTF-8 text files to train on: a file, a folder, a glob, or a list of them. Example: benchmarks/data/plays"""
    validation_files: str | list[str] | None = None
    """Files to validate on; they are left out of `files`. Example: benchmarks/data/plays/macbeth.txt"""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of `files` held out for validation where `validation_files` is null; 0: no validation. Example: 0.05"""
    dataset: DatasetConfig | None = None
    """Data set to read in place of `files`. Example: {name: deepmind/pg19}"""
    pack: bool = False
    """Whether texts are joined before they are cut into sequences; for data sets of short rows such as WikiText."""
    cross_documents: bool = False
    """Whether texts that were joined by `pack` see each other; false: attention and memory start anew with each."""
    tokenizer: str = "byte"
    """Tokenizer: byte, or the name or folder of a Hugging Face tokenizer. Example: gpt2"""
    leading_tokens: bool = True
    """Whether a text begins with the tokens that the tokenizer puts before a text, for example the BOS of Llama."""
    sequence_tokens: Annotated[int, Field(ge=2)] = 8192
    """Tokens of the longest sequence, a multiple of model.segment_tokens. Example: 131072"""
    min_tokens: Annotated[int, Field(ge=2)] = 2
    """Fewest tokens of a piece of text; shorter ones, such as the ends of most texts, are left out. Example: 16000"""
    cache: str | None = None
    """Folder of tokenised texts, shared by ranks and runs; null: in the Hugging Face cache. Example: /scratch/tokens"""

    @model_validator(mode="after")
    def one_source(self) -> "TextConfig":
        """Check that there is one source, with its own validation data."""
        if (self.files is None) == (self.dataset is None):
            raise ValueError("data.text.files, data.text.dataset: give exactly one of them")
        if self.min_tokens > self.sequence_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens}: no piece has more than sequence_tokens={self.sequence_tokens}; lower it"
            )
        if self.dataset is not None and self.validation_files is not None:
            raise ValueError("validation_files belongs to text.files; with a dataset set dataset.validation_split")
        return self


class InstructionsConfig(Section):
    """Give `files` or `dataset`. Rows are texts, prompts with completions, chats, or questions on documents."""

    files: str | list[str] | None = None
    """JSON lines (.jsonl, .json) or Parquet: a file, a folder, a glob, or a list of them. Example: chats.jsonl"""
    validation_files: str | list[str] | None = None
    """Files to validate on; they are left out of `files`. Example: held_out.jsonl"""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of the rows held out for validation where it has no files or split of its own; 0: none. Example: 0.05"""
    dataset: HubDataset | None = None
    """Data set to read in place of `files`. Example: {name: HuggingFaceH4/ultrachat_200k, split: train_sft}"""
    tokenizer: str = "byte"
    """Tokenizer: byte, or the name or folder of a Hugging Face tokenizer; chats need its template. Example: gpt2"""
    leading_tokens: bool = True
    """Whether a row that is no chat begins with the tokens that the tokenizer puts before a text, such as BOS."""
    sequence_tokens: Annotated[int, Field(ge=2)] = 8192
    """Tokens of the longest sample, a multiple of model.segment_tokens. Example: 131072"""
    too_long: Literal["cut", "skip", "error"] = "cut"
    """What becomes of longer rows: cut leaves out the beginning of their context. Texts are divided. Example: skip"""
    cache: str | None = None
    """Folder of tokenised rows, shared by ranks and runs; null: in the Hugging Face cache. Example: /scratch/tokens"""

    @model_validator(mode="after")
    def one_source(self) -> "InstructionsConfig":
        """Check that there is one source, with its own validation data."""
        if (self.files is None) == (self.dataset is None):
            raise ValueError("data.instructions.files, data.instructions.dataset: give exactly one of them")
        if self.dataset is not None and self.validation_files is not None:
            raise ValueError("validation_files belongs to files; with a dataset set dataset.validation_split")
        return self


class PublishedConfig(Section):
    """Which set; `files` are copies of it on this machine (JSON), with ``{task}`` in the name for the task."""

    set: Literal["RMT-team/babilong", "facebook/babi_qa"]
    """Name of the set on the Hugging Face Hub. Example: facebook/babi_qa"""
    length: str = "0k"
    """Configuration of RMT-team/babilong: 0k (facts alone), 1k, 2k, 4k, ... 1M tokens. Example: 4k"""
    files: str | None = None
    """Local JSON copies, `{task}` in place of the task, `{split}` of train or validation. Example: babi/{task}.jsonl"""
    validation_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Fraction of the rows held out for validation where the set has no split of its own; 1: evaluation only."""

    @model_validator(mode="after")
    def names_in_braces_are_known(self) -> "PublishedConfig":
        """Check that files have no other name in braces, which would be taken for a part of the file's name."""
        for name in re.findall(r"\{(.*?)\}", self.files or ""):
            if name not in ("task", "split"):
                raise ValueError(f"files={self.files}: {{{name}}} stands for nothing; write {{task}} or {{split}}")
        return self


class BabilongConfig(Section):
    """Stories of the given `tasks`, hidden in text. Evaluate one task at a time."""

    tasks: Annotated[list[Literal["qa1", "qa2", "qa3", "qa4", "qa5"]], Field(min_length=1)] = ["qa1"]
    """bAbI tasks, drawn with equal probability. Example: [qa1, qa2]"""
    facts: Annotated[int, Field(ge=2, le=1000)] = 10
    """Largest number of facts in a generated story. Example: 4"""
    aligned: bool = False
    """Whether every fact begins a segment of its own, which makes facts easier to learn from scratch."""
    background: str | list[str] | None = None
    """Text files around the facts, as data.text.files; null: random sentences. Example: benchmarks/data/plays"""
    validation_background: str | list[str] | None = None
    """Text files around the facts in validation; null: those of training. Example: books/held_out"""
    tokenizer: str = "word"
    """Tokenizer: word (words of bAbI and the background), byte, or a Hugging Face name or folder. Example: gpt2"""
    vocabulary: Annotated[int, Field(ge=0, le=MAX_WORDS)] = 1000
    """Most frequent words of the background that tokenizer=word knows. Example: 5000"""
    leading_tokens: bool = True
    """Whether a sample begins with the tokens that the tokenizer puts before a text, for example the BOS of Llama."""
    published: PublishedConfig | None = None
    """Published question set to use in place of generated stories. Example: {set: facebook/babi_qa}"""

    @model_validator(mode="after")
    def published_stories_are_as_they_are(self) -> "BabilongConfig":
        """Check that published stories are not aligned."""
        if self.aligned and self.published:
            raise ValueError(
                "aligned=True: published stories are too long for one segment per fact; remove aligned or published"
            )
        return self


class MixtureConfig(Section):
    """Every row is drawn from one of the parts, in proportion to their weights."""

    parts: Annotated[list[dict[str, Any]], Field(min_length=2)]
    """Data sections, with `weight` (1 if left out). Example: [{weight: 3, task: text, text: {files: plays}}, {}]"""

    @model_validator(mode="after")
    def parts_are_sections(self) -> "MixtureConfig":
        """Check every part."""
        for i, part in enumerate(self.parts):
            weight = part.get("weight", 1)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise ValueError(f"data.mixture.parts.{i}.weight={weight}: expected a number above 0")
            for key in ("seed", "carry_memory"):
                if key in part:
                    raise ValueError(f"data.mixture.parts.{i}.{key}: belongs to the data section; remove it here")
            if part.get("task") == "mixture":
                raise ValueError(f"data.mixture.parts.{i}.task=mixture: write its parts here")
            try:
                section = self.section(i).section
            except ConfigError as error:
                raise ValueError(f"data.mixture.parts.{i}: {error}") from None
            if isinstance(section, TextConfig) and section.dataset and section.dataset.streaming:
                raise ValueError(
                    f"data.mixture.parts.{i}: a stream is read in one order; set text.dataset.streaming=false"
                )
        return self

    def section(self, i: int) -> "DataConfig":
        """Return part `i`. Raises ConfigError."""
        return validate(DataConfig, {key: value for key, value in self.parts[i].items() if key != "weight"})

    @property
    def sections(self) -> list["DataConfig"]:
        """The parts."""
        return [self.section(i) for i in range(len(self.parts))]

    @property
    def weights(self) -> list[float]:
        """Of the parts."""
        return [float(part.get("weight", 1)) for part in self.parts]


class DataConfig(Section):
    """`task` and its own section; the section of another task is an error."""

    task: str = "rewrite"
    """Task: rewrite (retrieval, repeated keys), remember (unique), text, babilong, instructions, mixture, or an
    extension's. Example: text"""
    seed: Seed = 42
    """Seed of samples and their order. Example: 1"""
    carry_memory: bool = False
    """Whether the rows of a step continue the texts of the step before with their memory (task text)."""
    retrieval: RetrievalConfig | None = None
    """Settings of the tasks rewrite and remember. Example: {key_length: 2, symbols: 16}"""
    text: TextConfig | None = None
    """Settings of the task text. Example: {files: benchmarks/data/plays}"""
    babilong: BabilongConfig | None = None
    """Settings of the task babilong. Example: {tasks: [qa1], facts: 4}"""
    instructions: InstructionsConfig | None = None
    """Settings of the task instructions. Example: {files: chats.jsonl, tokenizer: my_tokenizer}"""
    mixture: MixtureConfig | None = None
    """Settings of the task mixture. Example: {parts: [{task: rewrite}, {task: remember}]}"""
    options: dict[str, Any] | None = None
    """Settings of a task that an extension registers. Example: {length: 8}"""

    @model_validator(mode="after")
    def sections_fit_the_task(self) -> "DataConfig":
        """Check that there is no section of another task."""
        if self.task not in SCHEMAS:
            raise ValueError(
                f"data.task={self.task}: no such task; one of {', '.join(SCHEMAS)}, or name the module that registers "
                "it in extensions"
            )
        if self.carry_memory:
            self.check_continuation()
        own = field_of(self.task)
        for section in sorted({*FIELDS.values(), "options"}):
            if section != own and getattr(self, section) is not None:
                raise ValueError(f"{section} does not belong to task={self.task}; remove it or change task")
        return self

    def check_continuation(self) -> None:
        """Raise ValueError where rows cannot continue those of the step before."""
        if self.task != "text":
            raise ValueError(
                f"data.carry_memory=true: samples of data.task={self.task} have no continuation; only those of text do"
            )
        text = self.text
        if text and text.dataset and text.dataset.streaming:
            raise ValueError(
                "data.carry_memory=true: a stream is read in one order, and every row needs texts of its own; set "
                "text.dataset.streaming=false"
            )
        if text and text.min_tokens > TextConfig.model_fields["min_tokens"].default:
            raise ValueError(
                f"text.min_tokens={text.min_tokens}: has no effect with data.carry_memory=true, which reads every text"
            )

    @property
    def parts(self) -> list["DataConfig"]:
        """The parts of a mixture; of any other task, this section alone."""
        return self.section.sections if isinstance(self.section, MixtureConfig) else [self]

    @property
    def section(self) -> Section:
        """The section of the task, with its defaults if it was left out."""
        given = getattr(self, field_of(self.task))
        return given if isinstance(given, Section) else validate(SCHEMAS[self.task], given or {})


# The section that configures each task; extensions add theirs.
SCHEMAS: dict[str, type[Section]] = {
    "rewrite": RetrievalConfig,
    "remember": RetrievalConfig,
    "text": TextConfig,
    "babilong": BabilongConfig,
    "instructions": InstructionsConfig,
    "mixture": MixtureConfig,
}
FIELDS: dict[type[Section], str] = {
    RetrievalConfig: "retrieval",
    TextConfig: "text",
    BabilongConfig: "babilong",
    InstructionsConfig: "instructions",
    MixtureConfig: "mixture",
}


def field_of(task: str) -> str:
    """Return the field of the data section that configures a task: `options` for one of an extension."""
    return FIELDS.get(SCHEMAS[task], "options")
