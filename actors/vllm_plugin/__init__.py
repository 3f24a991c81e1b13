"""What vLLM needs to know of us. vLLM calls :func:`register` in each of its processes (entry point ``vlcot``)."""

from __future__ import annotations

WEIGHT_TRANSFER_BACKEND = "vlcot_files"
GRAMMAR_PROCESSOR = "actors.vllm_plugin.grammar_processor:GrammarProcessor"


def register() -> None:
    """Register config, model and weight receiver with vLLM (idempotent; imports neither model nor receiver)."""
    from vllm import ModelRegistry
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from vlcot.policy import config

    config.register()
    ModelRegistry.register_model("VlcotForCausalLM", "actors.vllm_plugin.model:VlcotForCausalLM")
    if WEIGHT_TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:  # registering twice raises
        WeightTransferEngineFactory.register_engine(
            WEIGHT_TRANSFER_BACKEND, "actors.vllm_plugin.weight_receiver", "FileWeightReceiver"
        )
