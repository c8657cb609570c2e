"""The configuration file: every key has a documented default, and what is wrong is named."""

import re
from pathlib import Path
from typing import Any

import pytest

from recurd.config import (
    Auth,
    Config,
    Durability,
    Limits,
    Log,
    Model,
    Publish,
    Reload,
    Tenant,
    TenantLimits,
    Tick,
    Timeouts,
    ZeroMQ,
    load,
    override,
    split_address,
)
from recurd.errors import ConfigError, ExitCode

SHIPPED = Path(__file__).parents[2] / "deploy" / "recurd.toml"
SECTIONS = {
    "limits": Limits,
    "tick": Tick,
    "timeouts": Timeouts,
    "zeromq": ZeroMQ,
    "durability": Durability,
    "auth": Auth,
    "publish": Publish,
    "reload": Reload,
    "log": Log,
}
EXAMPLES = {"models": Model, "tenants.gateway-7": Tenant, "tenants.gateway-7.limits": TenantLimits}


def write(folder: Path, text: str) -> Path:
    path = folder / "recurd.toml"
    path.write_text(text)
    return path


def test_the_shipped_file_decodes_to_the_defaults() -> None:
    assert load(SHIPPED) == Config()


def test_the_shipped_file_lists_every_key_and_explains_it() -> None:
    listed = keys_with_comments(SHIPPED.read_text())

    expected = {("", field) for field in Config.__struct_fields__ if field not in {*SECTIONS, "models", "tenants"}}
    for section, struct in SECTIONS.items():
        expected |= {(section, field) for field in struct.__struct_fields__}
    for section, struct in EXAMPLES.items():
        expected |= {(section, field) for field in struct.__struct_fields__ if field != "limits"}
    assert listed.keys() == expected
    assert [key for key, comment in listed.items() if not comment] == []


def keys_with_comments(text: str) -> dict[tuple[str, str], str]:
    """(section, key) -> the comment above it. The examples are commented out by one more '#'."""
    listed, section, comment = {}, "", ""
    for raw in text.splitlines():
        line = raw.removeprefix("# ") if raw.startswith("# [") or section in EXAMPLES else raw
        if line.startswith("["):
            section = line.strip("[]")
        elif line.startswith("#"):
            comment = line
        elif key := re.match(r"(\w+) = ", line):
            listed[section, key[1]] = comment
            comment = ""
    return listed


def test_the_shipped_examples_decode(tmp_path: Path) -> None:
    text = SHIPPED.read_text()
    example = re.sub("^# ?", "", text[text.index("# [[models]]") :], flags=re.MULTILINE)
    example = re.sub("^(?!#|\\[|\\w+ = ).*", "", example, flags=re.MULTILINE)

    config = load(write(tmp_path, "[auth]\nkey = 'server.key_secret'\n" + example))

    path = str(tmp_path / "models/pump.onnx")
    assert config.models == (Model(path=path, name="pump", slots=1024, stream_idle_seconds=3600),)
    assert config.tenants == {
        "gateway-7": Tenant(
            models=("pump*",),
            streams=("hall-3/*", "test-?"),
            rights=("stream", "reset"),
            subscribe=("gateway-8/pump/*",),
            limits=TenantLimits(
                streams=1000, chunks_per_second=5000, bytes_per_second=1e7, in_flight=2000, retained_bytes=10_000_000
            ),
        )
    }


def test_a_relative_model_path_starts_at_the_files_folder_and_an_absolute_one_stays(tmp_path: Path) -> None:
    path = write(tmp_path, '[[models]]\npath = "a.onnx"\n[[models]]\npath = "/srv/b.onnx"\n')

    assert [model.path for model in load(path).models] == [str(tmp_path / "a.onnx"), "/srv/b.onnx"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slot = 1", "slot: there is no such key; there is 'slots' in the file's head, [[models]]"),
        ("colour = 1", "colour: there is no such key"),
        ("queued_seconds = 1", "queued_seconds: there is no such key; there is 'queued_seconds' in [limits]"),
        ("[limits]\nstrams = 1", "strams: there is no such key in [limits]; there is 'streams' in [limits], [tenants"),
        ("[[models]]\npath = 'a'\nsots = 1", "sots: there is no such key in [models[0]]"),
        ("[[models]]\nname = 'a'", "models[0]: path is missing"),
        ("[[models]]\npath = 'a'\nname = 'a/b'", "models.name: 'a/b' is to be printable, and without '/'"),
        ('[[models]]\npath = "a"\nname = "a\\u0000"', "models.name: 'a\\x00' is to be printable, and without '/'"),
        ("[limits]\nstreams = 0", "limits.streams: expected `int` >= 1"),
        ("[limits]\nstreams = 'many'", "limits.streams: expected `int`, got `str`"),
        ("[timeouts]\nshutdown_seconds = 0.0", "timeouts.shutdown_seconds: expected `float` > 0.0"),
        ("[timeouts]\nshutdown_seconds = inf", "timeouts.shutdown_seconds: expected `float` <= 1"),
        ("[timeouts]\nshutdown_seconds = nan", "timeouts.shutdown_seconds: expected `float`"),
        ("[tick]\npadding_ratio = 1.5", "tick.padding_ratio: expected `float` <= 1.0"),
        ("[tenants.a]\n[tenants.b]\nrights = ['fly']", "tenants.b.rights[0]: 'fly' is not one of stream, reset, state"),
        ("[tenants.a]\nstrems = []", "strems: there is no such key in [tenants.a]"),
        ("[tenants.a.limits]\nstreams = 0", "tenants.a.limits.streams: expected `int` >= 1"),
        ("[tenants.'a/b']", "tenants.a/b: a tenant's name has 1 to 64 letters, digits and ._@+-"),
        ("[tenants.a]", "tenants.a: without auth.key nobody is this tenant, all are 'local'"),
        ("[auth]\nclients = 'c'", "auth.clients: needs auth.key, the daemon's own secret key"),
        ("tenants = 1", "tenants: expected `object`, got `int`"),
        ("[log]\nformat = 'xml'", "log.format: 'xml' is not one of keyvalue, json"),
        ("device = 'gpu'", "device: 'gpu' is not one of auto, cpu, cuda, cuda:0"),
        ("bind = []", "bind: at least one endpoint is needed"),
        ("bind = ['udp://127.0.0.1:1']", "bind: 'udp://127.0.0.1:1' is neither tcp://host:port nor ipc:///path"),
        ("bind = ['tcp://127.0.0.1']", "bind: 'tcp://127.0.0.1' is not host:port"),
        ("bind = ['tcp://127.0.0.1:70000']", "bind: 'tcp://127.0.0.1:70000' is not host:port"),
        ("bind = ['tcp://::1:7070']", "bind: 'tcp://::1:7070' is not host:port (an IPv6 address goes in brackets)"),
        ("bind = ['ipc://recurd.sock']", "bind: 'ipc://recurd.sock' needs an absolute path"),
        ("bind = ['tcp://lo:1', 'tcp://lo:1']", "bind: 'tcp://lo:1' is there twice"),
        ("metrics = '9187'", "metrics: '9187' is not host:port"),
        ("[[models]]\npath = 'a'\n[[models]]\npath = 'a'", "models.path: 'a' is there twice"),
        ("[[models]]\npath = 'a'\nname = 'x'\n[[models]]\npath = 'b'\nname = 'x'", "models.name: 'x' is there twice"),
        ("bind = [", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)

    with pytest.raises(ConfigError) as caught:
        load(path)

    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code is ExitCode.CONFIG


def test_a_file_that_is_not_there_or_no_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: there is no such file"):
        load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"metrics = '\xe9'")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(tmp_path / "latin.toml")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.1", "*", "[::]", "eth0", "example.org"])
