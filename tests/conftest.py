"""Order, time limits and requirements of the tests, and fixtures of several folders.

A folder says what kind of tests it holds: `unit` one process, `ranks` several by `support.ranks.spawn`, `hostile`
attacks, `commands` the commands and launchers as a user runs them, `cluster` what needs Slurm, MPI or root. They run in
this order. A test that needs more than Python packages says so by `@pytest.mark.needs(...)` (support/requirements.py)
and is skipped without it. Any other skip, of a missing package for example, is an error.
"""

import os
import tempfile
from collections import defaultdict
from pathlib import Path

# Tokens of the tests' texts stay out of the user's cache. Read when huggingface_hub is imported.
ASSETS = tempfile.TemporaryDirectory(prefix="armt_tests_")
os.environ["HF_ASSETS_CACHE"] = ASSETS.name

import pytest
from support.launchers import SP, STEPS, TORCHRUN, train_under
from support.requirements import REQUIREMENTS, reason_to_skip

from armt_dist.distributed.rendezvous import free_port

TESTS = Path(__file__).parent
FOLDERS = ("unit", "ranks", "hostile", "commands", "cluster")
QUICK = ("unit", "ranks", "hostile")
# Of a unit test; pyproject.toml has the limit of the others.
UNIT_TIMEOUT_S = 300


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help=f"only {', '.join(QUICK)}, without what is marked slow")
    parser.addoption("--long", action="store_true", help="also what is marked long")


def folder_of(item) -> str:
    """Return the name of the folder of tests/ that holds the test."""
    return item.path.relative_to(TESTS).parts[0]


def is_quick(item) -> bool:
    return folder_of(item) in QUICK and not item.get_closest_marker("slow")


def pytest_collection_modifyitems(config, items):
    """Mark each test by its folder, limit its time, and put the fast ones first."""
    for item in items:
        folder = folder_of(item)
        if folder not in FOLDERS:
            raise pytest.UsageError(f"{item.nodeid}: not in one of {', '.join(FOLDERS)}")
        unknown = {name for mark in item.iter_markers("needs") for name in mark.args} - set(REQUIREMENTS)
        if unknown:
            raise pytest.UsageError(f"{item.nodeid}: needs {unknown}; one of {', '.join(REQUIREMENTS)}")
        if folder != "unit":
            item.add_marker(folder)
        elif not item.get_closest_marker("timeout") and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(UNIT_TIMEOUT_S))
    wanted = items if config.getoption("long") else [item for item in items if not item.get_closest_marker("long")]
    if config.getoption("quick"):
        wanted = list(filter(is_quick, wanted))
    config.hook.pytest_deselected(items=[item for item in items if item not in set(wanted)])
    items[:] = wanted
    items.sort(key=lambda item: FOLDERS.index(folder_of(item)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip a test whose requirements are missing, before its fixtures are set up."""
    for mark in item.iter_markers("needs"):
        for name in mark.args:
            if reason := reason_to_skip(name):
                pytest.skip(reason)


def skipped(config) -> dict[str, list[str]]:
    """Collect the skipped tests by reason."""
    found = defaultdict(list)
    for report in config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", []):
        _, _, reason = report.longrepr
        found[reason.removeprefix("Skipped: ")].append(report.nodeid)
    return found


def skip_errors(config) -> list[str]:
    """Say what is wrong with the skips of this run, a line each."""
    by_reason = skipped(config)
    errors = [
        f"error: skipped without pytest.mark.needs ({reason}): {', '.join(tests)}"
        for reason, tests in by_reason.items()
        if not reason.startswith("needs ")
    ]
    if by_reason and os.environ.get("ARMT_NO_SKIPS") == "1":
        errors.append(f"error: {sum(map(len, by_reason.values()))} tests were skipped; ARMT_NO_SKIPS=1 allows none")
    return errors


def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):
        # One of several processes of pytest-xdist: the first one sees all reports.
        return
    if skip_errors(session.config) and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter, config):
    """End with every skip and what would make it run."""
    yield
    for reason, tests in skipped(config).items():
        terminalreporter.line(f"skipped: {reason}")
        for test in tests:
            terminalreporter.line(f"    {test}")
    for error in skip_errors(config):
        terminalreporter.line(error, red=True)


@pytest.fixture(scope="session")
def reference_losses(tmp_path_factory):
    """Losses of the short training, uninterrupted: two ranks under torchrun share each sequence."""
    launcher = [*TORCHRUN, "--nproc-per-node=2", f"--master-port={free_port()}"]
    found = train_under(launcher, tmp_path_factory.mktemp("reference"), STEPS, sp=SP)
    assert len(found) == STEPS, f"{len(found)} steps instead of {STEPS}"
    return found
