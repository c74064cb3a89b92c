"""Loader workers run the code of their rank, wherever it was started."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]

RANK = """
import os
from data.forkserver import worker_context

def report(pipe):
    import data.worker
    pipe.send((data.worker.__file__, os.getcwd()))

if __name__ == "__main__":
    context = worker_context()
    mine, theirs = context.Pipe()
    context.Process(target=report, args=(theirs,)).start()
    print(*mine.recv(), os.getcwd(), sep="\\n")
"""


def test_workers_run_the_copy_of_the_code_that_their_rank_runs(tmp_path):
    copy = tmp_path / "code"
    shutil.copytree(CHECKOUT / "data", copy / "data", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "rank.py").write_text(RANK)
    # The folder it starts in holds another `data`, as that of a person who submits a job does.
    done = subprocess.run(
        [sys.executable, str(copy / "rank.py")],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    here = str(CHECKOUT)
    assert done.stdout.splitlines() == [str(copy / "data" / "worker.py"), here, here], done.stderr
