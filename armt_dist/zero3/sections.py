"""The model section of the run configuration. Needs neither torch nor transformers."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, create_model, model_validator

from ..config import Positive, Section
from ..model.fields import ARMTFields, check_decay

Std = Annotated[float, Field(gt=0)]


class InitConfig(Section):
    """Standard deviations of a random base model; what is left out is the Hugging Face default."""

    linear_std: Std | None = None
    """Standard deviation of the decoder layers' linear weights and the head; biases become zero. Example: 0.125"""
    embedding_std: Std | None = None
    """Standard deviation of the token embeddings. Example: 0.1"""
    position_std: Std | None = None
    """Standard deviation of a learned position table (GPT-2). Example: 0.02"""
    memory_std: Std | None = None
    """Standard deviation of memory rows and sinks; null: that of the token embeddings. Example: 0.1"""


class OptimizerGroup(Section):
    """Parameters with a rate or a weight decay of their own. A parameter is in the first group that matches it."""

    match: Annotated[list[str], Field(min_length=1)]
    """Patterns of names of an export, where `*` stands for anything, or `base`, all but the memory.
    Example: ['*.memory.*']"""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate where the others have ds_config.optimizer.params.lr; it follows the curriculum. Example: 2.0e-3"""
    lr_scale: Annotated[float, Field(gt=0)] | None = None
    """Factor of the others' learning rate, in place of `lr`; null: 1. Example: 10"""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay; null: the optimizer's, and none for parameters of one dimension and memory rows. Example: 0.01"""

    @model_validator(mode="after")
    def one_rate(self) -> Self:
        """Refuse two rates."""
        if self.lr is not None and self.lr_scale is not None:
            raise ValueError(f"train.optimizer_groups lr={self.lr}, lr_scale={self.lr_scale}: give one of them")
        return self


class LoraSection(Section):
    """Low-rank adapters on linear maps of the base, which is frozen; the memory is trained. Needs the package peft."""

    r: Positive = 16
    """Rank of an adapter. Example: 8"""
    alpha: Annotated[int, Field(gt=0)] = 32
    """An adapter's output is multiplied by alpha / r. Example: 16"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of an adapter's input; above 0, cells are not recorded as CUDA graphs. Example: 0.05"""
    targets: Annotated[list[str], Field(min_length=1)]
    """Names of linear maps of the base's layers, or their ends. Example: [q_proj, v_proj]"""


class BaseSection(Section):
    """Where the base model comes from; the other fields of the model section are those of ARMTFields."""

    base: str | None = None
    """Model to start from: a Hugging Face name or folder (launch/get_model.py makes one of a GGUF file), or an
    exported ARMT folder. Example: gpt2"""
    base_config: dict[str, Any] | None = None
    """Hugging Face configuration of a random base model, with `model_type`. Example: {model_type: gpt2, n_layer: 2}"""
    trust_remote_code: bool = False
    """Permission to run the Python code that comes with `base`."""
    init: InitConfig | None = None
    """Initialisation of a random base model. Example: {linear_std: 0.125, embedding_std: 0.1}"""

    lora: LoraSection | None = None
    """Low-rank adapters, trained in place of the base's weights; null: none. Example: {targets: [q_proj, v_proj]}"""

    @model_validator(mode="after")
    def one_source(self) -> Self:
        """Require exactly one of a base to load and a random base."""
        if (self.base is None) == (self.base_config is None):
            raise ValueError("model.base or model.base_config: give exactly one of them")
        check_gguf(self.base)
        if self.base is not None and self.base.startswith(("/", "./", "../", "~")) and not Path(self.base).is_dir():
            raise ValueError(f"model.base={self.base}: no such folder; give a model's folder or its Hugging Face name")
        if self.base is not None and self.init is not None:
            raise ValueError("model.init: would overwrite the weights of model.base; remove one of them")
        check_decay(getattr(self, "state_decay", None), "model.state_decay")
        return self


def check_gguf(base: str | None) -> None:
    """Raise ValueError for weights in a GGUF file, which every rank would have to unpack whole."""
    if base is None or not (base.endswith(".gguf") or any(Path(base).glob("*.gguf"))):
        return
    if not any(any(Path(base).glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        file = base if base.endswith(".gguf") else min(Path(base).glob("*.gguf"))
        raise ValueError(
            f"model.base={base}: a GGUF file cannot be loaded partitioned; unpack it once: python launch/get_model.py "
            f"{file} --out FOLDER"
        )


def armt_fields() -> dict[str, Any]:
    """Return the fields of an ARMT as pydantic definitions, so that the YAML section always has all of them."""
    return {name: (kind | None, None) for name, kind in ARMTFields.__annotations__.items()}


ModelConfig = create_model("ModelConfig", __base__=BaseSection, **armt_fields())
