"""`python -m nanohybrid` is the command `nanohybrid`."""

import sys

from nanohybrid.cli.main import main

sys.exit(main())
