"""``python3 -m disagglab.install``: makes the environments of this machine."""

import sys

from disagglab.install.setup import main

sys.exit(main(sys.argv[1:]))
