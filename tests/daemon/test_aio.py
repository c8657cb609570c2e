"""The asyncio client against a real daemon over a real network that is cut."""

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

import recurd
from recurd import aio
from recurd.errors import Code


@pytest.fixture
async def client(daemon: Any) -> AsyncIterator[aio.Client]:
    async with aio.connect(daemon.endpoint, timeout_seconds=20) as client:
        yield client


@pytest.fixture
async def stream(client: aio.Client, request: pytest.FixtureRequest) -> aio.Stream:
    return await client.open(f"aio {request.node.name}", model="sum")


async def sums(future: "asyncio.Future[Any]") -> list[float]:
    result: list[float] = (await future).ravel().tolist()
    return result


async def test_the_client_can_be_awaited_too(daemon: Any) -> None:
    client = await recurd.aio.connect(daemon.endpoint)
    assert sorted(client.models) == ["sum", "two"]
    async with client:
        stream = await client.open("awaited", model="two")
        result = await stream.push([1, 2])
        assert isinstance(result, dict)
        assert (result["total"].tolist(), result["last"].tolist()) == ([[1], [3]], [3])
    with pytest.raises(recurd.RecurdError, match="the client is closed"):
        await stream.push([1])


async def test_submitted_chunks_run_in_order_far_beyond_the_credit(stream: aio.Stream) -> None:
    futures = [await stream.submit([1.0]) for _ in range(1000)]
    assert [await sums(future) for future in futures] == [[n + 1.0] for n in range(1000)]
    assert stream.last_seq == 1000


async def test_a_chunk_that_is_late_is_refused_and_the_stream_goes_on_without_it(stream: aio.Stream) -> None:
    assert await sums(await stream.submit([1.0], expires_seconds=20)) == [1]
    with pytest.raises(recurd.Refused) as late:
        await stream.push([2.0], expires_seconds=1e-9)
    assert late.value.code is Code.LATE
    with pytest.raises(ValueError, match=r"at most 65\.535"):
        await stream.push([2.0], expires_seconds=0)
    assert (await stream.push([1.0], expires_seconds=20)).tolist() == [[2]]  # type: ignore[union-attr]


async def test_who_waits_for_room_is_told_when_the_client_is_closed(daemon: Any) -> None:
    async with aio.connect(daemon.endpoint, queue_limit=1, timeout_seconds=math.inf) as client:
        stream = await client.open("room at the end", model="sum")
        first = await stream.submit([1.0])
        waiting = [
            asyncio.ensure_future(call)
            for call in (stream.push([2.0]), stream.submit([2.0]), client.push_many({stream: [2.0]}), stream.reset())
        ]
        await asyncio.sleep(0)  # all of them wait, as no answer can have been read
    told = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 10)
    assert [str(error) for error in told] == ["the client is closed"] * 4
    assert isinstance(first.exception(), recurd.Unanswered)


async def test_many_tasks_share_a_client(client: aio.Client) -> None:
    async def work(number: int) -> list[Any]:
        stream = await client.open(f"task {number}", model="sum")
        results = [await stream.push([1]) for _ in range(30)]
        await stream.close()
        return [result.tolist() for result in results]  # type: ignore[union-attr]

    results = await asyncio.gather(*(work(number) for number in range(20)))
    assert results == [[[[n + 1]] for n in range(30)]] * 20


async def test_many_streams_are_pushed_at_once(client: aio.Client) -> None:
    streams = [await client.open(f"aio many {n}", model="sum") for n in range(20)]
    results = await client.push_many({stream: [1, 1] for stream in streams})
    assert [results[stream].ravel().tolist() for stream in streams] == [[1, 2]] * 20  # type: ignore[union-attr]
    with pytest.raises(recurd.Refused):
        await client.push_many({streams[0]: [1], streams[1]: [math.nan], streams[2]: [math.nan]})
    assert await client.push_many({}) == {}


async def test_a_reset_takes_its_place_between_the_chunks(stream: aio.Stream) -> None:
    before = await stream.submit([5])
    await stream.reset()
    after = await stream.submit([1])
    assert (await sums(before), await sums(after)) == ([5], [1])
    assert stream.last_fresh


async def test_what_is_refused_fails_alone(client: aio.Client, stream: aio.Stream) -> None:
    with pytest.raises(ValueError, match="a chunk of this model"):
        await stream.push(np.zeros((2, 3)))
    futures = [await stream.submit(chunk) for chunk in ([1], [math.nan], [1])]
    with pytest.raises(recurd.Refused) as refusal:
        await futures[1]
    assert refusal.value.code is Code.NOT_FINITE
    assert [await sums(futures[0]), await sums(futures[2])] == [[1], [2]]
    with pytest.raises(recurd.Refused, match="unknown_model"):
        await client.open("x", model="nope")
    with pytest.raises(recurd.RecurdError, match="open on this client already"):
        await client.open(stream.name, model="sum")


async def test_a_cancelled_push_keeps_its_place(stream: aio.Stream) -> None:
    task = asyncio.create_task(stream.push([1]))
    await asyncio.sleep(0)  # it has begun
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await stream.push([1])).tolist() == [[2]]  # type: ignore[union-attr]


