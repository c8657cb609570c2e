"""How a socket finds out that the other end of a TCP connection is gone without a word.

The kernel asks, and not ZeroMQ: with ZMTP heartbeats libzmq (4.3.5 and before) ends the whole process when one is due
on a connection that broke while nothing could be read from it, which is what a client does that floods and dies
(``Assertion failed: !_io_error``, https://github.com/zeromq/libzmq/issues/4364).
"""

import zmq

#: Probes that are not answered before a connection is closed.
PROBES = 3


def keepalive(seconds: int) -> dict[int, int]:
    """Socket options: probe after so many seconds of silence, and again; close after :data:`PROBES` unanswered ones,
    or when what was sent is not taken for as long. Of no effect on ipc, where the kernel knows."""
    return {
        zmq.TCP_KEEPALIVE: 1,
        zmq.TCP_KEEPALIVE_IDLE: seconds,
        zmq.TCP_KEEPALIVE_INTVL: seconds,
        zmq.TCP_KEEPALIVE_CNT: PROBES,
        zmq.TCP_MAXRT: PROBES * seconds * 1000,
    }
