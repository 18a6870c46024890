"""All ranks pass over a damaged checkpoint together."""

from pathlib import Path

import pytest
from support.checkpoints import TAGS, write_checkpoints
from support.ranks import spawn

from armt_dist.checkpoint import folder as checkpoint


@pytest.fixture
def root(tmp_path):
    """Two whole checkpoints, `latest` at the second."""
    write_checkpoints(tmp_path)
    return tmp_path


def find(ranks, root: Path) -> tuple[str | None, list[str]]:
    """The checkpoint that a run would go on from, and what it says."""
    said = []
    return checkpoint.find_newest(root, said.append), said


def test_a_damaged_one_is_passed_over_by_all_ranks(root):
    assert spawn(2, find, root) == [(TAGS[1], [])] * 2
    (root / TAGS[1] / "manifest.json").unlink()
    for tag, said in spawn(2, find, root):
        assert tag == TAGS[0] and len(said) == 1 and TAGS[1] in said[0]
