"""Exit codes of the command line (docs: design §5)."""

OK = 0
ERROR = 1
BAD_INPUT = 2
INTERRUPTED = 130
