"""The honoured keys of the ds_config with their types, defaults and descriptions.

The names decide what is honoured (`ds_config.check_keys`); docs/config.md and ``--help KEY`` show the docstrings.
DeepSpeed's defaults stand here as of version 0.19.8; it checks only some of the values itself.
"""

import sys
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from ..config import Section

Count = Annotated[int, Field(ge=1)]
Elements = Annotated[int, Field(ge=0)]
Dtype = Literal["fp32", "bf16", "fp16"]
DEFAULT_LR = 1e-3
DEFAULT_BETAS = [0.9, 0.999]
DEFAULT_WEIGHT_DECAY = 1e-3


class OpenSection(Section):
    """Base of sections whose other keys are passed on unchecked."""

    model_config = ConfigDict(extra="allow")


class OptimizerParams(OpenSection):
    """Arguments of the optimizer; those that are not listed here are passed on to it."""

    lr: Annotated[float, Field(gt=0)] = DEFAULT_LR
    """Peak learning rate of curriculum stages without an `lr` of their own. Example: 3.0e-4"""
    betas: list[float] = DEFAULT_BETAS
    """Decay rates of Adam's moments. Example: [0.9, 0.95]"""
    weight_decay: Annotated[float, Field(ge=0)] = DEFAULT_WEIGHT_DECAY
    """Decoupled weight decay (AdamW), but of norms, biases, memory rows; see train.optimizer_groups. Example: 0.01"""


class OptimizerKeys(Section):
    """The optimizer."""

    type: str = "AdamW"
    """Optimizer, by DeepSpeed's or torch's name. Example: Adam"""
    params: OptimizerParams = OptimizerParams()
    """Arguments of the optimizer. Example: {lr: 3.0e-4, weight_decay: 0.01}"""


class Bf16Keys(Section):
    """bfloat16 parameters and activations; memory states and the optimizer's copy stay float32."""

    enabled: bool = False
    """Whether to train in bfloat16; false: float32."""


class DataTypeKeys(Section):
    """Data types of buffers."""

    grad_accum_dtype: Dtype | None = None
    """Type in which gradients are accumulated; null: that of the parameters. Example: fp32"""


class OffloadOptimizerKeys(OpenSection):
    """Place of the optimizer states between steps; DeepSpeed's other options are passed on."""

    device: Literal["none", "cpu", "nvme"] = "none"
    """Device that holds the optimizer states and computes the step. Example: cpu"""
    pin_memory: bool = True
    """Whether the host memory is page-locked."""
    nvme_path: str | None = None
    """Folder on an NVMe disk, for device nvme. Example: /local_nvme"""


class OffloadParamKeys(OpenSection):
    """Place of this rank's share of the parameters between gathers; DeepSpeed's other options are passed on."""

    device: Literal["none", "cpu", "nvme"] = "none"
    """Device that holds the parameters between gathers. Example: cpu"""
    pin_memory: bool = True
    """Whether the host memory is page-locked."""
    nvme_path: str | None = None
    """Folder on an NVMe disk, for device nvme. Example: /local_nvme"""


class ZeroKeys(Section):
    """ZeRO-3: parameters, gradients and optimizer states are partitioned over all ranks."""

    stage: Literal[3]
    """Stage of ZeRO; the schedules are built on the gathers of stage 3. Example: 3"""
    contiguous_gradients: bool = True
    """Whether gradients are copied to one buffer as they are produced."""
    overlap_comm: bool | None = None
    """Whether gradients are reduced while the backward pass runs; null: DeepSpeed's choice. Example: true"""
    reduce_scatter: bool = True
    """Whether gradients are averaged by reduce-scatter rather than by all-reduce."""
    reduce_bucket_size: Count | None = None
    """Gradient elements that are reduced at a time; null: derived from the model. Example: 50000000"""
    sub_group_size: Elements = 10**9
    """Parameter elements that the optimizer step works on at a time. Example: 100000000"""
    stage3_max_live_parameters: Elements | None = None
    """Parameter elements that may be gathered at once; null: derived from the schedule. Example: 1000000000"""
    stage3_max_reuse_distance: Elements | None = None
    """Elements to its next use up to which a parameter stays gathered; null: derived. Example: 100000000"""
    stage3_prefetch_bucket_size: Elements | None = None
    """Parameter elements that are gathered ahead of use; null: derived from the schedule. Example: 50000000"""
    stage3_param_persistence_threshold: Elements = 10**5
    """Parameters with fewer elements than this are not partitioned. Example: 10000"""
    stage3_model_persistence_threshold: Elements = sys.maxsize
    """Total of elements of all parameters that are not partitioned. Example: 1000000"""
    offload_param: OffloadParamKeys | None = None
    """Offloading of parameters. Example: {device: cpu, pin_memory: true}"""
    offload_optimizer: OffloadOptimizerKeys | None = None
    """Offloading of optimizer states. Example: {device: cpu, pin_memory: true}"""
    zero_hpz_partition_size: Elements = 1
    """Ranks of the secondary partition of parameters (ZeRO++ hpZ), usually those of a node; 1: none. Example: 8"""


