"""Every error recurd raises or sends, in one place.

    RecurdError
    ├── StartError            the daemon or a command cannot start; carries an exit code
    │   ├── ConfigError       the configuration is wrong                        (exit 78)
    │   ├── ContractError     a model file is missing, broken or has no contract (exit 65)
    │   ├── DeviceError       the device asked for cannot be had                (exit 69)
    │   ├── DeviceLost        the device has gone while it was used              (exit 71)
    │   ├── StateFileError    a file of streams is not one, or cannot be written (exit 65)
    │   ├── AddressError      an address cannot be bound                        (exit 75)
    │   ├── AuthError         it cannot be made sure who may connect            (exit 77)
    │   │   └── KeyFileError  a key file is not good; raised by clients too
    │   └── ExportError       a model cannot be exported (recurd_export.errors)  (exit 70)
    ├── Refused(code)         this request was refused; nothing happened, the stream lives
    ├── Broken(code)          the stream's state is lost; only a new start helps
    └── Unanswered            no answer within the time-out (raised by clients only)

A code is the word that stands on the wire, in the metrics' label, in the log and in the client's exception. Anything
else that is raised while a frame is handled is a bug: a traceback in the log and ``internal`` for the client.
"""

from enum import IntEnum
from functools import cached_property, partial
from typing import Any


class ExitCode(IntEnum):
    """Exit status of every command (numbers of sysexits.h); the service does not restart on the permanent ones."""

    OK = 0
    BUG = 1
    USAGE = 2
    CONTRACT = 65
    DEVICE = 69
    EXPORT = 70
    DEVICE_LOST = 71
    JOURNAL = 74
    ADDRESS = 75
    AUTH = 77
    CONFIG = 78


class Code(IntEnum):
    """Error codes: the number stands in a frame's header, the lower-case name in bodies, metrics and exceptions."""

    # the frame itself
    BAD_FRAME = 1
    BAD_VERSION = 2
    UNKNOWN_TYPE = 3
    BAD_REQUEST = 4
    HELLO_REQUIRED = 5
    # opening a stream
    UNKNOWN_MODEL = 10
    BAD_NAME = 11
    WRONG_MODEL = 12
    UNKNOWN_STREAM = 13
    NO_SLOTS = 14
    TOO_MANY_STREAMS = 15
    EXISTS = 16
    # what a tenant may not
    FORBIDDEN = 17
    # addressing a stream
    UNKNOWN_HANDLE = 20
    DETACHED = 21
    CLOSED = 22
    # the chunk itself
    WIDTH = 30
    DTYPE = 31
    EMPTY = 32
    TOO_LONG = 33
    NOT_FINITE = 34
    OUT_OF_RANGE = 35
    STATE_MISMATCH = 36
    # the chunk's place
    GAP = 40
    STALE = 41
    CREDIT = 42
    LIMIT = 43
    # the daemon's condition
    BUSY = 50
    DRAINING = 51
    RUN_FAILED = 52
    LATE = 54
    MOVED = 55
    # the stream's state is lost
    EXPIRED = 60
    FAILED = 61
    REPLACED = 62
    POISONED = 63
    RELOADED = 64
    # a bug
    INTERNAL = 70

    @cached_property
    def word(self) -> str:
        """The code as it stands in JSON bodies, metrics, log lines and exceptions."""
        return self.name.lower()


#: Codes after which a stream's state is gone; every other code leaves the stream as it was.
BREAKING = frozenset({Code.EXPIRED, Code.FAILED, Code.REPLACED, Code.POISONED, Code.RELOADED})
#: Codes that say "the same request may succeed later"; their replies carry ``retry_after_seconds``.
PASSING = frozenset({Code.BUSY, Code.CREDIT, Code.LIMIT})


class RecurdError(Exception):
    """Base of everything recurd raises on purpose."""


class StartError(RecurdError):
    """The daemon or a command cannot start. ``exit_code`` is the process's exit status."""

    exit_code = ExitCode.BUG


class ConfigError(StartError):
    """The configuration is wrong; the text names the key."""

    exit_code = ExitCode.CONFIG


class ContractError(StartError):
    """A model file is missing, unreadable, without a contract, or not what its contract says."""

    exit_code = ExitCode.CONTRACT


