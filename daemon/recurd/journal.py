"""Durable streams: what a daemon that was killed goes on from. The only module with LMDB.

Every round of the daemon's loop commits, in one transaction and before anything is sent, all streams whose records were
answered in it: generation, last seq, state, and the answers that a client may ask for again. So whatever a client has
been told stands on disk, and what it was not told has not happened.

``process``: commits are in the page cache and survive the death of the process. ``power``: each is synced to the disk.

The store is a folder with an LMDB environment of five tables: ``meta`` (format, number of commits, where a drained
daemon sends its clients, and one :class:`~recurd.saving.Stamp` a version of a model), ``streams`` (by handle, what
seldom changes), ``states`` (by handle, what every record changes: numbers, answers, state), ``answers`` (by handle and
seq, those that are too much to be written with every state) and ``endings`` (by handle, how streams ended, so that who
comes late is told by the next daemon too).

LMDB trusts what it reads. So every value starts with its XXH3 (seeded by its key's CRC-32), and the number of commits
stands in ``recurd.lock`` too: damage to the page that names the last transaction would make LMDB go on from the one
before it without a word. ``python -m recurd.journal FOLDER`` reads a whole store that no daemon has open, commits once,
and says what is wrong with it.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import lmdb
import msgspec
import xxhash

from recurd.endings import Ended, Redirect
from recurd.errors import CheckEnded, JournalError
from recurd.saving import (
    SavedAnswer,
    SavedStream,
    Saving,
    Stamp,
    divided,
    forgotten,
    generation_of,
    held_by,
    identity,
)
from recurd.streams import Stream
from recurd.wire import Buffer

#: Signals that damaged pages end a process with; others come from without.
_OF_DAMAGE = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL})
#: Of prctl(2): the signal that a process gets when its parent dies.
_PR_SET_PDEATHSIG = 1
_FORMAT = b"5"
_TABLES = (b"meta", b"streams", b"states", b"answers", b"endings")
_FORMAT_KEY = b"format"
_COMMITS_KEY = b"commits"
_REDIRECT_KEY = b"redirect"
_EXPECTED_KEY = b"expected"
_ORIGIN_KEY = b"origin"
_STAMP_PREFIX = b"model:"
#: The store grows by doubling from here; it is sparse, and address space costs nothing.
_FIRST_MAP_BYTES = 1 << 28
_CHECKSUM_BYTES = 8
#: A disk with less room than this is full.
_NEXT_TO_NOTHING_BYTES = 1 << 20
_COMMITS = struct.Struct("<Q")
#: The number of commits in the lock file.
_NOTE_DIGITS = 20
_HANDLE = struct.Struct(">Q")
_ANSWER = struct.Struct(">QQ")
#: Head (checksum aside) of an answer apart: its generation and the length of its header.
_ANSWER_HEAD = struct.Struct("<IH")
#: Head (checksum aside) of a state: seq, acked, seq up to which answers stand apart, generation, number of answers, and
#: whether there is a state, or the stream starts from the initial one.
_STATE_HEAD = struct.Struct("<QQQIH?")
#: Of an answer in it: seq, generation, lengths of header and payload.
_BESIDE_HEAD = struct.Struct("<QIHI")


class _Identity(msgspec.Struct, frozen=True, array_like=True):
    """What seldom changes of a stream; see :class:`~recurd.saving.SavedStream`."""

    tenant: str
    name: str
    model: str
    version: str
    first_generation: int
    idle_timeout: float
    held: str

    @classmethod
    def of(cls, stream: Stream) -> "_Identity":
        """A stream's as it is now."""
        lane = stream.lane
        return cls(
            stream.tenant,
            stream.name,
            lane.name,
            lane.version,
            stream.first_generation,
            stream.idle_timeout,
            held_by(stream),
        )


