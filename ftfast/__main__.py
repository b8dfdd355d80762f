"""``python -m ftfast``."""

import sys

from ftfast.cli import main

sys.exit(main())