class DeviceError(StartError):
    """The device asked for cannot be had, or the model does not run on it as it must."""

    exit_code = ExitCode.DEVICE


class DeviceLost(StartError):
    """The device does not answer any more; a new process may get it back."""

    exit_code = ExitCode.DEVICE_LOST


class JournalError(StartError):
    """Stored streams cannot be read, written, or gone on from."""

    exit_code = ExitCode.JOURNAL


class CheckEnded(JournalError):
    """The process that checks stored streams was ended, which says nothing of them: another start may go well."""

    exit_code = ExitCode.BUG


class AuthError(StartError):
    """It cannot be made sure who may connect."""

    exit_code = ExitCode.AUTH


class KeyFileError(AuthError):
    """A key file is missing, unreadable, open to everybody, or damaged; the text names it. Raised by clients too."""


class StateFileError(StartError):
    """A file of streams cannot be read or written, or is not one."""

    exit_code = ExitCode.CONTRACT


class AddressError(StartError):
    """An address cannot be bound."""

    exit_code = ExitCode.ADDRESS


def is_passing(code: int, retry_after_seconds: float | None) -> bool:
    """Whether what was refused with this may succeed later, and is to be asked again without being told."""
    return code in PASSING or retry_after_seconds is not None


class Refused(RecurdError):
    """A request was refused. Nothing happened: the stream lives and the seq is free to be used again.

    ``expected`` is the seq the daemon waits for (with ``gap`` and ``stale``, else ``None``), ``generation`` the
    stream's own (with ``stale``); ``retry_after_seconds`` is set for codes in :data:`PASSING`, and with ``draining``
    where the streams will be there after a restart. ``endpoint``, ``server_key`` and ``group`` (with ``moved``): where
    the stream is served now, and with which others it left. ``handles`` (with ``exists``): those of the streams that
    were to come from another daemon which cannot, as there are others in their place.
    """

    def __init__(
        self,
        code: Code,
        text: str,
        *,
        expected: int | None = None,
        generation: int | None = None,
        retry_after_seconds: float | None = None,
        endpoint: str | None = None,
        server_key: str | None = None,
        group: str | None = None,
        handles: list[int] | None = None,
    ) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text
        self.expected = expected
        self.generation = generation
        self.retry_after_seconds = retry_after_seconds
        self.endpoint = endpoint
        self.server_key = server_key
        self.group = group
        self.handles = handles

    @property
    def is_passing(self) -> bool:
        """Whether the same request may succeed later, and is to be made again by itself."""
        return is_passing(self.code, self.retry_after_seconds)

    def __str__(self) -> str:
        return f"{self.code.word}: {self.text}"

    def __reduce__(self) -> tuple[Any, ...]:
        """So that it can leave a worker process: the default would call ``Refused`` with its one-line text alone."""
        details: dict[str, Any] = {
            "expected": self.expected,
            "generation": self.generation,
            "retry_after_seconds": self.retry_after_seconds,
            "endpoint": self.endpoint,
            "server_key": self.server_key,
            "group": self.group,
            "handles": self.handles,
        }
        return partial(Refused, **details), (self.code, self.text)


class Broken(RecurdError):
    """A stream's state is lost (``expired``, ``failed``, or unknown to a restarted daemon).

    ``generation`` and ``last_seq`` are the last ones the stream had, where known.
    """

    def __init__(self, code: Code, text: str, *, generation: int | None = None, last_seq: int | None = None) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text
        self.generation = generation
        self.last_seq = last_seq

    def __str__(self) -> str:
        return f"{self.code.word}: {self.text}"

    def __reduce__(self) -> tuple[Any, ...]:
        """As in :class:`Refused`."""
        return partial(Broken, generation=self.generation, last_seq=self.last_seq), (self.code, self.text)


class Unanswered(RecurdError, TimeoutError):
    """No answer within the time-out, or none any more. The request may or may not have been carried out, or be yet.

    A chunk keeps its place in its stream, so it is not to be pushed again; the results of later ones say that it ran. A
    stream that was cut off or taken over (the text says so) keeps nothing: what was sent may have been run,
    and who resumes it sees by its last number.
    """
