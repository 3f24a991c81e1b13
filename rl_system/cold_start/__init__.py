"""The supervised cold start (``rl-system cold-start``)."""
