"""How torch's threads share a machine with other programs; decided when this is imported.

That has to be before torch: its threads read these variables when they are loaded.

Torch has a thread per core. After each piece of work its OpenMP library lets them spin, by default
for milliseconds, until the next piece comes. Where another program needs the core, the thread with
the work waits meanwhile for those that spin, which can make a run many times slower. So threads
spin for microseconds here, and then sleep. On an idle machine that costs nothing that can be
measured, and the number of threads, and with it all rounding, does not depend on who else computes.
"""

import os
from collections.abc import MutableMapping

OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # if one is set, the user has decided


def wait_politely(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set how torch's threads wait, where the user has not."""
    if not any(name in environment for name in OWN):
        environment["OMP_WAIT_POLICY"] = "passive"  # every OpenMP library knows it
        environment["GOMP_SPINCOUNT"] = "1000"  # torch's own, GNU's: a moment before they sleep


wait_politely()
