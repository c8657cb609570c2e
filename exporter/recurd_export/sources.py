"""Picks the front end for whatever is to be exported; the frameworks are imported only when they are needed."""

from typing import Any

from recurd_export.pipeline import FrontEnd


def front_end(model: Any, example: Any) -> FrontEnd:
    """The front end for a ``torch.nn.Module``."""
    from recurd_export.pytorch.front import front

    return front(model, example)
