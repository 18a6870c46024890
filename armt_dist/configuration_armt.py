"""The configuration of an ARMT model: a Hugging Face base configuration plus memory and segments."""

from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from .backbone import family_of
from .memory import MEMORIES

MATHS = ("default", "paper")
ALIGNMENTS = ("left", "right", "center")


def build_base_config(model_type: str | None = None, **fields) -> PreTrainedConfig:
    """A base configuration from its fields. Raises ValueError in one line, whatever Hugging Face's own checks raise."""
    family_of(model_type)
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:
        # Their strict dataclasses raise several classes, some not ValueErrors, with messages of several lines.
        raise ValueError(f"base_config: {' '.join(str(error).split())}") from error


class ARMTConfig(PreTrainedConfig):
    """Configuration of `ARMTForCausalLM`.

    base_config: configuration (or dict with `model_type`) of the wrapped causal LM, of a family in
        `backbone.FAMILIES`. A sliding window that is narrower than a segment row is refused.
    segment_tokens: T, real tokens of a segment. num_mem_tokens: M, learned rows appended to every segment.
    d_mem, nu, n_heads, maths, use_denom, correction, gating: see `memory.AssociativeMemory`.
    freeze_mem: the memory projections W_m* get no gradient (as in the authors' code).
    wrap_pos (GPT-2): memory tokens take the last M rows of the position table instead of continuing the segment's
        positions; `base_config.n_positions` counts those rows.
    segment_alignment: where a length that T does not divide leaves the short segment: left (last), right (first),
        center (all of nearly equal length).

    Raises ValueError, in one line naming the field, for values that do not fit.
    """

    model_type = "armt"
    sub_configs = {"base_config": AutoConfig}

    base_config: dict | PreTrainedConfig | None = None
    memory_kind: str = "armt"
    segment_tokens: int = 512
    num_mem_tokens: int = 16
    d_mem: int = 64
    nu: int = 3
    n_heads: int = 1
    maths: str = "default"
    use_denom: bool = True
    correction: bool = True
    gating: bool = False
    freeze_mem: bool = False
    wrap_pos: bool = False
    segment_alignment: str = "left"

    def __post_init__(self, **kwargs):
        if self.base_config is None:
            self.base_config = {"model_type": "gpt2"}
        if isinstance(self.base_config, dict):
            self.base_config = build_base_config(**self.base_config)
        if not isinstance(self.base_config, PreTrainedConfig):
            raise ValueError(f"base_config={self.base_config!r}: must be a configuration or a dict with model_type")
        # Copied up so that generic Hugging Face code finds them where it looks.
        self.vocab_size = self.base_config.vocab_size
        self.hidden_size = self.base_config.hidden_size
        self.num_hidden_layers = self.base_config.num_hidden_layers
        self.tie_word_embeddings = self.base_config.tie_word_embeddings
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.base_config, name, None))
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raises ValueError for the first field that does not fit."""
        for name, kind in ARMTConfig.__annotations__.items():
            value = getattr(self, name)
            # type() rather than isinstance: True is no count.
            if isinstance(kind, type) and type(value) is not kind:
                raise ValueError(f"{name}={value!r}: must be of type {kind.__name__}")
        for name in ("segment_tokens", "num_mem_tokens", "d_mem", "nu", "n_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name, known in (("memory_kind", MEMORIES), ("maths", MATHS), ("segment_alignment", ALIGNMENTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)}: one of {', '.join(known)}")
        self.check_base()
        for name, width in (("d_mem", self.d_mem), ("hidden_size", self.hidden_size)):
            if width % self.n_heads:
                raise ValueError(f"n_heads={self.n_heads} does not divide {name}={width}")
        if self.maths == "paper" and self.n_heads != 1:
            raise ValueError(f"n_heads={self.n_heads}: maths=paper has one memory head; set n_heads=1")
        self.check_positions()
        self.check_window()

    def check_base(self) -> None:
        """What would only fail, or fail to matter, once the base model runs."""
        base = self.base_config
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
        """A segment row must fit into a learned position table."""
        learned = bool(family_of(self.base_config.model_type).positions)
        if self.wrap_pos and not learned:
            raise ValueError(f"wrap_pos=true: {self.base_config.model_type} has no position table; set wrap_pos=false")
        row = self.segment_tokens + self.num_mem_tokens
        rows = self.base_config.max_position_embeddings
        if learned and row > rows:
            raise ValueError(
                f"segment_tokens={self.segment_tokens} + num_mem_tokens={self.num_mem_tokens} = {row} positions do not "
                f"fit into the base model's {rows}; try segment_tokens={rows - self.num_mem_tokens}"
            )

    def check_window(self) -> None:
        """Segments attend in full: a sliding window must be off or at least as wide as a segment row."""
        window = getattr(self.base_config, "sliding_window", None)
        kinds = getattr(self.base_config, "layer_types", None) or ["sliding_attention"]
        row = self.segment_tokens + self.num_mem_tokens
        if window is not None and "sliding_attention" in kinds and window < row:
            raise ValueError(
                f"base_config.sliding_window={window}: narrower than a segment of {row} positions; set it to null, or "
                f"try segment_tokens={max(1, window - self.num_mem_tokens)}"
            )
