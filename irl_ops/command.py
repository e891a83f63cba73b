"""The command ``irl-ops``: ``doctor`` and ``score``. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

import irl_ops
from irl_ops.score import arguments as score_arguments

FOR_SCORE = ("torch", "transformers", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="irl-ops", description=irl_ops.__doc__)
    parser.add_argument("--version", action="version", version=f"irl-ops {irl_ops.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="describe this installation and check its kernels")
    doctor.add_argument("--json", action="store_true", help="print JSON, for a bug report")
    score_arguments.add_to(commands)
    options = parser.parse_args(arguments)
    return _doctor(options) if options.command == "doctor" else _score(options)


def _doctor(options: argparse.Namespace) -> int:
    from irl_ops import doctor

    return doctor.run(as_json=options.json)


def _score(options: argparse.Namespace) -> int:
    missing = [name for name in FOR_SCORE if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"irl-ops score needs {', '.join(missing)}: in a clone of irl_ops run "
            "`pip install '.[score]'`",
            file=sys.stderr,
        )
        return 2
    from irl_ops.score.run import main as score

    return score(options)


if __name__ == "__main__":
    sys.exit(main())
