"""What every test runs under."""

import os
import sys
from pathlib import Path

from hypothesis import settings

# Imported before the next statement: a package that is imported finds its modules through its own
# __path__, so a checkout that is not installed but on PYTHONPATH keeps working.
import irl_ops  # noqa: F401

# With the repository's root on sys.path, `import kernels` would find our folder in the place of the
# distribution of that name, which transformers looks for.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# deadline=None: on a shared machine the time of one example says nothing.
# CI draws the same examples every time, so that a failure there can be repeated anywhere.
settings.register_profile("irl_ops", deadline=None, max_examples=50, derandomize="CI" in os.environ)
settings.load_profile("irl_ops")
