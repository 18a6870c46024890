"""Training under mpirun: to the last bit the losses of the same world under torchrun."""

import sys

import pytest
from support.launchers import SP, train_under
from support.programs import find_mpirun

pytestmark = pytest.mark.needs("mpi")


def test_mpirun(reference_losses, tmp_path):
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    launcher = [find_mpirun(), "-n", "2", sys.executable]
    assert train_under(launcher, tmp_path, 10, sp=SP, **as_root) == reference_losses[:10]
