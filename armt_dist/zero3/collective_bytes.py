"""The bytes that ZeRO-3 gathers and reduces, counted where DeepSpeed hands them to torch.distributed."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from .private import COUNTED, WholeTensor, communication_backend


class CollectiveBytes:
    """Bytes since the start: whole parameters gathered and whole gradients reduced, whatever each rank's shard.

    Counts from its creation on, after DeepSpeed's communication has started; one per process.
    """

    def __init__(self) -> None:
        self.bytes = dict.fromkeys(COUNTED, 0)
        backend = communication_backend()
        for name, whole in COUNTED.items():
            setattr(backend, name, self.counted(name, getattr(backend, name), whole))

    @property
    def gathered_bytes(self) -> int:
        """Bytes of parameters, as they are after the gathers."""
        return self.bytes["all_gather_into_tensor"]

    @property
    def reduced_bytes(self) -> int:
        """Bytes of gradients, as they are before the reductions."""
        return self.bytes["reduce_scatter_tensor"]

    def counted(self, name: str, function: Callable, whole: WholeTensor) -> Callable:
        """Wrap a collective so that the bytes of its whole tensor are added up under `name`."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = kwargs[whole.name] if whole.name in kwargs else args[whole.position]
            self.bytes[name] += tensor.nbytes
            return function(*args, **kwargs)

        return call
