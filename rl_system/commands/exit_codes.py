"""Exit codes of the command line (docs: design §5)."""

OK = 0
ERROR = 1
BAD_INPUT = 2
STOPPED = 75
"""Asked to stop (SIGTERM): a checkpoint was written, the same command with ``resume=auto`` goes on."""
INTERRUPTED = 130
