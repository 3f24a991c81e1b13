"""What vLLM needs to know of us. vLLM calls :func:`register` in each of its processes (entry point ``vlcot``)."""

from __future__ import annotations

import multiprocessing
import os
import threading

WEIGHT_TRANSFER_BACKEND = "vlcot_files"
GRAMMAR_PROCESSOR = "actors.vllm_plugin.grammar_processor:GrammarProcessor"
_WATCH = "end-with-parent"


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
    end_with_parent()


def end_with_parent() -> None:
    """End this process as soon as the one that started it through ``multiprocessing`` has died.

    An engine waits for requests for ever, and keeps its memory; where Ray's raylet is dead too, nobody ends it. Does
    nothing in a process that was started in another way, or when called again.
    """
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == _WATCH for thread in threading.enumerate()):
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name=_WATCH, daemon=True).start()
