"""Peak memory of training steps and decoded batches on a simulated GPU."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RUN = Path(__file__).resolve().parent.parent / "tests" / "simulated_cuda" / "run.py"


def simulate(cases: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Figures of each case, as it is done; see `Case` in tests/simulated_cuda/run.py.

    A process of its own: the simulated device must be there before torch is imported.
    """
    words = [sys.executable, str(RUN), json.dumps(list(cases))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"the simulation ended with {process.returncode}; see above")
