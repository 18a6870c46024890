"""A command that ends while it still reads a stream."""

import subprocess
import sys
from random import Random

import pyarrow
import pytest
from pyarrow import parquet
from support.paths import ROOT

LIMIT_S = 60
# Takes a row of some steps; the stream has more.
COMMAND = """
import sys
from armt_dist.config import run_main, validate
from armt_dist.data.lengths import Difficulty
from armt_dist.data.sections import DataConfig
from armt_dist.data.tasks import make_task

def main():
    dataset = {"name": sys.argv[1], "data_files": sys.argv[2]}
    text = {"dataset": dataset, "tokenizer": "byte", "sequence_tokens": 128, "pack": True}
    task = make_task(validate(DataConfig, {"task": "text", "text": text}), 128, None, 1024)
    for step in range(5):
        assert len(task.batch("train", step, range(7, 8), Difficulty.fixed(1)).input_ids) == 1
    print("taken")

run_main(main, 0)
"""


@pytest.mark.parametrize("format", ["parquet", "text"])
def test_it_ends_at_once(format, tmp_path):
    # More than is read ahead, also when it is compressed.
    random, path = Random(0), tmp_path / "texts"
    texts = [random.randbytes(500).hex() for _ in range(60_000)]
    if format == "parquet":
        parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=10_000)
    else:
        path.write_text("\n".join(texts))
    command = [sys.executable, "-c", COMMAND, format, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stdout) == (0, "taken\n"), done.stderr
