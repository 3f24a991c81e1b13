"""Whether a machine can hold an experiment, worked out before any process starts."""
