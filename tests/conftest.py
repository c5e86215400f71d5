"""For all tests: one thread an operation, set before numpy and torch are imported.

What the tests compute is small, and threads that wait for each other on a busy machine take many times as long.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
