"""``python -m kdpp`` is ``kdpp``."""

import sys

from kdpp.cli import main

sys.exit(main())