class ActivationCheckpointingKeys(Section):
    """Activations of the forward pass; segment BPTT always recomputes them, so only their place can be chosen."""

    cpu_checkpointing: bool = False
    """Whether the inputs of the layers are kept in host memory."""


class DsConfigKeys(Section):
    """Batch, precision, optimizer, clipping, ZeRO and offload, as DeepSpeed's JSON names them."""

    train_batch_size: Count | None = None
    """Sequences of one optimizer step; null: micro-batch x accumulation x data-parallel ranks. Example: 64"""
    train_micro_batch_size_per_gpu: Count | None = None
    """Sequences that the ranks of one data-parallel group process at once; null: from the other two. Example: 4"""
    gradient_accumulation_steps: Count | None = None
    """Micro-batches of one optimizer step; null: from the other two, or 1. Example: 2"""
    optimizer: OptimizerKeys = OptimizerKeys()
    """Optimizer and its arguments. Example: {type: AdamW, params: {lr: 3.0e-4}}"""
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    """Norm to which gradients are clipped; 0: no clipping. Example: 0.5"""
    bf16: Bf16Keys = Bf16Keys()
    """Precision. Example: {enabled: true}"""
    communication_data_type: Dtype | None = None
    """Type in which gradients are reduced; null: that of the parameters. Example: fp32"""
    data_types: DataTypeKeys = DataTypeKeys()
    """Data types of buffers. Example: {grad_accum_dtype: fp32}"""
    zero_optimization: ZeroKeys
    """ZeRO; `stage` must be given. Example: {stage: 3}"""
    activation_checkpointing: ActivationCheckpointingKeys = ActivationCheckpointingKeys()
    """Place of activations. Example: {cpu_checkpointing: true}"""
    zero_allow_untested_optimizer: bool = False
    """Permission to use an optimizer that DeepSpeed has not tested with ZeRO."""
    zero_force_ds_cpu_optimizer: bool = True
    """Whether offloaded optimizer states require DeepSpeed's CPU optimizer."""
    steps_per_print: Count = 2**31
    """Steps between two lines of DeepSpeed's own log. Example: 100"""
    wall_clock_breakdown: bool = False
    """Whether DeepSpeed prints the time of forward, backward and step."""
    memory_breakdown: bool = False
    """Whether DeepSpeed prints the memory in use at every phase."""
    comms_logger: dict[str, Any] | None = None
    """DeepSpeed's log of collectives, as its documentation describes it. Example: {enabled: true, prof_all: true}"""
    aio: dict[str, Any] | None = None
    """DeepSpeed's asynchronous disk access, for offloading to NVMe. Example: {queue_depth: 16}"""


def sub_keys(section: type[Section], name: str) -> frozenset[str] | None:
    """Return the keys that a key of `section` takes; None where its value is not a section."""
    schema = section.model_fields[name].annotation
    return frozenset(schema.model_fields) if isinstance(schema, type) and issubclass(schema, Section) else None


# Key -> its honoured sub-keys; None: any value.
HONOURED = {name: sub_keys(DsConfigKeys, name) for name in DsConfigKeys.model_fields}