class Journal:
    """The open store. Owns its folder, which no other process can open meanwhile."""

    def __init__(self, folder: Path, mode: Literal["process", "power"]) -> None:
        """Open a store, or make one. Raises :class:`JournalError`."""
        self._folder = folder
        self._lock = _lock(folder)
        try:
            check(folder, self._lock.fileno())
            self._env = _open(folder, sync=mode == "power")
            self._data = os.stat(folder / "data.mdb")
            with self._write() as transaction:
                self._meta, self._streams, self._states, self._answers, self._endings = (
                    self._env.open_db(name, txn=transaction) for name in _TABLES
                )
                self._check_format(transaction)
                self._commits = _commits(transaction, self._meta)
            self._note_commits()
        except BaseException:
            self._lock.close()
            raise

    @property
    def is_in_place(self) -> bool:
        """Whether the files that are written are still those in the folder: nobody has deleted or replaced them."""
        try:
            return os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self._folder / "recurd.lock")) and (
                os.path.samestat(self._data, os.stat(self._folder / "data.mdb"))
            )
        except OSError:
            return False

    def close(self) -> None:
        """Sync and let go of the folder."""
        self._env.sync(True)
        self._env.close()
        self._lock.close()

    def _check_format(self, transaction: Any) -> None:
        found = transaction.get(_FORMAT_KEY, db=self._meta)
        if found is None:
            transaction.put(_FORMAT_KEY, _pack(_FORMAT_KEY, _FORMAT), db=self._meta)
        elif found != _pack(_FORMAT_KEY, _FORMAT):
            raise JournalError(f"{self._folder}: holds streams in a format that is not known here")

    @contextlib.contextmanager
    def _write(self) -> Iterator[Any]:
        """A transaction that writes a little. Raises :class:`JournalError` when it cannot; then nothing was written."""
        try:
            with self._env.begin(write=True) as transaction:
                yield transaction
        except lmdb.Error as error:
            raise _unwritten(self._folder, error) from error

    @contextlib.contextmanager
    def _read(self) -> Iterator[Any]:
        """A transaction that reads. Raises :class:`JournalError` for a store that is damaged."""
        try:
            with self._env.begin() as transaction:
                yield transaction
        except (lmdb.Error, msgspec.MsgspecError, struct.error) as error:
            raise JournalError(f"{self._folder}: the journal is damaged: {_words(error)}") from error

    # --- start ---

    def stamps(self) -> dict[tuple[str, str], Stamp]:
        """What the states of the stored streams depend on, by model and the version that they are stored under.

        Raises :class:`JournalError` for a store that is damaged.
        """
        with self._read() as transaction:
            in_use = {(stream.model, stream.version) for _, stream in self._read_identities(transaction)}
            return {
                (name, version): self._read_stamp(transaction, _stamp_key(name, version), name)
                for name, version in sorted(in_use)
            }

    def _read_stamp(self, transaction: Any, key: bytes, name: str) -> Stamp:
        return msgspec.json.decode(_unpack(key, transaction.get(key, db=self._meta), f"model '{name}'"), type=Stamp)

    def stamp(
        self,
        stamps: Mapping[str, Stamp],
        former: Mapping[tuple[str, str], Stamp] | None = None,
        *,
        accept_drift: bool,
    ) -> list[str]:
        """Hold the models to be served against those the stored streams were run by, and note them.

        ``former``: those that streams of other versions finish on, by model and version. Returns what differs and was
        accepted, in words. Raises :class:`JournalError` where stored streams would not be resumed as they were left: by
        a model that is missing, whose states are others, or, without ``accept_drift``, whose weights, runtime or device
        are others.
        """
        drift = []
        former = former or {}
        in_use = self.stamps()
        with self._write() as transaction:
            for (name, version), stored in in_use.items():
                now = former.get((name, stored.version)) or stamps.get(name)
                difference = self._held_against(name, stored, now)
                if difference is None or now is None:
                    continue
                if not accept_drift:
                    raise JournalError(
                        f"{self._folder}: streams of model '{name}' were left by another one ({difference}); their "
                        f"results would differ from then on; --accept-drift goes on all the same"
                    )
                drift.append(f"{name}: {difference}")
                # Streams that do not run before the next start are not saved again, and held against the same stamp.
                self._put_stamp(transaction, _stamp_key(name, version), now)
            for name, stamp in stamps.items():
                self._put_stamp(transaction, _stamp_key(name, stamp.version), stamp)
        return drift

    def note_version(self, name: str, stamp: Stamp) -> None:
        """Streams of another version of a model are saved from now on. Raises :class:`JournalError`."""
        with self._write() as transaction:
            self._put_stamp(transaction, _stamp_key(name, stamp.version), stamp)

    def _put_stamp(self, transaction: Any, key: bytes, stamp: Stamp) -> None:
        transaction.put(key, _pack(key, msgspec.json.encode(stamp)), db=self._meta)

    def _held_against(self, name: str, stored: Stamp, now: Stamp | None) -> str | None:
        if now is None:
            raise JournalError(
                f"{self._folder}: holds streams of model '{name}', which is not served; serve it too, or give another "
                f"folder to start without them"
            )
        if now.layout != stored.layout:
            raise JournalError(
                f"{self._folder}: the states of model '{name}' have other types or shapes than those of its streams; "
                f"serve the former file, or give another folder to start without them"
            )
        return now.difference(stored)

    def load(self) -> Iterator[tuple[int, SavedStream, list[SavedAnswer]]]:
        """All streams: handle, the stream, and its answers that were not acknowledged, oldest first.

        Raises :class:`JournalError` for a store that is damaged.
        """
        with self._read() as transaction:
            apart: dict[int, list[SavedAnswer]] = {}
            for handle, answer in self._read_answers(transaction):
                apart.setdefault(handle, []).append(answer)
            for handle, identity in self._read_identities(transaction):
                stream, beside = _stream(identity, self._read_state(transaction, handle))
                answers = [one for one in apart.get(handle, []) if one[0] <= stream.apart] + beside
                yield handle, stream, [one for one in answers if one[0] > stream.acked]

    def endings(self) -> Iterator[tuple[int, Ended]]:
        """Handles of streams that ended, and how, the first one first. Raises :class:`JournalError`."""
        with self._read() as transaction:
            found = [
                (msgspec.msgpack.decode(_unpack(key, value, "an ending"), type=tuple[int, int, Ended]), key)
                for key, value in transaction.cursor(db=self._endings)
            ]
        for (_, _, ended), key in sorted(found, key=lambda one: one[0][:2]):
            yield _HANDLE.unpack(key)[0], ended

    def redirect(self) -> Redirect | None:
        """Where all are sent who ask for a stream that is not here. Raises :class:`JournalError`."""
        redirect: Redirect | None = self._read_meta(_REDIRECT_KEY, "where streams are sent to", Redirect | None)
        return redirect

    def origin(self, epoch: str) -> str:
        """The epoch of the start at which the journal was begun: the one given, where it is new.

        Raises :class:`JournalError`.
        """
        with self._write() as transaction:
            value = transaction.get(_ORIGIN_KEY, db=self._meta)
            if value is not None:
                return _unpack(_ORIGIN_KEY, value, "who began it").decode()
            transaction.put(*_entry(_ORIGIN_KEY, epoch.encode()), db=self._meta)
        return epoch

    def expected(self) -> dict[str, str]:
        """Daemons that streams are to come from: endpoints by origin. Raises :class:`JournalError`."""
        return self._read_meta(_EXPECTED_KEY, "who streams are to come from", dict[str, str]) or {}

    def _read_meta(self, key: bytes, what: str, type: Any) -> Any:
        """What stands there; ``None``: nothing yet."""
        with self._read() as transaction:
            value = transaction.get(key, db=self._meta)
            return None if value is None else msgspec.msgpack.decode(_unpack(key, value, what), type=type)

    def states(self, handles: list[int]) -> list[bytes]:
        """The states of streams as they were saved last, none of them at a fresh start.

        Raises :class:`JournalError` where one cannot be read.
        """
        states = []
        with self._read() as transaction:
            for handle in handles:
                state = _state(self._read_state(transaction, handle))[-1]
                if state is None:
                    raise JournalError(f"the journal is damaged: stream {handle} has no state")
                states.append(state)
        return states

    def _read_identities(self, transaction: Any) -> Iterator[tuple[int, _Identity]]:
        for key, value in transaction.cursor(db=self._streams):
            (handle,) = _HANDLE.unpack(key)
            yield handle, msgspec.msgpack.decode(_unpack(key, value, f"stream {handle}"), type=_Identity)

    def _read_state(self, transaction: Any, handle: int) -> bytes:
        key = _HANDLE.pack(handle)
        return _unpack(key, transaction.get(key, db=self._states), f"the state of stream {handle}")

    def _read_answers(self, transaction: Any) -> Iterator[tuple[int, SavedAnswer]]:
        for key, value in transaction.cursor(db=self._answers):
            handle, seq = _ANSWER.unpack(key)
            data = _unpack(key, value, f"answer {seq} of stream {handle}")
            generation, size = _ANSWER_HEAD.unpack_from(data)
            start = _ANSWER_HEAD.size
            yield handle, (seq, generation, data[start : start + size], data[start + size :])

    # --- commits ---

    def commit(self, saving: Saving, states: Mapping[int, bytes]) -> None:
        """Write what changed, in one transaction; ``states`` by handle, of the streams that are not fresh.

        Raises :class:`JournalError` when it cannot be written; then it is to be given again, and may be.
        """
        changes = _Changes()
        for stream in saving.streams:
            changes.add(stream, states.get(stream.handle))
        for stream, how in saving.ended:
            changes.end(stream, how, self._commits)
        changes.endings_gone += map(_HANDLE.pack, saving.endings_gone)
        changes.redirects = saving.redirects
        changes.expected = saving.expected
        while True:
            try:
                self._put(changes)
                break
            except lmdb.MapFullError:
                self._grow()
            except lmdb.Error as error:
                raise _unwritten(self._folder, error) from error
        self._commits += 1
        self._note_commits()

    def _note_commits(self) -> None:
        """Note a commit that stands: a number that is too low says less, one that is too high a falsehood."""
        try:
            os.pwrite(self._lock.fileno(), b"%0*d\n" % (_NOTE_DIGITS, self._commits), 0)
        except OSError as error:
            raise JournalError(f"{self._folder}: cannot be written: {error.strerror}") from error

    def _put(self, changes: "_Changes") -> None:
        with self._env.begin(write=True) as transaction:
            # First what is gone: a stream may come back, from another daemon, in the round in which it ended.
            for key in changes.gone:
                transaction.delete(key, db=self._answers)
            for key in changes.ended:
                transaction.delete(key, db=self._streams)
                transaction.delete(key, db=self._states)
            transaction.cursor(db=self._states).putmulti(changes.states)
            for table, entries in (
                (self._streams, changes.streams),
                (self._answers, changes.answers),
                (self._endings, changes.endings),
            ):
                if entries:
                    transaction.cursor(db=table).putmulti(entries)
            for key in changes.endings_gone:
                transaction.delete(key, db=self._endings)
            if changes.redirects:
                transaction.put(*_entry(_REDIRECT_KEY, msgspec.msgpack.encode(changes.redirects[-1])), db=self._meta)
            if changes.expected is not None:
                transaction.put(*_entry(_EXPECTED_KEY, msgspec.msgpack.encode(changes.expected)), db=self._meta)
            number = _pack(_COMMITS_KEY, _COMMITS.pack(self._commits + 1))
            transaction.put(_COMMITS_KEY, number, db=self._meta)

    def _grow(self) -> None:
        try:
            self._env.set_mapsize(2 * self._env.info()["map_size"])
        except lmdb.Error as error:
            raise JournalError(f"{self._folder}: cannot grow: {_words(error)}") from error