async def test_a_submit_waits_while_there_is_no_room(daemon: Any) -> None:
    async with aio.connect(daemon.endpoint, queue_limit=2) as client:
        stream = await client.open("no room", model="sum")
        await stream.submit([1])
        await stream.submit([1])
        with pytest.raises(recurd.Unanswered, match="no room"):
            await stream.submit([1], timeout_seconds=0)
        assert (await stream.push([1])).tolist() == [[3]]  # type: ignore[union-attr]
        await stream.close()


async def test_a_cut_connection_is_made_anew_and_nothing_is_lost_or_doubled(proxy: Any) -> None:
    async with aio.connect(proxy.endpoint, timeout_seconds=30) as client:
        streams = [await client.open(f"aio cut {n}", model="sum") for n in range(4)]
        futures: list[list[asyncio.Future[Any]]] = [[] for _ in streams]
        for step in range(600):
            for stream, mine in zip(streams, futures, strict=True):
                mine.append(await stream.submit([1]))
            if step % 100 == 50:
                connections = proxy.connections
                proxy.cut()
                async with asyncio.timeout(20):
                    while proxy.connections == connections:
                        await asyncio.sleep(0.005)
        for mine in futures:
            assert [await sums(future) for future in mine] == [[n + 1] for n in range(600)]
        for stream in streams:
            await stream.close()


async def test_no_daemon_and_a_wrong_address_are_told_in_a_sentence() -> None:
    with pytest.raises(
        recurd.Unanswered, match=r"at tcp://127\.0\.0\.1:9 within 0\.2 s; start one with 'recurd serve'"
    ):
        await aio.connect("tcp://127.0.0.1:9", timeout_seconds=0.2)
    with pytest.raises(recurd.RecurdError, match="'nonsense' is neither tcp://host:port nor ipc:///path"):
        await aio.connect("nonsense")


async def test_a_closed_client_leaves_nobody_waiting(proxy: Any) -> None:
    client = await aio.connect(proxy.endpoint, timeout_seconds=60)
    stream = await client.open("aio closed", model="sum")
    waiting = asyncio.create_task(stream.push([1]))
    opening = asyncio.create_task(client.open("aio closed 2", model="sum"))
    await asyncio.sleep(0)
    await client.close()
    for task in (waiting, opening):
        with pytest.raises(recurd.Unanswered, match="the client is closed"):
            await task
    await client.close()


async def test_an_open_in_vain_can_be_repeated(proxy: Any) -> None:
    async with aio.connect(proxy.endpoint, timeout_seconds=20) as client:
        with pytest.raises(recurd.Unanswered, match="opening stream 'vain'"):
            await client.open("vain", model="sum", timeout_seconds=0)
        stream = await client.open("vain", model="sum")
        assert (await stream.push([1])).tolist() == [[1]]  # type: ignore[union-attr]
        await stream.close()


async def test_a_stream_that_broke_says_so_until_it_is_opened_again(daemon: Any, sum_model: Any) -> None:
    mortal = await asyncio.to_thread(type(daemon), sum_model)
    async with aio.connect(mortal.endpoint, timeout_seconds=30) as client:
        stream = await client.open("mortal")
        await stream.push([1])
        await asyncio.to_thread(mortal.kill)
        pending = await stream.submit([1])
        mortal = await asyncio.to_thread(type(daemon), sum_model, port=mortal.port)
        with pytest.raises(recurd.Broken, match=r"the daemon was restarted .* stream 'mortal' is lost; open it again"):
            await pending
        for call in (stream.push([1]), stream.reset()):
            with pytest.raises(recurd.Broken):
                await call
        assert "ended" in repr(stream)
        again = await client.open("mortal")
        assert (await again.push([5])).tolist() == [[5]]  # type: ignore[union-attr]
    await asyncio.to_thread(mortal.stop)


async def test_a_call_in_vain_says_that_there_is_no_connection_and_that_its_chunk_keeps_its_place(
    daemon: Any, sum_model: Any
) -> None:
    mortal = await asyncio.to_thread(type(daemon), sum_model)
    async with aio.connect(mortal.endpoint, timeout_seconds=20) as client:
        stream = await client.open("in vain")
        await stream.push([1])
        await asyncio.to_thread(mortal.stop)
        gone = f"; there is no connection to {mortal.endpoint} at present$"
        with pytest.raises(recurd.Unanswered, match="must not be sent again" + gone):
            await stream.push([1], timeout_seconds=0.5)
        with pytest.raises(recurd.Unanswered, match="the reset keeps its place .*" + gone):
            await stream.reset(timeout_seconds=0.01)
        with pytest.raises(recurd.Unanswered, match="each chunk keeps its place .*" + gone):
            await client.push_many({stream: [1]}, timeout_seconds=0.01)
        with pytest.raises(recurd.Unanswered, match="closing stream 'in vain' was not answered within .*" + gone):
            await stream.close(timeout_seconds=0.01)
