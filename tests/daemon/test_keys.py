"""Key files: written once, with the right permissions, and never believed when they are not good."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq
import zmq.auth
from click.testing import CliRunner

from recurd import config
from recurd.auth import read
from recurd.cli import main
from recurd.errors import AuthError, ExitCode, KeyFileError
from recurd.keys import Pair, new, read_credentials, read_pair, read_public


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_pair_can_be_read_and_its_secret_is_its_owners_alone(tmp_path: Path) -> None:
    public, secret = new("gateway-7", tmp_path / "keys")

    pair = read_pair(secret)

    assert (public.name, secret.name) == ("gateway-7.key", "gateway-7.key_secret")
    assert (mode(public), mode(secret), mode(tmp_path / "keys")) == (0o644, 0o600, 0o700)
    assert read_public(public) == pair.public
    assert pair.secret not in repr(pair) + public.read_text()


def test_a_slip_in_a_folders_name_puts_no_secret_there(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot be written: No such file"):
        new("gateway-7", tmp_path / "slip" / "keys")
    assert not (tmp_path / "slip").exists()


def test_the_files_are_those_of_pyzmq(tmp_path: Path) -> None:
    public, secret = new("ours", tmp_path)
    pair = read_pair(secret)
    assert zmq.auth.load_certificate(public) == (pair.public.encode(), None)
    assert zmq.auth.load_certificate(secret) == (pair.public.encode(), pair.secret.encode())

    theirs, their_secret = zmq.auth.create_certificates(tmp_path, "theirs")
    Path(their_secret).chmod(0o600)
    assert read_public(Path(theirs)) == read_pair(Path(their_secret)).public


@pytest.mark.parametrize("left", ["gateway-7.key", "gateway-7.key_secret"])
def test_nothing_is_overwritten_and_nothing_left_half(tmp_path: Path, left: str) -> None:
    new("gateway-7", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name == left}
    for path in tmp_path.iterdir():
        if path.name != left:
            path.unlink()

    with pytest.raises(KeyFileError, match=r"there is a key 'gateway-7' in .* already, and keys are never overwritten"):
        new("gateway-7", tmp_path)

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", "-d", "a b", "ä", "x" * 65, "a\n"])
def test_a_name_that_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyFileError, match="cannot be a key's name"):
        new(name, tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(KeyFileError, match=r"file.*: cannot be written: File exists|there is a key"):
        new("a", tmp_path / "file")


Damage = Callable[[str], str]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "", "has no secret key; 'recurd keys new' writes such files"),
        (lambda text: text.replace("secret-key", "sekret-key"), "has no secret key"),
        (lambda text: text.replace('"\n', '."\n'), "its secret key is not 40 characters of Z85"),
        (lambda text: text.replace("secret-key = ", "secret-key = '1234'\n    secret-key = "), "has two secret keys"),
        (lambda text: text + text, "has two public keys"),
        (
            lambda text: text.replace('public-key = "', 'public-key = "' + "0" * 40 + '"\n    x = "'),
            "is not that of its",
        ),
    ],
)
def test_a_file_that_was_tampered_with_is_told_in_a_sentence(tmp_path: Path, damage: Damage, message: str) -> None:
    _, secret = new("a", tmp_path)
    secret.write_text(damage(secret.read_text()))

    with pytest.raises(KeyFileError, match=message) as caught:
        read_pair(secret)

    assert str(caught.value).startswith(f"{secret}: ")
    assert caught.value.exit_code is ExitCode.AUTH == 77


def test_one_changed_character_of_a_secret_key_is_noticed(tmp_path: Path) -> None:
    _, secret = new("a", tmp_path)
    text = secret.read_text()
    place = text.index('secret-key = "') + 20
    secret.write_text(text[:place] + ("0" if text[place] != "0" else "1") + text[place + 1 :])

    with pytest.raises(KeyFileError, match="its public key is not that of its secret key"):
        read_pair(secret)


def test_a_secret_key_that_everybody_may_read_is_not_used(tmp_path: Path) -> None:
    _, secret = new("a", tmp_path)
    secret.chmod(0o644)
    with pytest.raises(KeyFileError, match=r"everybody may read or change it \(mode 0644\): chmod 600 it"):
        read_pair(secret)

    secret.chmod(0o640)  # a group's, as systemd gives credentials
    read_pair(secret)


def test_files_that_are_none_of_keys_are_told(tmp_path: Path) -> None:
    public, secret = new("a", tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff" * 100)
    for path, message in (
        (tmp_path / "none", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / "binary", r"is no key file \(not even text\)"),
        (secret, "holds a secret key too, which does not belong in a public file"),
    ):
        with pytest.raises(KeyFileError, match=message):
            read_public(path)
    with pytest.raises(KeyFileError, match="has no secret key"):
        read_pair(public)


def test_credentials_take_the_servers_key_as_a_file_or_as_it_is(tmp_path: Path) -> None:
    public, _ = new("server", tmp_path)
    _, secret = new("a", tmp_path)
    key = read_public(public)

    assert read_credentials(None, None) is None
    for server_key in (public, str(public), key):
        credentials = read_credentials(secret, server_key)
        assert credentials is not None
        assert (credentials.server, credentials.pair) == (key, read_pair(secret))
    with pytest.raises(ValueError, match="are needed both, or neither"):
        read_credentials(secret, None)


# --- who is let in ---


def settings(tmp_path: Path) -> config.Auth:
    new("server", tmp_path)
    return config.Auth(key=str(tmp_path / "server.key_secret"), clients=str(tmp_path / "clients"))


def test_a_keys_file_name_and_a_section_say_whose_it_is(tmp_path: Path) -> None:
    auth = settings(tmp_path)
    one, _ = new("gateway-7", tmp_path / "clients")
    two, _ = new("spare", tmp_path)
    (tmp_path / "clients" / "README").write_text("not a key")

    keys, users = read(auth, {"gateway-7": config.Tenant(key=read_public(two)), "other": config.Tenant()})

    assert keys == read_pair(tmp_path / "server.key_secret")
    assert users == {read_public(one): "gateway-7", read_public(two): "gateway-7"}
    assert read(config.Auth(), {}) == (None, None)


def test_what_cannot_be_a_tenants_key_stops_the_start(tmp_path: Path) -> None:
    auth = settings(tmp_path)
    with pytest.raises(KeyFileError, match="clients: cannot be read: No such file"):
        read(auth, {})
    file, _ = new("a", tmp_path / "clients")
    key = read_public(file)

    with pytest.raises(AuthError, match=r"tenants\.b\.key: tenant 'a' has this key already"):
        read(auth, {"b": config.Tenant(key=key)})
    with pytest.raises(AuthError, match=r"tenants\.b\.key: 'x' is not 40 characters of Z85"):
        read(auth, {"b": config.Tenant(key="x")})
    file.rename(file.with_name("local.key"))
    with pytest.raises(AuthError, match=r"local\.key: 'local' cannot be the name of a tenant with a key"):
        read(auth, {})
    (tmp_path / "clients" / "local.key").rename(tmp_path / "clients" / "b.key")
    (tmp_path / "clients" / "c.key").write_text("")
    with pytest.raises(KeyFileError, match=r"c\.key: has no public key"):
        read(auth, {})


def test_the_daemons_key_may_be_a_credential_of_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auth = config.Auth(key="$CREDENTIALS_DIRECTORY/server.key_secret")
    _, secret = new("server", tmp_path)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(AuthError, match=r"auth\.key: \$CREDENTIALS_DIRECTORY is not set; LoadCredential="):
        read(auth, {})

    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))

    assert read(auth, {}) == (read_pair(secret), {})


# --- recurd keys ---


def recurd(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["keys", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_makes_shows_and_lists_keys(tmp_path: Path) -> None:
    status, out, _ = recurd("new", "gateway-7", "--directory", tmp_path)
    key = read_public(tmp_path / "gateway-7.key")

    assert (status, key in out, read_pair(tmp_path / "gateway-7.key_secret").secret in out) == (0, True, False)
    assert recurd("show", tmp_path / "gateway-7.key")[:2] == (0, key + "\n")
    assert recurd("show", tmp_path / "gateway-7.key_secret")[:2] == (0, key + "\n")
    assert recurd("list", tmp_path)[1].split()[:2] == ["gateway-7", key]
    assert recurd("new", "gateway-7", "--directory", tmp_path)[0] == 77
    (tmp_path / "b.key").write_text("")
    status, out, error = recurd("list", tmp_path)
    assert (status, "gateway-7" in out, "b.key: has no public key" in error) == (77, True, True)
    assert recurd("list", tmp_path / "none")[0] == 77


def test_a_pair_keeps_quiet_about_its_secret() -> None:
    assert "hidden" not in f"{Pair('shown', 'hidden')!r} {Pair('shown', 'hidden')}"


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.key")
    (tmp_path / "zeros.key").symlink_to("/dev/zero")
    for name in ("pipe.key", "zeros.key"):
        with pytest.raises(KeyFileError, match="is no file"):
            read_public(tmp_path / name)