class _Changes:
    """What a transaction writes: keys and values by table, and keys that are no more."""

    def __init__(self) -> None:
        self.streams: list[tuple[bytes, bytes]] = []
        self.states: list[tuple[bytes, bytes]] = []
        self.answers: list[tuple[bytes, bytes]] = []
        self.endings: list[tuple[bytes, bytes]] = []
        self.gone: list[bytes] = []
        self.ended: list[bytes] = []
        self.endings_gone: list[bytes] = []
        self.redirects: list[Redirect | None] = []
        self.expected: dict[str, str] | None = None

    def add(self, stream: Stream, state: bytes | None) -> None:
        """A stream as it stands; ``state`` is ``None`` for one that is fresh."""
        key = _HANDLE.pack(stream.handle)
        if stream.stored != identity(stream):
            self.streams.append(_entry(key, msgspec.msgpack.encode(_Identity.of(stream))))
        if stream.forgotten < stream.apart:
            self.gone += [_ANSWER.pack(stream.handle, seq) for seq in forgotten(stream)]
        beside, apart = divided(stream)
        for seq, generation, (header, payload) in apart:
            value = b"".join((_ANSWER_HEAD.pack(generation, len(header)), header, payload))
            self.answers.append(_entry(_ANSWER.pack(stream.handle, seq), value))
        end = stream.answered if apart else stream.apart
        # A few at most, as even an empty one has a header.
        head = _STATE_HEAD.pack(
            stream.answered, stream.acked, end, generation_of(stream), len(beside), state is not None
        )
        parts: list[Buffer] = [head]
        for seq, generation, (header, payload) in beside:
            parts += (_BESIDE_HEAD.pack(seq, generation, len(header), len(payload)), header, payload)
        parts.append(state or b"")
        self.states.append(_entry(key, b"".join(parts)))

    def end(self, stream: Stream, how: Ended | None, commits: int) -> None:
        """A stream that has ended; ``how``: ``None`` where nobody is to know of it. ``commits`` there were before."""
        key = _HANDLE.pack(stream.handle)
        self.gone += [_ANSWER.pack(stream.handle, seq) for seq in range(stream.forgotten + 1, stream.apart + 1)]
        self.ended.append(key)
        if how is not None:
            # With the order in which they ended.
            self.endings.append(_entry(key, msgspec.msgpack.encode((commits, len(self.endings), how))))


