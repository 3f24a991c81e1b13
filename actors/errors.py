"""What a rollout actor raises and the pool acts on."""

from __future__ import annotations


class EngineLostError(RuntimeError):
    """The actor's vLLM engine is dead or holds weights of no version: the actor must be restarted."""


class StaleWeightsError(RuntimeError):
    """The actor's weights are older than asked for, as after a restart."""


class PushLostError(RuntimeError):
    """The actor knows nothing of this push: it was restarted since the push began."""
