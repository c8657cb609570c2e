"""Key files: pairs of CURVE keys, written once and held against their own form when they are read.

The form is that of pyzmq and CZMQ (a ZPL file with the section ``curve``), so that their tools read ours and we theirs.
``NAME.key`` holds the public key and may be given to anybody, ``NAME.key_secret`` holds both and is its owner's alone.
A key is 40 characters of Z85.
"""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import zmq

from recurd.config import TENANT_NAME
from recurd.errors import KeyFileError

PUBLIC_SUFFIX = ".key"
SECRET_SUFFIX = ".key_secret"
_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_LINE = re.compile(r"""\s+(public|secret)-key\s*=\s*(["'])(.*)\2\s*""")
#: More than this is no key file.
_MAX_BYTES = 65_536


@dataclass(frozen=True, slots=True, repr=False)
class Pair:
    """A public key and its secret one, as text. The ``repr`` keeps quiet about the secret."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"<key pair {self.public}>"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client needs: its own keys, and the daemon's public one, which says that it is the daemon."""

    pair: Pair
    server: str

    def options(self) -> dict[int, bytes]:
        """Socket options of a connection that uses them."""
        return {
            zmq.CURVE_SERVERKEY: self.server.encode(),
            zmq.CURVE_PUBLICKEY: self.pair.public.encode(),
            zmq.CURVE_SECRETKEY: self.pair.secret.encode(),
        }


def read_credentials(key: str | Path | None, server_key: str | Path | None) -> Credentials | None:
    """Credentials from a ``.key_secret`` file and the daemon's public key (a ``.key`` file, or the key itself).

    ``None`` for neither. Raises :class:`KeyFileError` for a file that is not good, ValueError for one alone.
    """
    if key is None and server_key is None:
        return None
    if key is None or server_key is None:
        raise ValueError("key (one's own) and server_key (the daemon's public one) are needed both, or neither")
    server = server_key if isinstance(server_key, str) and is_key(server_key) else read_public(Path(server_key))
    return Credentials(read_pair(Path(key)), server)


def is_key(text: str) -> bool:
    """Whether a text has the form of a key."""
    return _KEY.fullmatch(text) is not None


def new(name: str, directory: Path) -> tuple[Path, Path]:
    """Make a pair of keys and write ``NAME.key`` and ``NAME.key_secret`` (mode 0600); their paths.

    The directory is made (mode 0700) when it is not there, the one it is in is not: a slip would put a secret where
    nobody looks for it. Raises :class:`KeyFileError`, also where one of the files exists.
    """
    if not TENANT_NAME.fullmatch(name):
        raise KeyFileError(
            f"'{name}' cannot be a key's name: 1 to 64 of A-Z a-z 0-9 . _ @ + -, the first a letter or digit"
        )
    public_path, secret_path = directory / (name + PUBLIC_SUFFIX), directory / (name + SECRET_SUFFIX)
    public, secret = (key.decode() for key in zmq.curve_keypair())
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        for path in (public_path, secret_path):
            if path.exists():
                raise FileExistsError(path)
        # The secret first: a public key without one would be a name that cannot be used any more.
        _write(secret_path, 0o600, f"secret key of {name}: show it to nobody", public, secret)
        _write(public_path, 0o644, f"public key of {name}: may be given to anybody", public)
    except FileExistsError as error:
        raise KeyFileError(f"there is a key '{name}' in {directory} already, and keys are never overwritten") from error
    except OSError as error:
        raise KeyFileError(f"{error.filename or directory}: cannot be written: {error.strerror}") from error
    return public_path, secret_path


def _write(path: Path, mode: int, comment: str, public: str, secret: str | None = None) -> None:
    lines = [f"#   recurd, {comment}", "", "metadata", "curve", f'    public-key = "{public}"']
    if secret is not None:
        lines.append(f'    secret-key = "{secret}"')
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with open(descriptor, "w", encoding="ascii") as file:
        os.fchmod(descriptor, mode)  # whatever the umask says
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(descriptor)


def read_public(path: Path) -> str:
    """The public key of a ``.key`` file. Raises :class:`KeyFileError` that names the file and what is wrong."""
    found, _ = _read(path)
    if "secret" in found:
        raise KeyFileError(
            f"{path}: holds a secret key too, which does not belong in a public file; give the .key file"
        )
    return _key(path, found, "public")


def read_pair(path: Path) -> Pair:
    """The keys of a ``.key_secret`` file. Raises :class:`KeyFileError` that names the file and what is wrong."""
    found, mode = _read(path)
    secret, public = _key(path, found, "secret"), _key(path, found, "public")
    if mode & stat.S_IRWXO:
        raise KeyFileError(f"{path}: everybody may read or change it (mode {stat.S_IMODE(mode):04o}): chmod 600 it")
    if zmq.curve_public(secret.encode()).decode() != public:
        raise KeyFileError(f"{path}: its public key is not that of its secret key; the file was changed or damaged")
    return Pair(public, secret)


def _read(path: Path) -> tuple[dict[str, str], int]:
    """The keys of a file, and its mode."""
    try:
        # A daemon does not wait for the other end of a pipe.
        with open(path, encoding="utf-8", opener=_open_now) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise KeyFileError(f"{path}: is no file")
            text = file.read(_MAX_BYTES)
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise KeyFileError(f"{path}: is no key file (not even text)") from error
    found: dict[str, str] = {}
    for line in text.splitlines():
        if match := _LINE.fullmatch(line):
            if match[1] in found:
                raise KeyFileError(f"{path}: has two {match[1]} keys")
            found[match[1]] = match[3]
    return found, mode


def _open_now(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _key(path: Path, found: dict[str, str], kind: str) -> str:
    key = found.get(kind)
    if key is None:
        raise KeyFileError(f"{path}: has no {kind} key; 'recurd keys new' writes such files")
    if not is_key(key):
        raise KeyFileError(f"{path}: its {kind} key is not 40 characters of Z85; the file was changed or damaged")
    return key
