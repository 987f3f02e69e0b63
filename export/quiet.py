"""Makes exporters leave out their libraries' messages, and where in the source each operation comes from."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import torch.fx.config


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silences an exporter's prints, log messages and warnings, because stdout is only for data.

    Nor does torch note for each operation the stack of calls that led to it: that takes time, and holds paths
    of this machine.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "transformers")]
    levels = [logger.level for logger in loggers]
    stacks_left_out = getattr(torch.fx.config, "do_not_emit_stack_traces", False)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = stacks_left_out
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
