"""The configuration of an ARMT model: a Hugging Face base configuration plus memory and segments."""

from typing import get_args

from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from .backbone import family_of
from .fields import LEAST, ARMTFields, check_decay
from .memory import OPTIONS, PlainMemory
from .memory_kind import LAST_LAYER, Memory, MemoryKind
from .rmt import RecurrentMemory, RecurrentWindow
from .transformer_xl import TransformerXL
from .windowed_memory import WindowedMemory

# By `memory_kind`.
MEMORIES = {
    "armt": MemoryKind(
        PlainMemory,
        ("sink", "sliding_window", "detach_window", "freeze_mem", "wrap_pos", "state_decay"),
        windowed=WindowedMemory,
    ),
    "rmt": MemoryKind(
        RecurrentMemory,
        ("k2", "sliding_window", "detach_window", "wrap_pos"),
        windowed=RecurrentWindow,
        whole_window=True,
    ),
    "transformer_xl": MemoryKind(
        TransformerXL, ("sliding_window",), refused_fields=("d_mem", *OPTIONS), window_only=True
    ),
}
MEMORY_TOKENS = 16
"""`num_mem_tokens` where it is null and the kind has memory tokens."""
MATHS = ("default", "paper")
ALIGNMENTS = ("left", "right", "center")
WINDOW_POSITIONS = ("relative", "restart")
# The longest input as other tools read it (transformers, evaluation harnesses, servers); ARMT has no limit.
UNLIMITED = 2**31 - 1
KNOWN = {
    "memory_kind": MEMORIES,
    "maths": MATHS,
    "segment_alignment": ALIGNMENTS,
    "window_positions": WINDOW_POSITIONS,
}


def build_base_config(model_type: str | None = None, **fields) -> PreTrainedConfig:
    """Build a base configuration. Raises ValueError in one line, whatever Hugging Face's own checks raise."""
    family_of(model_type)
    try:
        return AutoConfig.for_model(str(model_type), **fields)
    except Exception as error:
        # The strict dataclasses raise several classes, some not ValueErrors, with messages of several lines.
        raise ValueError(f"base_config: {' '.join(str(error).split())}") from error


