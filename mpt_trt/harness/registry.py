"""The name under which lm-eval finds engines."""

from __future__ import annotations

MODEL_NAME = "mpt_trt"


def register() -> None:
    """Adds `mpt_trt` to the models of lm-eval in this process.

    lm-eval 0.4 has no entry points for models, so its command line finds the model only in a
    process that has called this.
    """
    # Optional, and slow to import.
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target="mpt_trt.harness.model:EngineModel")
