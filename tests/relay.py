"""A relay in front of a server, as far away and as fast as one says, that counts the bytes it lets through."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from urllib.parse import urlsplit

_GRAIN = 32 * 2**10
_BURST_S = 0.1
"""What was not used is kept for so long, no longer: on a busy machine the relay itself may be woken late."""


class Relay:
    """Listens in a process of its own and passes every connection on to the server at URL `target`.

    All answers together take at most `rate` bytes a second (HTTP headers among them); requests are not limited, but
    arrive `latency_s` later.
    """

    def __init__(self, target: str, rate: float = float("inf"), latency_s: float = 0.0):
        context = multiprocessing.get_context("spawn")
        self._port, self._sent, self._ready = context.Value("i", 0), context.Value("q", 0), context.Event()
        arguments = (urlsplit(target).netloc, rate, latency_s, self._port, self._sent, self._ready)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)

    def __enter__(self) -> Relay:
        self._process.start()
        if not self._ready.wait(30):
            raise RuntimeError("the relay did not start")
        self.url = f"http://127.0.0.1:{self._port.value}"
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.join()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def sent(self) -> int:
        """Bytes of answers so far."""
        return self._sent.value


class _Bucket:
    def __init__(self, rate: float):
        self._rate, self._free = rate, 0.0

    async def take(self, count: int) -> None:
        now = time.monotonic()
        self._free = max(self._free, now - _BURST_S) + count / self._rate
        if self._free > now:
            await asyncio.sleep(self._free - now)


def _serve(target: str, rate: float, latency_s: float, port: Synchronized, sent: Synchronized, ready: Event) -> None:
    host, target_port = target.split(":")
    bucket = _Bucket(rate)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counted: bool) -> None:
        try:
            while data := await reader.read(_GRAIN):
                if counted:
                    await bucket.take(len(data))
                    sent.value += len(data)
                elif latency_s:
                    await asyncio.sleep(latency_s)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(host, int(target_port))
        await asyncio.gather(pump(reader, there[1], False), pump(there[0], writer, True))

    async def main() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        port.value = server.sockets[0].getsockname()[1]
        ready.set()
        await server.serve_forever()

    asyncio.run(main())
