"""The ranks of a program that torchrun started."""

import contextlib
import datetime
import os
from collections.abc import Iterator

__all__ = ["joined"]

PATIENCE = datetime.timedelta(days=7)
"""How long a rank waits for another that works alone; if that one dies, torchrun ends them all."""


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """A context in which the processes of torchrun are ranks that work together, and only the first one prints.

    Nothing happens in a program that was started alone. Reads the environment, so that programs enter it (the command
    line does), never the library by itself.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    import torch
    from torch import distributed

    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(backend, timeout=PATIENCE)
    with contextlib.ExitStack() as stack:
        stack.callback(distributed.destroy_process_group)
        if distributed.get_rank() > 0:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        yield
