"""What a run writes of itself where there is no room: what stood there stays, and records wait."""

import resource
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from armt_dist.config import ConfigError
from armt_dist.data.text.files import TextFacts
from armt_dist.monitoring.run_log import MetricsWriter
from armt_dist.records import RUN_CONFIG, read_metrics
from armt_dist.training.run_config import RunConfig
from armt_dist.training.run_folder import describe_run, write_texts


@contextmanager
def no_room(limit: int = 0):
    """Let no file of this process grow beyond so many bytes, with the errors that a full disk has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_records_wait_until_there_is_room(tmp_path):
    """More of them than Python's own buffer holds."""
    writer = MetricsWriter(tmp_path, 0, 1000)
    writer.write("train", 1, {"loss": 1.0})
    with no_room((tmp_path / "metrics.jsonl").stat().st_size + 20):
        for step in range(2, 500):
            writer.write("train", step, {"loss": 1.0})
    assert len(list(read_metrics(tmp_path))) == 1
    writer.write("train", 500, {"loss": 1.0})
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 501))
    writer.close()


def test_a_resumed_run_keeps_its_records_on_a_full_disk(tmp_path):
    writer = MetricsWriter(tmp_path, 0, 10)
    for step in (1, 2, 3):
        writer.write("train", step, {"loss": 1.0})
    writer.close()
    with no_room(), pytest.raises(OSError):
        MetricsWriter(tmp_path, 2, 10)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    MetricsWriter(tmp_path, 2, 10).close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_a_run_that_starts_on_a_full_disk_keeps_what_it_knew_of_itself(tmp_path):
    """Without its configuration it could never be resumed."""
    texts = SimpleNamespace(texts=lambda: {"train": [TextFacts("a", 4, "ab")], "validation": []})
    write_texts(tmp_path, texts)
    config = RunConfig.model_construct()
    (tmp_path / RUN_CONFIG).write_text("before")
    with no_room():
        with pytest.raises(ConfigError, match="out=.*; give --out a folder that can be written"):
            describe_run(tmp_path, config, {}, None, None)
        with pytest.raises(OSError):
            write_texts(tmp_path, texts)
    assert (tmp_path / RUN_CONFIG).read_text() == "before"
    assert "sha256" in (tmp_path / "texts.json").read_text()
