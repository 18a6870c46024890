"""Every input that tests/fuzz.py keeps: its seeds, and what once made a parser fail."""

import pytest
from support.parsers import CORPUS, PARSERS, run_parser

INPUTS = [(name, path) for name in PARSERS for path in sorted((CORPUS / name).iterdir())]


@pytest.mark.parametrize(("name", "path"), INPUTS, ids=[f"{name}-{path.name}" for name, path in INPUTS])
def test_an_input_is_read_or_refused(name, path):
    run_parser(name, path.read_bytes())


def test_every_parser_has_seeds():
    assert {path.name for path in CORPUS.iterdir()} == set(PARSERS)
