"""Who has which row of the arenas: slots are handed out, taken back, and never shared.

The device tensors themselves belong to :class:`recurd.model.Model`; this is the bookkeeping beside them.
"""


class Slots:
    """The free slots of one lane. Owned by the lane."""

    def __init__(self, count: int) -> None:
        self.count = count
        # A stack that hands out low numbers first, so that a lightly used arena touches little memory.
        self._free = list(range(count - 1, -1, -1))

    def __len__(self) -> int:
        """Slots in use."""
        return self.count - len(self._free)

    def allocate(self) -> int | None:
        """A slot nobody else has, or ``None`` when all are taken. Its row holds whatever it held: start it fresh."""
        return self._free.pop() if self._free else None

    def free(self, slot: int) -> None:
        """Take a slot back. It must have been allocated and may be handed out again at once."""
        self._free.append(slot)
