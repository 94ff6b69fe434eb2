"""Loads networks into ONNX Runtime, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from mpt_trt.errors import MptTrtError

ERROR_SEVERITY = 3


def session_options(path: Path) -> onnxruntime.SessionOptions:
    """Options for the network at `path` or one rewritten from it; its weights are next to it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERROR_SEVERITY
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    return options


def open_session(
    model: onnx.ModelProto,
    path: Path,
    options: onnxruntime.SessionOptions,
    provider: tuple[str, dict[str, Any]],
) -> onnxruntime.InferenceSession:
    """Opens a session on a network; raises MptTrtError when it cannot be loaded.

    path: path of the network that became `model`. provider: name and options.
    """
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=[provider]
        )
    except Exception as error:  # the library raises many types, without a common base
        raise MptTrtError(f"{path}: ONNX Runtime cannot load the network: {error}") from None


@contextmanager
def naming_network(path: Path) -> Iterator[None]:
    """Raises MptTrtError when a graph that mpt-trt did not make cannot be rewritten."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, MptTrtError):
            raise
        raise MptTrtError(
            f"{path}: not a network of this version ({error!r}); build the engine again"
        ) from None


def run(
    session: onnxruntime.InferenceSession,
    binding: Any,
    options: onnxruntime.RunOptions | None = None,
) -> None:
    """Runs a step on the bound values; raises MptTrtError when the network cannot compute it."""
    try:
        session.run_with_iobinding(binding, options)
    except Exception as error:  # the library raises many types, without a common base
        is_of_library = type(error).__module__.startswith("onnxruntime")
        if is_of_library or type(error) is RuntimeError:
            raise MptTrtError(f"ONNX Runtime failed to run a step: {error}") from None
        raise