class ARMTConfig(ARMTFields, PreTrainedConfig):
    """Configuration of `ARMTForCausalLM`: the base model's, and `ARMTFields`.

    Raises ValueError, in one line naming the field, for values that do not fit.
    """

    model_type = "armt"
    sub_configs = {"base_config": AutoConfig}

    base_config: dict | PreTrainedConfig | None = None
    """Configuration (or dict with `model_type`) of the wrapped causal LM, of a family in `backbone.FAMILIES`."""

    def __post_init__(self, **kwargs):
        """Make a configuration of `base_config`, copy up what others look for here, and check the fields."""
        if self.base_config is None:
            self.base_config = {"model_type": "gpt2"}
        if isinstance(self.base_config, dict):
            self.base_config = build_base_config(**self.base_config)
        if not isinstance(self.base_config, PreTrainedConfig):
            raise ValueError(f"base_config={self.base_config!r}: must be a configuration or a dict with model_type")
        # Copied up, because generic Hugging Face code looks for them here.
        self.vocab_size = self.base_config.vocab_size
        self.hidden_size = self.base_config.hidden_size
        self.num_hidden_layers = self.base_config.num_hidden_layers
        self.tie_word_embeddings = self.base_config.tie_word_embeddings
        self.max_position_embeddings = UNLIMITED
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.base_config, name, None))
        super().__post_init__(**kwargs)
        self.check_values()
        self.fill_in()
        self.check()

    @property
    def base(self) -> PreTrainedConfig:
        """`base_config`, which is a configuration once this one is built."""
        assert isinstance(self.base_config, PreTrainedConfig), f"base_config={self.base_config!r} is no configuration"
        return self.base_config

    @property
    def memory_class(self) -> type[Memory]:
        """The memory that each layer owns."""
        return self.kind.windowed if self.sliding_window and self.kind.windowed else self.kind.memory

    @property
    def head_rows(self) -> int:
        """Rows of a segment before its tokens: the memory rows if the last layer hands them on, else the sinks."""
        return self.memory_rows if LAST_LAYER in self.kind.arrows else self.sink

    @property
    def memory_rows(self) -> int:
        """Rows of a segment behind its tokens: `num_mem_tokens`, which is a count once this one is built."""
        assert self.num_mem_tokens is not None, "num_mem_tokens is null"
        return self.num_mem_tokens

    @property
    def seeing_all(self) -> int:
        """Memory rows behind the tokens that see one another and the whole window, padding included."""
        return self.memory_rows if self.sliding_window and not self.kind.whole_window else 0

    @property
    def other_rows(self) -> int:
        """Rows of a segment that are not tokens."""
        return self.head_rows + self.memory_rows

    @property
    def kind(self) -> MemoryKind:
        """The row of `memory_kind`."""
        return MEMORIES[self.memory_kind]

    def fill_in(self) -> None:
        """Put the values that a kind of memory has by default in the place of null."""
        if self.num_mem_tokens is None:
            self.num_mem_tokens = 0 if self.kind.window_only else MEMORY_TOKENS
        if self.sliding_window is None and self.kind.window_only:
            self.sliding_window = self.segment_tokens

    def check(self) -> None:
        """Raise ValueError for the first field that does not fit."""
        self.check_own_fields()
        self.check_memory_tokens()
        check_decay(self.state_decay)
        self.check_base()
        for name, width in (("d_mem", self.d_mem), ("hidden_size", self.hidden_size)):
            if width % self.n_heads:
                raise ValueError(f"n_heads={self.n_heads} does not divide {name}={width}")
        if self.maths == "paper" and self.n_heads != 1:
            raise ValueError(f"n_heads={self.n_heads}: maths=paper has one memory head; set n_heads=1")
        self.check_positions()
        self.check_window()

    def check_values(self) -> None:
        """Check each field by itself: its type, its least value, its known values."""
        for name, kind in ARMTFields.__annotations__.items():
            value, kinds = getattr(self, name), get_args(kind) or (kind,)
            # type() rather than isinstance: True is not a count.
            if type(value) not in kinds:
                raise ValueError(f"{name}={value!r}: must be of type {kinds[0].__name__}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        for name, known in KNOWN.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)}: one of {', '.join(known)}")

    def check_own_fields(self) -> None:
        """Refuse fields that only other kinds of memory read."""
        others = {name for kind in MEMORIES.values() for name in kind.own_fields} - {*self.kind.own_fields}
        # In the order of the fields, so that the message does not vary.
        for name in (name for name in ARMTFields.__annotations__ if name in others | {*self.kind.refused_fields}):
            if getattr(self, name) != getattr(ARMTFields, name):
                raise ValueError(
                    f"{name}={getattr(self, name)}: means nothing to memory_kind={self.memory_kind}; leave it out"
                )

    def check_memory_tokens(self) -> None:
        """Refuse memory tokens under a kind that has none, and their absence under one that needs them."""
        if self.kind.window_only and self.num_mem_tokens:
            raise ValueError(
                f"num_mem_tokens={self.num_mem_tokens}: memory_kind={self.memory_kind} has no memory tokens; leave it "
                "out"
            )
        if not self.kind.window_only and not self.num_mem_tokens:
            raise ValueError(
                f"num_mem_tokens=0: memory_kind={self.memory_kind} writes at its memory tokens; set at least 1"
            )

    def check_base(self) -> None:
        """Refuse what would fail, or have no effect, only once the base model runs."""
        base = self.base
        family_of(base.model_type)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            if getattr(base, name, 1) < 1:
                raise ValueError(f"base_config.{name}={getattr(base, name)}: must be at least 1")
        heads = base.num_attention_heads
        if base.hidden_size % heads:
            raise ValueError(f"base_config.num_attention_heads={heads} does not divide hidden_size={base.hidden_size}")
        if heads % getattr(base, "num_key_value_heads", heads):
            raise ValueError(
                f"base_config.num_key_value_heads={base.num_key_value_heads} does not divide {heads} heads"
            )
        activation = getattr(base, "hidden_act", None) or getattr(base, "activation_function", None)
        if activation not in ACT2FN:
            raise ValueError(f"base_config.hidden_act={activation}: no such activation; for example silu or gelu_new")

    def check_positions(self) -> None:
        """Refuse segments whose rows do not fit into a learned position table."""
        learned = bool(family_of(self.base.model_type).positions)
        if self.wrap_pos and not learned:
            raise ValueError(f"wrap_pos=true: {self.base.model_type} has no position table; set wrap_pos=false")
        row = self.segment_tokens + self.other_rows
        rows = self.base.max_position_embeddings
        if learned and row > rows:
            others = {"sink": self.sink, "num_mem_tokens": self.num_mem_tokens}
            if self.head_rows > self.sink:
                others = {"2 x num_mem_tokens": self.other_rows}
            named = "".join(f" + {name}={count}" for name, count in others.items() if count)
            raise ValueError(
                f"segment_tokens={self.segment_tokens}{named} = {row} positions do not "
                f"fit into the base model's {rows}; try segment_tokens={rows - self.other_rows}"
            )

    def check_window(self) -> None:
        """Refuse a window beyond one segment, and one of the base model that is narrower than a segment's row."""
        if self.sliding_window is not None and self.sliding_window > self.segment_tokens:
            raise ValueError(
                f"sliding_window={self.sliding_window}: only the segment before is kept; at most "
                f"segment_tokens={self.segment_tokens}"
            )
        if self.window_positions == "restart" and self.sliding_window not in (None, self.segment_tokens):
            raise ValueError(
                f"window_positions=restart: needs the whole segment; set sliding_window={self.segment_tokens}"
            )
        window = getattr(self.base, "sliding_window", None)
        kinds = getattr(self.base, "layer_types", None) or ["sliding_attention"]
        row = self.segment_tokens + self.other_rows
        if window is not None and "sliding_attention" in kinds and window < row:
            raise ValueError(
                f"base_config.sliding_window={window}: narrower than a segment of {row} positions; set it to null, or "
                f"try segment_tokens={max(1, window - self.other_rows)}"
            )
