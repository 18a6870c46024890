"""GPUs that torch cannot use, networks that are missing, and ranks on different devices: said before ranks meet."""

import threading

import pytest
import torch
import torch.distributed as dist

from armt_dist.config import ConfigError
from armt_dist.distributed import machine


@pytest.fixture
def built_for_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpus_without_a_driver_that_torch_can_use(built_for_cuda, tmp_path, monkeypatch):
    (tmp_path / "nvidia-uvm").touch()
    assert not machine.find_cuda(tmp_path), "no GPU"
    (tmp_path / "nvidia0").touch()
    with pytest.raises(ConfigError, match="cannot use the GPUs of this machine; install a driver for CUDA 12.8"):
        machine.find_cuda(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not machine.find_cuda(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.find_cuda(tmp_path)


def test_a_build_of_torch_for_cpus_trains_on_them(built_for_cuda, tmp_path, monkeypatch):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not machine.find_cuda(tmp_path)


@pytest.mark.parametrize(
    ("cuda", "given", "there"),
    [
        *[(True, given, True) for given in ("", "ib", "ib0,eth", "=ib0", "^docker,lo", "xx,lo")],
        *[(True, given, False) for given in ("eth", "=ib", "ib00")],
        *[(False, given, True) for given in ("", "lo", "xx,ib0")],
        *[(False, given, False) for given in ("ib", "eth0")],
    ],
)
def test_networks(cuda, given, there, monkeypatch):
    monkeypatch.setattr(machine.socket, "if_nameindex", lambda: [(1, "lo"), (2, "ib0")])
    variable = "NCCL_SOCKET_IFNAME" if cuda else "GLOO_SOCKET_IFNAME"
    monkeypatch.setenv(variable, given)
    # The other one counts for the other devices only.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME" if cuda else "NCCL_SOCKET_IFNAME", "nonsense")
    if there:
        machine.check_networks(cuda)
    else:
        with pytest.raises(ConfigError, match=f"{variable}={given}: .* has no such network interface; it has lo, ib0"):
            machine.check_networks(cuda)


@pytest.mark.parametrize(
    ("devices", "says"),
    [
        (["cpu"], ""),
        (["cuda"] * 3, ""),
        (["cuda", "cuda", "cpu"], r"\(cpu on "),
        (["cpu", "cuda", "cpu"], r"\(cuda on "),
    ],
)
def test_ranks_on_different_devices(devices, says):
    store, said = dist.HashStore(), {}

    def meet(rank: int) -> None:
        try:
            machine.check_alike(len(devices), rank, devices[rank], store)
        except ConfigError as error:
            said[rank] = error

    threads = [threading.Thread(target=meet, args=(rank,), daemon=True) for rank in range(len(devices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert len(said) == (len(devices) if says else 0)
    for error in said.values():
        with pytest.raises(ConfigError, match=f"some ranks see GPUs and others none {says}"):
            raise error


@pytest.mark.parametrize("given", ["", "8", "32"])
def test_enough_hardware_queues_for_a_wavefront(given, monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given)
    machine.check_queues(sp=2)


def test_too_few_hardware_queues_for_a_wavefront(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with pytest.raises(ConfigError, match="CUDA_DEVICE_MAX_CONNECTIONS=1: with parallel.sp=2 .* or set 32"):
        machine.check_queues(sp=2)
    machine.ask_for_queues()
    assert machine.os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1", "what a user sets stays"
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    machine.ask_for_queues()
    assert machine.os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