def _state(value: bytes) -> tuple[tuple[Any, ...], list[SavedAnswer], bytes | None]:
    """Head, answers and state of a value in ``states``. Raises ``struct.error``."""
    head = _STATE_HEAD.unpack_from(value)
    *_, count, has_state = head
    answers: list[SavedAnswer] = []
    at = _STATE_HEAD.size
    for _ in range(count):
        seq, generation, header, payload = _BESIDE_HEAD.unpack_from(value, at)
        start, end = at + _BESIDE_HEAD.size, at + _BESIDE_HEAD.size + header
        at = end + payload
        answers.append((seq, generation, value[start:end], value[end:at]))
    return head, answers, value[at:] if has_state else None


def _stream(identity: _Identity, value: bytes) -> tuple[SavedStream, list[SavedAnswer]]:
    """A stream, and the answers beside it."""
    (seq, acked, end, generation, _, _), answers, state = _state(value)
    return SavedStream(
        identity.tenant,
        identity.name,
        identity.model,
        identity.first_generation,
        generation,
        seq,
        acked,
        identity.idle_timeout,
        state,
        identity.held,
        identity.version,
        end,
    ), answers


def _stamp_key(name: str, version: str) -> bytes:
    # A model's name has no characters that cannot be printed.
    return _STAMP_PREFIX + f"{name}\0{version}".encode()


