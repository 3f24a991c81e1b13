"""``python -m rl_system``."""

import sys

from rl_system.commands.main import main

sys.exit(main())
