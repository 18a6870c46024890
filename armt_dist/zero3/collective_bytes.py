"""The bytes that ZeRO-3 gathers and reduces, counted where DeepSpeed hands them to torch.distributed."""

from functools import wraps


class Traffic:
    """Bytes since the start: whole parameters gathered and whole gradients reduced, whatever each rank's shard.

    Counts from its creation on, after DeepSpeed's communication was initialised; one per process.
    """

    def __init__(self) -> None:
        import deepspeed.comm.comm as comm

        self.gathered_bytes = self.reduced_bytes = 0
        backend = comm.cdb

        def counted(function, counter: str, whole: str, position: int):
            @wraps(function)
            def call(*args, **kwargs):
                tensor = kwargs[whole] if whole in kwargs else args[position]
                setattr(self, counter, getattr(self, counter) + tensor.nbytes)
                return function(*args, **kwargs)

            return call

        for name, counter, whole, position in (
            ("all_gather_into_tensor", "gathered_bytes", "output_tensor", 0),
            ("reduce_scatter_tensor", "reduced_bytes", "input_tensor", 1),
        ):
            setattr(backend, name, counted(getattr(backend, name), counter, whole, position))
