"""The configuration: one frozen struct, every bound and time-out a named key with its unit.

``deploy/recurd.toml`` explains every key and lists its default. Unknown keys are refused, and every error is a
:class:`ConfigError` that names the file and the key.
"""

import difflib
import ipaddress
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec

from recurd.errors import ConfigError

#: sun_path of a Unix socket has 108 bytes, one of them for the final zero.
MAX_IPC_PATH_BYTES = 107

Count = Annotated[int, msgspec.Meta(ge=1)]
CountOrZero = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
Rate = Annotated[float, msgspec.Meta(gt=0, le=1e15)]
#: A tenant's name, and so a key's: it is the first part of a topic and the name of a file.
#: What a tenant may subscribe to: a stream's topic, or all that begin so.
_TOPIC = re.compile(r"[^*?\[]*\*|[^/*?\[]+/[^/*?\[]+/[^*?\[]+")
TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
#: What a tenant may have.
Right = Literal["stream", "reset", "state", "admin"]
#: ZeroMQ takes it as milliseconds in 32 bits.
ShortSeconds = Annotated[float, msgspec.Meta(ge=0.1, le=2000)]


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model file. A relative ``path`` in a file is relative to that file's folder."""

    path: Annotated[str, msgspec.Meta(min_length=1)]
    #: Name that clients ask for; ``None``: the contract's.
    name: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    #: Streams whose state the device holds; ``None``: the top-level ``slots``.
    slots: Count | None = None
    #: Idle time-out of its streams; ``None``: that of ``timeouts``.
    stream_idle_seconds: Seconds | None = None


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a client, and all of them together, may ask for; beyond it stands a refusal with a code."""

    streams: Count = 100_000
    stream_credit: Count = 64
    queued_chunks: Count = 16_384
    queued_bytes: Count = 268_435_456
    queued_seconds: Seconds = 0.25
    host_state_bytes: CountOrZero = 4_294_967_296
    retained_bytes: Count = 1_073_741_824
    busy_retry_seconds: Seconds = 0.05
    chunk_steps: Count = 4096
    message_bytes: Annotated[int, msgspec.Meta(ge=1024, le=2**31 - 1)] = 16_777_216
    connections: Count = 4096
    name_bytes: Annotated[int, msgspec.Meta(ge=1, le=65_535)] = 255
    ended_streams: CountOrZero = 65_536


class Tick(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How chunks are put together for one run of the model."""

    rows: Count = 128
    steps: Count = 64
    padding_ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.25
    strict: bool = False
    receive_records: Count = 1024


class Timeouts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When something is given up."""

    stream_idle_seconds: Seconds = 86_400.0
    peer_idle_seconds: Seconds = 120.0
    shutdown_seconds: Seconds = 10.0
    keepalive_seconds: Annotated[int, msgspec.Meta(ge=1, le=600)] = 5
    handshake_seconds: ShortSeconds = 5.0
    stall_seconds: Seconds = 30.0
    http_seconds: Seconds = 5.0


class ZeroMQ(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The socket's own bounds (high-water marks count messages for each connection)."""

    io_threads: Count = 1
    send_high_water_mark: Count = 1000
    receive_high_water_mark: Count = 256
    backlog: Count = 512


