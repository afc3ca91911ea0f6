"""Starts several processes of one run on this machine.

  python -m frozen_vision.distributed --processes=2 -- python -m frozen_vision.main --config=... --workdir=...

See `frozen_vision.devices.processes`, which does the work.
"""

import sys

from frozen_vision.devices import processes

if __name__ == "__main__":
  processes.main(sys.argv[1:])
