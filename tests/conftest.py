"""Fixtures that more than one test file uses."""

import pytest
from support.slurm_cluster import ROOT, cluster


@pytest.fixture(scope="session")
def slurm():
    """A private eight-node Slurm; a missing one is a failure."""
    with cluster() as running:
        yield running


@pytest.fixture
def checkout(tmp_path):
    """A folder to submit from: this repository, but what a run writes stays out of it."""
    for name in ("armt_dist", "ds_configs", "launch", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path
