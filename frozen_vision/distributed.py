"""Starts several processes of one run on this machine.

  python -m frozen_vision.distributed --processes=2 -- python -m frozen_vision.main --config=... --workdir=...

See `frozen_vision.devices.launcher`, which does the work.
"""

import sys

from frozen_vision.devices import launcher

if __name__ == "__main__":
  launcher.main(sys.argv[1:])
