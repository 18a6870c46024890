"""Fuzz every parser of ours, guided by coverage (atheris): what it does not read it must refuse with ConfigError.

    pip install -e .[fuzz]
    python tests/fuzz.py [--seconds 60] [--only PARSER ...]

The parsers are those of tests/support/parsers.py, each in a process of its own. Inputs that reach new code, and those
that make a parser fail, take too long (10 s) or too much memory (2 GB), are kept in tests/fuzz_corpus/PARSER; the quick
tests read them all again. Exit code 1 if there was a failure.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

INPUT_S, MEMORY_MB, LONGEST = 10, 2048, 4096


def fuzz(name: str, options: list[str]) -> None:
    """Fuzz one parser in this process, until libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["armt_dist"]):
        from support.parsers import run_parser

    atheris.Setup([sys.argv[0], *options], lambda content: run_parser(name, content))
    atheris.Fuzz()


def main() -> int:
    if "--child" in sys.argv:
        # Nothing of ours may be imported before it is instrumented.
        name, *options = sys.argv[sys.argv.index("--child") + 1 :]
        fuzz(name, options)
    from support.parsers import CORPUS, PARSERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for each parser (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARSERS, default=list(PARSERS), metavar="PARSER")
    args = parser.parse_args()
    failed = []
    for name in args.only:
        kept = CORPUS / name
        with tempfile.TemporaryDirectory() as found:
            limits = [f"-timeout={INPUT_S}", f"-rss_limit_mb={MEMORY_MB}", f"-max_len={LONGEST}"]
            options = [f"-max_total_time={args.seconds}", f"-artifact_prefix={kept}/", *limits, found, str(kept)]
            command = [sys.executable, __file__, "--child", name, *options]
            result = subprocess.run(command, capture_output=True, text=True)
        last = [line for line in result.stderr.splitlines() if "cov:" in line][-1:]
        print(f"{name}: {'failed' if result.returncode else 'ok'} {' '.join(last)[:100]}", flush=True)
        if result.returncode:
            failed.append(name)
            print(result.stderr[-3000:], file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
