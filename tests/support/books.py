"""What a daemon counts, held against what there is: room, shares, lanes, slots, names."""

import itertools
from collections import Counter

from recurd.arena import Slots
from recurd.engine import Engine
from recurd.streams import NO_SLOT, Kind, Stream


def check_books(engine: Engine, is_saved: bool = False) -> None:
    """Hold every number that is kept against what it is the number of.

    ``is_saved``: all that has happened stands in the journal, where there is one.
    """
    streams = list(engine._streams.all())
    check_room(engine, streams)
    check_lanes(engine, streams)
    check_names(engine, streams)
    for stream in streams:
        check_order(stream, is_saved)


def count(streams: list[Stream]) -> tuple[int, int, int]:
    """Records queued, their bytes, and the bytes of answers kept."""
    queued = [record.data.nbytes for stream in streams for record in stream.queue]
    return len(queued), sum(queued), sum(len(payload) for stream in streams for _, _, (_, payload) in stream.answers)


def check_room(engine: Engine, streams: list[Stream]) -> None:
    room = engine._room
    assert (room.chunks, room.bytes, room.retained) == count(streams)
    for name, share in engine._tenants._shares.items():
        own = [stream for stream in streams if stream.share is share]
        assert all(stream.tenant == name for stream in own)
        assert (share.chunks, share.bytes, share.held) == count(own)


def check_lanes(engine: Engine, streams: list[Stream]) -> None:
    lanes, due = engine._versions.turns, 0
    assert {*engine._lanes.values(), *engine._versions.former} == set(lanes) >= {stream.lane for stream in streams}
    for lane in lanes:
        own = [stream for stream in streams if stream.lane is lane]
        clones = sum(record.kind is Kind.CLONE for stream in own for record in stream.queue)
        assert (lane.streams, lane._queued_bytes) == (len(own) + clones, count(own)[1])
        assert lane.streams == lane._streams_of.total()
        for tenant in {stream.tenant for stream in own}:
            mine = [stream for stream in own if stream.tenant == tenant]
            cloning = sum(record.kind is Kind.CLONE for stream in mine for record in stream.queue)
            assert lane._streams_of[tenant] == len(mine) + cloning
        due += lane._queued_bytes * lane._result_step_bytes // lane._step_bytes
        in_line = [*lane.scheduler._line, *itertools.chain(*lane.scheduler._turns._lines.values())]
        assert len(in_line) == len(set(in_line)) == len(lane.scheduler)
        assert set(in_line) == {stream for stream in own if stream.queue}
        check_slots(lane.slots, own)
    assert engine._room.due == due

    numbers = engine._stats.models["pump"]
    assert numbers.queued_chunks == engine.queued_chunks
    assert numbers.slots == sum(lane.device.slots for lane in lanes)
    assert numbers.slots_used == sum(stream.slot != NO_SLOT for stream in streams)
    assert numbers.host_bytes == sum(len(stream.state or b"") for stream in streams)


def check_names(engine: Engine, streams: list[Stream]) -> None:
    clones = [(s.tenant, r.data.tobytes().decode()) for s in streams for r in s.queue if r.kind is Kind.CLONE]
    assert sorted(engine._streams._reserved) == sorted(clones)
    names = [(stream.tenant, stream.name) for stream in streams]
    assert not set(names) & set(clones)
    owners = Counter(owner for owner, _ in names + clones)
    assert engine._streams._per_tenant == owners
    attached = sum(stream.peer is not None for stream in streams)
    assert engine._stats.streams == {"attached": attached, "detached": len(streams) - attached}
    for peer in engine._peers.all():
        assert peer.handles == {stream.handle for stream in streams if stream.peer is peer}


def check_slots(slots: Slots, own: list[Stream]) -> None:
    holders = {slot: stream for slot, stream in enumerate(slots._holders) if stream is not None}
    assert holders == {stream.slot: stream for stream in own if stream.slot != NO_SLOT}
    assert sorted([*holders, *slots._free]) == list(range(slots.device.slots))
    assert len(slots) == len(holders)


def check_order(stream: Stream, is_saved: bool) -> None:
    assert not stream.ended
    assert not stream.running
    assert [record.seq for record in stream.queue] == list(range(stream.answered + 1, stream.accepted + 1))
    assert [answer[0] for answer in stream.answers] == list(range(stream.acked + 1, stream.answered + 1))
    generation = stream.generation
    for record in reversed(stream.queue):
        assert record.generation == generation
        generation -= record.starts_afresh
    assert stream.saved <= stream.answered
    if stream.fresh:
        assert stream.untouched
    elif stream.slot == NO_SLOT and stream.state is None:
        # Only what stands in the journal may be nowhere else.
        assert stream.lane.slots.store is not None
        assert not is_saved or stream.saved == stream.answered
