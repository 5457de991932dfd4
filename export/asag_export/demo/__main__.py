"""Run the demo: `python -m asag_export.demo`."""

import sys

from asag_export.demo.cli import main

sys.exit(main())
