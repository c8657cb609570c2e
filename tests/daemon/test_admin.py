"""Commands of whoever runs the daemon: who may give them, and who carries them out."""

import json
from pathlib import Path

import pytest
import structlog

from dialogue import Desk, Reply, admin
from process import Process, eventually
from recurd.config import Config, Tenant
from recurd.config import Model as ModelFile
from recurd.errors import Code, Refused
from recurd.loading import load
from recurd.model import Model
from recurd.reload import Reload
from recurd.remote import Remote
from recurd.systemd import Notifier
from recurd.wire import Type, pack
from recurrent import Network

PUMP = Network()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PUMP.save(tmp_path_factory.mktemp("models") / "pump.onnx", proof=True)


@pytest.fixture(scope="module")
def model(file: Path) -> Model:
    return Model.load(file, slots=4, threads=1)


def test_a_command_that_the_process_carries_out_is_put_out_and_answered_when_it_is_done(model: Model) -> None:
    desk = Desk({"pump": model}, process_commands=("reload",))
    caller = desk.connect()
    caller.send(admin("reload", b"\x01\x02", seq=7, model="pump"))
    assert caller.take() == []

    (request,) = desk.engine.admin.requests()
    assert desk.engine.admin.requests() == []
    assert (request.command, request.read(dict)["model"], bytes(request.data)) == ("reload", "pump", b"\x01\x02")
    desk.engine.admin.report(request, {"done": 1}, b"xyz")
    (report,) = caller.take()
    assert (report.type, report.header.seq, report.header.width) == (Type.REPORT, 7, 3)
    assert (json.loads(report.payload[:-3]), report.payload[-3:]) == ({"done": 1}, b"xyz")

    caller.send(admin("reload"))
    (request,) = desk.engine.admin.requests()
    desk.engine.admin.refuse(request, Refused(Code.BUSY, "later", retry_after_seconds=1))
    assert caller.take()[0].code == "busy"


def test_commands_that_are_not_there_or_not_readable_are_refused(model: Model) -> None:
    caller = Desk({"pump": model}, process_commands=("reload",)).connect()
    unknown = caller.ask(admin("fly"))
    assert (unknown.code, "reload" in unknown.body["text"]) == ("bad_request", True)
    assert caller.ask((pack(Type.ADMIN, size=2), b"{}")).code == "bad_request"
    assert caller.ask((pack(Type.ADMIN, size=2, width=3), b"{}")).code == "bad_frame"


def test_a_reload_that_is_to_end_streams_is_not_forgotten_for_one_that_is_asked_behind_it(
    model: Model, file: Path
) -> None:
    """A second operator, or SIGHUP, may say something else while the first one waits."""
    desk = Desk({"pump": model}, process_commands=("reload",))
    caller = desk.connect()
    entry = ModelFile(path=str(file), name="pump")
    settings = Config(models=(entry,))
    notifier = Notifier({}, 0)
    reload = Reload(
        [load(entry, settings, "cpu")],
        device="cpu",
        engine=desk.engine,
        durable=None,
        labels={},
        stats=desk.stats,
        notifier=notifier,
        wake=lambda: None,
        log=structlog.get_logger(),
    )
    done = []
    desk.engine.end_former = lambda: done.append("restart") or 0  # type: ignore[method-assign,func-returns-value]
    for choice in ({}, {"incompatible": "restart"}, {}, {}):
        caller.send(admin("reload", **choice))
        for request in desk.engine.admin.requests():
            reload.ask(settings, request, [])
    reload.ask(settings, None, [])
    reports: list[Reply] = []

    def all_answered() -> bool:
        reload.turn()
        reports.extend(caller.take())
        return len(reports) == 4

    eventually(all_answered)
    reload.close()
    notifier.close()
    assert {reply.type for reply in reports} == {Type.REPORT}
    assert done == ["restart"]


def test_it_takes_the_right(model: Model) -> None:
    config = Config(tenants={"boss": Tenant(rights=("admin",)), "hand": Tenant(rights=("stream",))})
    desk = Desk({"pump": model}, config, process_commands=("reload",))
    assert desk.connect("a", tenant="hand").ask(admin("reload")).code == "forbidden"
    desk.connect("b", tenant="boss").send(admin("reload"))
    assert [request.peer.tenant for request in desk.engine.admin.requests()] == ["boss"]


def test_a_command_goes_over_a_socket_and_a_refusal_comes_back(file: Path, tmp_path: Path) -> None:
    with Process(tmp_path, file, "--bind", f"ipc://{tmp_path}/socket", "--metrics", "") as daemon:
        daemon.ready()
        with Remote(f"ipc://{tmp_path}/socket", 10) as remote:
            assert remote.welcome.tenant == "local"
            with pytest.raises(Refused, match="there is no command 'fly'") as refused:
                remote.ask("fly")
            assert refused.value.code is Code.BAD_REQUEST