def _pack(key: bytes, data: bytes) -> bytes:
    return xxhash.xxh3_64_digest(data, zlib.crc32(key)) + data


def _entry(key: bytes, data: bytes) -> tuple[bytes, bytes]:
    return key, _pack(key, data)


def _unpack(key: bytes, value: bytes | None, what: str) -> bytes:
    """A value without its checksum. Raises :class:`JournalError` when it is not there or not what was written."""
    if value is None or _pack(key, data := value[_CHECKSUM_BYTES:]) != value:
        raise JournalError(f"the journal is damaged: {what} is not what was written")
    return data


def _commits(transaction: Any, meta: Any) -> int:
    """How many there were. Raises :class:`JournalError`."""
    value = transaction.get(_COMMITS_KEY, db=meta)
    return 0 if value is None else int(_COMMITS.unpack(_unpack(_COMMITS_KEY, value, "the number of commits"))[0])


# --- opening ---


def _lock(folder: Path) -> Any:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Not emptied: another daemon may hold it, and the number of commits stands in it.
        descriptor = os.open(folder / "recurd.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        lock = os.fdopen(descriptor, "r+b", buffering=0)
    except FileExistsError as error:
        raise JournalError(f"{folder}: is a file, and the journal is a folder") from error
    except OSError as error:
        raise JournalError(f"{folder}: cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise JournalError(f"{folder}: another daemon keeps its streams there") from error
    return lock


def _noted(folder: Path) -> int:
    """How many commits there were at least. Raises :class:`JournalError`."""
    try:
        note = (folder / "recurd.lock").read_bytes()
    except FileNotFoundError:
        return 0  # data.mdb was taken elsewhere without it
    if note and not (len(note) == _NOTE_DIGITS + 1 and note[:-1].isdigit()):
        raise JournalError(
            f"{folder}: the journal is damaged: recurd.lock holds no number of commits; to go on from data.mdb "
            "as it is, delete recurd.lock"
        )
    return int(note or 0)


def _open(folder: Path, *, sync: bool = True) -> lmdb.Environment:
    data = folder / "data.mdb"
    is_new = not data.exists()
    size = 0 if is_new else data.stat().st_size
    try:
        # A full disk would end a process that writes to a mapped file with SIGBUS instead of an error: so no writemap,
        # and no lock file of LMDB's own. One thread of one process has the folder, and reads nothing while it writes.
        return lmdb.open(
            str(folder),
            lock=False,
            max_dbs=len(_TABLES),
            map_size=max(_FIRST_MAP_BYTES, 2 * size),
            sync=sync,
            metasync=sync,
            readahead=False,
            meminit=False,
            mode=0o600,
        )
    except lmdb.Error as error:
        if is_new:  # on a full disk an empty file is made, which would be taken for one that lost all it had
            data.unlink(missing_ok=True)
        what = "cannot be opened" if _is_of_system(error) else "the journal is damaged"
        raise JournalError(f"{folder}: {what}: {_words(error)}") from error


def _is_of_system(error: lmdb.Error) -> bool:
    """Whether it is an error of the file system; those of a store have a class each."""
    return type(error) in (lmdb.Error, lmdb.DiskError)


def _unwritten(folder: Path, error: lmdb.Error) -> JournalError:
    """What could not be written, and why."""
    words = _words(error)
    if words == os.strerror(errno.EIO):
        # So LMDB calls a write that found room for a part of it only.
        with contextlib.suppress(OSError):
            disk = os.statvfs(folder)
            if disk.f_bavail * disk.f_frsize < _NEXT_TO_NOTHING_BYTES:
                words = os.strerror(errno.ENOSPC)
    return JournalError(f"{folder}: cannot be written: {words}")


def _words(error: Exception) -> str:
    """What the system says, without the library's own function names."""
    return str(error).rpartition(": ")[2]


def check(folder: Path, lock: int) -> None:
    """Read a whole store, if there is one, in a process of its own: damaged pages end the process that reads them.

    ``lock``: the descriptor that holds the folder. Raises :class:`JournalError` with what is wrong.
    """
    data = folder / "data.mdb"
    if not data.exists():
        if _noted(folder):
            raise JournalError(
                f"{folder}: the journal is damaged: there is a recurd.lock, and no data.mdb; to begin without streams, "
                "delete recurd.lock"
            )
        return
    if not data.stat().st_size:
        raise JournalError(f"{folder}: the journal is damaged: data.mdb is empty")
    command = [sys.executable, "-m", "recurd.journal", str(folder), str(lock)]
    # It writes: with the lock, so that no other daemon does meanwhile, should this process die. In a process group of
    # its own: Ctrl-C is ours to answer.
    done = subprocess.run(command, capture_output=True, text=True, check=False, pass_fds=[lock], process_group=0)
    if -done.returncode in _OF_DAMAGE:
        raise JournalError(f"{folder}: the journal is damaged: reading it ends with signal {-done.returncode}")
    if done.returncode < 0:
        raise CheckEnded(
            f"{folder}: the journal is not checked: signal {-done.returncode} ended the process that read it"
        )
    if done.returncode:
        raise JournalError(f"{folder}: {done.stderr.strip().splitlines()[-1].removeprefix(f'{folder}: ')}")


def _read_through(folder: Path) -> None:
    """All of it, in this process. Raises :class:`JournalError`."""
    env = _open(folder)
    info, size = env.info(), os.path.getsize(folder / "data.mdb")
    needed = (info["last_pgno"] + 1) * env.stat()["psize"]
    if size < needed:
        raise JournalError(f"the journal is damaged: data.mdb has {size} bytes, and {needed} were written")
    noted = _noted(folder)
    try:
        if not env.stat()["entries"] and not noted:
            return  # made, and nothing committed
        with env.begin() as transaction:
            meta = env.open_db(b"meta", txn=transaction, create=False)
            if transaction.get(_FORMAT_KEY, db=meta) not in (None, _pack(_FORMAT_KEY, _FORMAT)):
                return  # it has other tables; whoever opens it says so
        _read_tables(env, noted)
        _commit_once(env, folder)
        _read_tables(env, noted)
    except lmdb.NotFoundError as error:
        raise JournalError("the journal is damaged: a table is missing") from error
    except lmdb.Error as error:
        raise JournalError(f"the journal is damaged: {_words(error)}") from error


def _commit_once(env: lmdb.Environment, folder: Path) -> None:
    """Only a commit shows whether the free pages are right, and the room within those that every commit changes.

    Raises ``lmdb.Error`` when they are not, and :class:`JournalError` when the disk is full, or does not work.
    """
    try:
        with env.begin(write=True) as transaction:
            transaction.put(*_entry(_FORMAT_KEY, _FORMAT), db=env.open_db(b"meta", txn=transaction))
    except lmdb.Error as error:
        if _is_of_system(error):
            raise _unwritten(folder, error) from error
        raise


def _read_tables(env: lmdb.Environment, noted: int) -> None:
    """Every page and every value. Raises :class:`JournalError` and ``lmdb.Error``."""
    with env.begin() as transaction, open(os.devnull, "wb") as nowhere:
        # A compacting copy goes through all pages, those that are free too, and counts them.
        env.copyfd(nowhere.fileno(), compact=True, txn=transaction)
        for name in _TABLES:
            table = env.open_db(name, txn=transaction, create=False)
            count = 0
            for key, value in transaction.cursor(db=table):
                _unpack(key, value, f"{name.decode()} {key.hex()}")
                count += 1
            if count != transaction.stat(table)["entries"]:
                raise JournalError(f"the journal is damaged: there is not all in table {name.decode()}")
            if name == b"meta" and (commits := _commits(transaction, table)) < noted:
                raise JournalError(
                    f"{noted} commits were made, and data.mdb stands after {commits} of them: the last ones are lost, "
                    f"or it is another one; to go on from there delete recurd.lock"
                )


def _main(folder: Path, has_lock: bool) -> None:
    """Read a store, in a process of its own. Raises :class:`JournalError`."""
    if has_lock:
        # As a part of the daemon that waits for it: it ends with it, and a signal to stop is that one's to answer.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        _read_through(folder)
    else:
        with _lock(folder):
            _read_through(folder)


if __name__ == "__main__":
    try:
        _main(Path(sys.argv[1]), has_lock=len(sys.argv) > 2)
    except JournalError as error:
        sys.exit(str(error))
