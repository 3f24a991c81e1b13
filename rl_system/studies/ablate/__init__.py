"""Ablation studies (``rl-system ablate``): the paper's tables 2 to 5."""
