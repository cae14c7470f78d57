"""A node's clock as its Python processes read it: off by the seconds in the file $CVDIST_TEST_CLOCK.

The machine's own clock is everybody's. The file is read each time: a test sets the clock in mid-job.
"""

import os
import sys
import time

_time, _time_ns = time.time, time.time_ns


def _offset() -> int:
    try:
        with open(os.environ["CVDIST_TEST_CLOCK"]) as file:  # noqa: PTH123
            return int(file.read())
    except (KeyError, OSError, ValueError):
        return 0


def seconds() -> float:
    """For `time.time`; named, so that it can be pickled."""
    return _time() + _offset()


def nanoseconds() -> int:
    """For `time.time_ns`."""
    return _time_ns() + _offset() * 10**9


# gRPC's server in Python compares this clock with the machine's, and would keep a core busy while they differ.
if "ray.util.client.server" not in sys.orig_argv:
    time.time, time.time_ns = seconds, nanoseconds
