"""Work that takes one rank longer than a collective may take."""

import time
from datetime import timedelta

import torch.distributed as dist
from support.ranks import spawn

from armt_dist.config import ConfigError
from armt_dist.distributed import collectives

TIMEOUT_S = 4


def one_works_long(ranks):
    # `spawn` gives collectives its own limit.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_S), dist.group.WORLD)
    collectives.SLOW_POLL_S = 0.2
    renewed = []

    def work(get_on):
        for _ in range(5 if ranks.rank == 1 else 0):
            time.sleep(0.4 * TIMEOUT_S)
            get_on()
        return ranks.rank

    began = time.monotonic()
    result = collectives.together_slowly(work, lambda: renewed.append(time.monotonic()))
    gaps = [b - a for a, b in zip([began, *renewed], [*renewed, time.monotonic()], strict=True)]
    return result, time.monotonic() - began, max(gaps)


def fails_on_one(ranks):
    def work(get_on):
        if ranks.rank == 1:
            raise ConfigError("no such text")

    try:
        collectives.together_slowly(work, lambda: None)
    except ConfigError as error:
        return str(error)


def test_the_others_wait_as_long_as_it_gets_on():
    for rank, (result, took, gap) in enumerate(spawn(2, one_works_long, timeout_s=TIMEOUT_S * 10)):
        assert result == rank and took > 1.9 * TIMEOUT_S
        assert gap < TIMEOUT_S, "a limit of this length would have run out"


def test_an_error_of_one_is_an_error_of_all():
    first, second = spawn(2, fails_on_one)
    assert first == second == "no such text (on rank 1)"
