"""The one place where thread counts are set: cores divided by ranks, at least one.

Libraries read these variables when they load, so `set_threads` runs when `freeze_omni_lite` is imported, before
torch. Waiting threads spin for a few microseconds and then sleep. Spinning for good made two threads on two busy cores
50 times slower than one; sleeping at once made a training step on two free cores a third slower.
"""

import os
import sys

OMP_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def thread_count() -> int:
    """Threads for one process: FREEZE_OMNI_THREADS if set, else cores // ranks on this machine, at least 1."""
    wanted = os.environ.get("FREEZE_OMNI_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has no affinity call
        cores = os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def set_threads() -> int:
    """Export the thread count to every numeric library of this process and its children. Returns the count."""
    count = thread_count()
    for variable in OMP_VARIABLES:
        os.environ[variable] = str(count)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "torch" in sys.modules:  # it was imported first and has already chosen
        sys.modules["torch"].set_num_threads(count)
    return count
