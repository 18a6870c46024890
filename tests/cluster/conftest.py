"""A Slurm, and a folder to submit from."""

import pytest
from support.paths import ROOT
from support.slurm_cluster import cluster


@pytest.fixture(scope="session")
def slurm():
    """A private eight-node Slurm."""
    with cluster() as running:
        yield running


@pytest.fixture
def checkout(tmp_path):
    """A folder to submit from: this repository, but what a run writes stays out of it."""
    for name in ("armt_dist", "ds_configs", "launch", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path
