"""wait_for_workers.py ADDRESS COUNT [SECONDS]: returns once a scheduler has so many workers, or fails (default: 600 s).

Credentials are those of Dask's configuration. For where machines or containers still start when the client does, which
would count it as bad input.
"""

import sys
import time

from distributed import Client

address, count, *rest = sys.argv[1:]
limit_s = float(rest[0]) if rest else 600.0
end_s = time.monotonic() + limit_s
try:
    with Client(address, timeout=limit_s, set_as_default=False) as client:
        client.wait_for_workers(int(count), timeout=max(1.0, end_s - time.monotonic()))
except (OSError, TimeoutError) as error:
    sys.exit(f"scheduler={address!r} does not have {count} workers after {limit_s:g} s: {error}")
