"""``python -m tests.stand_in_gpu WORD ...``: Python's command line, on the stand-in GPU."""

import os
import sys

from tests.stand_in_gpu.running import environment

os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())