class Durability(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What streams survive, and where they are kept."""

    #: ``off``: nothing; ``process``: the death of the daemon; ``power``: that of the machine too (each commit synced).
    mode: Literal["off", "process", "power"] = "off"
    #: Folder of the journal, made when it is not there; one daemon's only.
    directory: str = ""
    #: Whether to go on with streams that were left by other weights, another runtime or another device.
    accept_drift: bool = False


class Auth(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may connect to the tcp endpoints. Relative paths in a file are relative to that file's folder."""

    #: File with the daemon's own secret key; empty: nobody is authenticated. May start with ``$CREDENTIALS_DIRECTORY``.
    key: str = ""
    #: Folder of the public keys that are let in: ``NAME.key`` is that of tenant NAME.
    clients: str = ""


class TenantLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one tenant may take of the daemon; ``None``: nothing but what holds for all."""

    streams: Count | None = None
    #: Chunks and resets, on average; what was not used in the last second may come at once.
    chunks_per_second: Rate | None = None
    bytes_per_second: Rate | None = None
    #: Chunks waiting to be run.
    in_flight: Count | None = None
    #: Bytes of the results that are kept because it has not acknowledged them.
    retained_bytes: Count | None = None


class Tenant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one tenant may do. ``models`` and ``streams`` are globs over whole names."""

    #: Its public key, besides that of a file of its name in ``auth.clients``.
    key: str = ""
    models: tuple[str, ...] = ("*",)
    streams: tuple[str, ...] = ("*",)
    #: ``None``: stream, reset and state, and for the tenant ``local`` admin too.
    rights: tuple[Right, ...] | None = None
    #: Topics of published results besides its own: ``tenant/model/stream``, or one of them with ``*`` at its end.
    subscribe: tuple[str, ...] = ()
    limits: TenantLimits = TenantLimits()


class Reload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happens when the file of a model is replaced while streams run."""

    #: Streams with states that the new file cannot go on with: ``finish`` on the former one, or ``restart``: they end.
    incompatible: Literal["finish", "restart"] = "finish"


class Publish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Results for others than their sender."""

    #: Endpoints subscribers connect to; none: nothing is published.
    bind: tuple[str, ...] = ()
    #: Messages waiting for one subscriber; beyond, they are dropped for it.
    high_water_mark: Count = 10_000


class Log(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Log lines on standard error."""

    format: Literal["keyvalue", "json"] = "keyvalue"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration of a daemon.

    Decoded by :func:`load` or :func:`override`, which check what the types cannot say; a struct built by hand is not
    checked.
    """

    #: Endpoints clients connect to: ``tcp://host:port`` or ``ipc:///path``.
    bind: tuple[str, ...] = ("tcp://127.0.0.1:7070",)
    #: ``host:port`` of /metrics, /healthz and /readyz; empty: none.
    metrics: str = "127.0.0.1:9187"
    #: ``auto`` (the GPU when it can be had), ``cpu``, ``cuda`` (is ``cuda:0``) or ``cuda:N``.
    device: str = "auto"
    #: Threads of the model's run on the CPU; 0: all cores.
    threads: CountOrZero = 0
    slots: Count = 4096
    #: Whether to serve beyond this machine without authentication.
    insecure: bool = False
    models: tuple[Model, ...] = ()
    limits: Limits = Limits()
    tick: Tick = Tick()
    timeouts: Timeouts = Timeouts()
    zeromq: ZeroMQ = ZeroMQ()
    durability: Durability = Durability()
    auth: Auth = Auth()
    publish: Publish = Publish()
    #: By name.
    tenants: dict[str, Tenant] = {}
    reload: Reload = Reload()
    log: Log = Log()


def load(path: str | Path) -> Config:
    """Read a TOML file. Raises :class:`ConfigError`; models are looked for when they are loaded, not here."""
    path = Path(path)
    try:
        raw = msgspec.toml.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    config = _convert(raw, str(path))
    folder = path.absolute().parent
    models = tuple(msgspec.structs.replace(model, path=str(folder / model.path)) for model in config.models)
    auth = msgspec.structs.replace(
        config.auth, key=_placed(config.auth.key, folder), clients=_placed(config.auth.clients, folder)
    )
    return msgspec.structs.replace(config, models=models, auth=auth)


def _placed(path: str, folder: Path) -> str:
    """A path of a file, relative to its folder, unless there is none or it starts with a variable."""
    return path if not path or path.startswith("$") else str(folder / path)


def override(config: Config, changes: Mapping[str, Any], source: str = "command line") -> Config:
    """A configuration with some keys replaced, as a file would have them: ``{"slots": 8, "log": {"format": "json"}}``.

    A section's keys are replaced one by one, anything else as a whole. Raises :class:`ConfigError` naming ``source``.
    """
    raw: dict[str, Any] = msgspec.to_builtins(config)
    for key, value in changes.items():
        raw[key] = raw[key] | value if isinstance(value, Mapping) and key in raw else value
    return _convert(raw, source)


def changed(before: Config, now: Config, without: Collection[str]) -> list[str]:
    """Keys that differ, in order: those of sections as ``limits.streams``; ``without`` these sections."""
    found = []
    for name in Config.__struct_fields__:
        mine, theirs = getattr(before, name), getattr(now, name)
        if name in without or mine == theirs:
            continue
        if isinstance(mine, msgspec.Struct):
            keys = mine.__struct_fields__
            found += [f"{name}.{key}" for key in keys if getattr(mine, key) != getattr(theirs, key)]
        else:
            found.append(name)
    return found


def _convert(raw: dict[str, Any], source: str) -> Config:
    try:
        config = msgspec.convert(raw, Config)
        _check(config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_sentence(error, raw)}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    return config


def _sentence(error: msgspec.ValidationError, raw: dict[str, Any]) -> str:
    """msgspec's message with the key in front: ``limits.streams: expected `int` >= 1``."""
    text, _, place = str(error).partition(" - at `$")
    key = place.rstrip("`").lstrip(".")
    if key.startswith("tenants[...]"):
        key = key.replace("[...]", f".{_wrong_tenant(raw['tenants'])}", 1)
    text = text[:1].lower() + text[1:]
    if "invalid enum value" in text:
        section, _, name = key.partition(".")
        allowed = get_args(Right if section == "tenants" else get_type_hints(get_type_hints(Config)[section])[name])
        return f"{key}: {text.rpartition(' ')[2]} is not one of {', '.join(allowed)}"
    if "unknown field" in text:
        section, name = key and f" in [{key}]", text.split("`")[1]
        return f"{name}: there is no such key{section}{_nearest(name)}"
    if "required field" in text:
        return f"{key}: {text.split('`')[1]} is missing"
    return f"{key}: {text}"


def _nearest(name: str) -> str:
    """A hint at the key that was probably meant, and where it stands."""
    defaults = msgspec.structs.asdict(Config())
    sections: dict[str, type[msgspec.Struct]] = {"the file's head": Config, "[[models]]": Model}
    sections |= {f"[{key}]": type(value) for key, value in defaults.items() if isinstance(value, msgspec.Struct)}
    sections |= {"[tenants.NAME]": Tenant, "[tenants.NAME.limits]": TenantLimits}
    keys = [key for kind in sections.values() for key in kind.__struct_fields__]
    near = difflib.get_close_matches(name, keys, 1)
    places = [place for place, kind in sections.items() if near and near[0] in kind.__struct_fields__]
    return f"; there is '{near[0]}' in {', '.join(places)}" if near else ""


def _wrong_tenant(sections: dict[str, Any]) -> str:
    """Name of the first section that cannot be read: msgspec does not tell a dictionary's key."""
    for name, section in sections.items():
        try:
            msgspec.convert(section, Tenant)
        except msgspec.ValidationError:
            return name
    raise AssertionError("all sections can be read")


def _check(config: Config) -> None:
    """What the types cannot say. Raises :class:`ConfigError` that names the key."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", config.device):
        raise ConfigError(f"device: '{config.device}' is not one of auto, cpu, cuda, cuda:0, cuda:1, ...")
    if not config.bind:
        raise ConfigError("bind: at least one endpoint is needed")
    _check_endpoints(config)
    _check_tenants(config)
    if config.durability.mode != "off" and not config.durability.directory:
        raise ConfigError(f"durability.directory: mode '{config.durability.mode}' needs a folder to keep streams in")
    if config.metrics:
        split_address(config.metrics)
    for model in config.models:
        if model.name is not None and ("/" in model.name or not model.name.isprintable()):
            raise ConfigError(f"models.name: {model.name!a} is to be printable, and without '/'")
    for key, values in (
        ("bind", list(config.bind)),
        ("publish.bind", list(config.publish.bind)),
        ("models.path", [model.path for model in config.models]),
        ("models.name", [model.name for model in config.models if model.name]),
    ):
        for value in values:
            if values.count(value) > 1:
                raise ConfigError(f"{key}: '{value}' is there twice")


def _check_endpoints(config: Config) -> None:
    has_keys = bool(config.auth.key)
    for key, endpoints in (("bind", config.bind), ("publish.bind", config.publish.bind)):
        for endpoint in endpoints:
            check_endpoint(endpoint, key=key, insecure=config.insecure or has_keys)
            if has_keys and not config.insecure and endpoint.startswith("ipc://@"):
                raise ConfigError(
                    f"{key}: '{endpoint}' is no file and has no permissions, so everybody on this machine would get in "
                    "without a key; give a path, or allow it with 'insecure = true' (--insecure)"
                )


def _check_tenants(config: Config) -> None:
    for name in config.tenants:
        if not TENANT_NAME.fullmatch(name):
            allowed = "1 to 64 letters, digits and ._@+-, the first a letter or digit"
            raise ConfigError(f"tenants.{name}: a tenant's name has {allowed}")
        for topic in config.tenants[name].subscribe:
            if not _TOPIC.fullmatch(topic):
                raise ConfigError(
                    f"tenants.{name}.subscribe: '{topic}' is neither a topic (tenant/model/stream) nor the beginning "
                    "of topics with '*' behind it"
                )
    if config.auth.key:
        return
    if config.auth.clients:
        raise ConfigError("auth.clients: needs auth.key, the daemon's own secret key ('recurd keys new server')")
    for name in config.tenants:
        if name != "local":
            raise ConfigError(f"tenants.{name}: without auth.key nobody is this tenant, all are 'local'")


def check_endpoint(endpoint: str, *, key: str, insecure: bool) -> None:
    """Hold an endpoint of ``key`` against ``tcp://host:port`` and ``ipc:///path``. Raises :class:`ConfigError`."""
    scheme, _, address = endpoint.partition("://")
    if scheme == "tcp":
        host, _ = split_address(address, key=key, shown=endpoint, wildcard=True)
        if not insecure and not _is_loopback(host):
            raise ConfigError(
                f"{key}: '{endpoint}' can be reached from other machines and nobody would be authenticated; set "
                "auth.key (--key), bind to 127.0.0.1 or ipc://, or allow it with 'insecure = true' (--insecure)"
            )
    elif scheme == "ipc":
        if not address.startswith(("/", "@")) or address == "/":
            raise ConfigError(f"{key}: '{endpoint}' needs an absolute path: ipc:///run/recurd/recurd.sock")
        if len(address.encode()) > MAX_IPC_PATH_BYTES:
            raise ConfigError(f"{key}: the path of '{endpoint}' is over {MAX_IPC_PATH_BYTES} bytes")
    else:
        raise ConfigError(f"{key}: '{endpoint}' is neither tcp://host:port nor ipc:///path")


def split_address(
    address: str, *, key: str = "metrics", shown: str | None = None, wildcard: bool = False
) -> tuple[str, int]:
    """``host:port`` or ``[host]:port`` as host and port (0: any free one; with ``wildcard`` also written ``*``).

    Raises :class:`ConfigError` naming ``key``.
    """
    host, separator, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if wildcard and port == "*":
        port = "0"
    valid_port = port.isascii() and port.isdigit() and int(port) <= 65_535
    if not separator or not host or not valid_port or (":" in host and not bracketed):
        raise ConfigError(f"{key}: '{shown or address}' is not host:port (an IPv6 address goes in brackets)")
    return host.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    if host in ("localhost", "lo"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
