"""``python -m zsq``."""

import sys

from zsq.cli import main

sys.exit(main())