def test_binding_beyond_loopback_needs_to_be_asked_for(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=r"nobody would be authenticated.*insecure = true"):
        load(write(tmp_path, f"bind = ['tcp://{host}:7070']"))

    config = load(write(tmp_path, f"insecure = true\nbind = ['tcp://{host}:7070']"))

    assert config.bind == (f"tcp://{host}:7070",)
    with pytest.raises(ConfigError, match=r" publish\.bind: .*nobody would be authenticated"):
        load(write(tmp_path, f"[publish]\nbind = ['tcp://{host}:7071']"))


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:*", "tcp://localhost:0", "tcp://[::1]:7070", "ipc:///run/x"])
def test_endpoints_of_this_machine_are_taken(endpoint: str) -> None:
    assert override(Config(), {"bind": [endpoint]}).bind == (endpoint,)


def test_an_ipc_path_has_at_most_107_bytes() -> None:
    longest = "ipc:///" + "x" * 106

    assert override(Config(), {"bind": [longest]}).bind == (longest,)
    with pytest.raises(ConfigError, match="is over 107 bytes"):
        override(Config(), {"bind": [longest + "x"]})


def test_overriding_replaces_single_keys_of_a_section() -> None:
    config = override(Config(), {"slots": 8, "log": {"format": "json"}, "models": [{"path": "a.onnx"}]})

    assert (config.slots, config.log, config.models) == (8, Log(format="json"), (Model(path="a.onnx"),))


@pytest.mark.parametrize("changes", [{"slots": 0}, {"slots": "8"}, {"nothing": 1}, {"log": {"level": "loud"}}])
def test_overriding_is_checked_like_a_file_and_names_its_source(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^command line: "):
        override(Config(), changes)


def test_host_and_port_are_split() -> None:
    assert split_address("127.0.0.1:0") == ("127.0.0.1", 0)
    assert split_address("[::1]:9187") == ("::1", 9187)


def test_a_configuration_cannot_be_changed() -> None:
    for struct in (Config(), Limits(), Tick(), Timeouts(), ZeroMQ(), Durability(), Log(), Model(path="a")):
        with pytest.raises(AttributeError):
            setattr(struct, struct.__struct_fields__[0], 1)


def test_a_socket_without_a_file_is_no_way_around_the_keys(tmp_path: Path) -> None:
    keys = '[auth]\nkey = "server.key_secret"\n'
    for text in ('bind = ["ipc://@x"]\n' + keys, keys + '[publish]\nbind = ["ipc://@x"]\n'):
        with pytest.raises(ConfigError, match=r"bind: 'ipc://@x' is no file .* without a key"):
            load(write(tmp_path, text))
    assert load(write(tmp_path, 'bind = ["ipc://@x"]\n')).bind == ("ipc://@x",)
    assert load(write(tmp_path, 'insecure = true\nbind = ["ipc://@x"]\n' + keys)).bind == ("ipc://@x",)


@pytest.mark.parametrize("topic", ["a/*/x", "a?/pump/*", "gateway-[78]/pump/*", "a/pump", "nonsense", ""])
def test_topics_that_nothing_can_have_are_not_taken(tmp_path: Path, topic: str) -> None:
    with pytest.raises(ConfigError, match=f"tenants.b.subscribe: '{re.escape(topic)}' is neither a topic"):
        load(write(tmp_path, f'[auth]\nkey = "k"\n[tenants.b]\nsubscribe = ["a/pump/s", "*", "a/*", "{topic}"]\n'))
