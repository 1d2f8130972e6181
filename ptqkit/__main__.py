"""``python -m ptqkit``."""

from __future__ import annotations

import sys

from ptqkit.cli import main

sys.exit(main())
