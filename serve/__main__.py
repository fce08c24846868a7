"""`python -m serve CONFIG`."""

import sys

from serve.command import main

sys.exit(main())
