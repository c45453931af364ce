"""The watcher next to each process of a run, and the hub in the first one, where they meet.

    python -I -S watcher.py

It uses only the standard library, to start quickly and to take little memory, and outlives its
process, to report how that ended. Input and output are lines of JSON, from and to the process: its
`Settings`, its progress and its last message, without which it died; the port of JAX's coordinator,
and the code with which to exit.

The watchers talk to the hub over TCP, in lines of JSON as well. The first one must name the run, so
that other programs and other runs are turned away.
"""

import asyncio
import contextlib
import json
import os
import platform
import signal
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

BEATS = 10  # heartbeats per peer_timeout
HELLO = 10.0  # seconds within which the first line must arrive
RETRY = 0.5  # seconds between attempts to reach the hub
GRACE = 10.0  # seconds after which a process that was told to exit is killed
LINGER = 2.0  # seconds for which the watcher of a dead process waits to hear which one died first
SHOWN = 4  # processes that a message names
STACKS = signal.SIGUSR2  # makes a process print the stacks of its threads

Message = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a watcher has to know. Times are in seconds."""

    name: str  # of this start of the run
    index: int
    count: int
    pid: int
    host: str  # of the hub, for the others
    port: int
    hub: int | None  # in the first process: file descriptor of the socket on which the hub listens
    peer_timeout: float
    start_timeout: float
    stall_timeout: float  # 0: never
    exit_code: int  # of a process that lost another one


def line_of(message: Message) -> bytes:
    """Returns a message as it is sent."""
    return f"{json.dumps(message)}\n".encode()


def name_of(index: int, host: str, pid: int) -> str:
    """Returns how messages name a process."""
    return f"process {index} (host {host}, pid {pid})"


def late(settings: Settings) -> str:
    """Returns what messages say of a process that is missing."""
    return f"not started within {settings.start_timeout:g} s (start_timeout)"


def listing(names: list[str]) -> str:
    """Returns the first of some names, joined for a message."""
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return " and ".join(names[:SHOWN] + more)


class Member:
    """A process of the run, as seen by the hub."""

    def __init__(self, index: int):
        self.name = f"process {index}"
        self.writer: asyncio.StreamWriter | None = None  # from when it connects
        self.left = False  # has announced its end
        self.gone = False  # has disconnected, or is not waited for any more
        self.silent = 0.0  # seconds since it was last heard of
        self.steps = [0, 0]  # the last ones that it has dispatched to its devices, and finished
        self.still: float | None = None  # seconds without progress; None while it may take its time

    def send(self, message: Message) -> None:
        """Sends a message, if the process is connected."""
        if self.writer is not None and not self.writer.is_closing():
            self.writer.write(line_of(message))


class Hub:
    """Hears the heartbeats of all watchers, and tells all of them when a process is lost.

    Time is counted in heartbeats of its own, so its own pauses are nobody's silence.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self._interval = settings.peer_timeout / BEATS
        self._members = [Member(i) for i in range(settings.count)]
        self._coordinator: Message = {}
        self._verdict: Message = {}

    async def run(self, opened: socket.socket) -> None:
        """Serves until every process has left."""
        server = await asyncio.start_server(self._serve, sock=opened)
        while not all(member.gone for member in self._members):
            await asyncio.sleep(self._interval)
            self._tick()
        server.close()
        for member in self._members:
            if member.writer is not None:
                member.writer.close()  # ends its `_serve`
        await asyncio.sleep(RETRY)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        member = None
        with contextlib.suppress(OSError, ValueError):  # silent, closed, or not a watcher
            async with asyncio.timeout(HELLO):
                hello = json.loads(await reader.readline())
            member = self._admit(hello, writer)
        if member is None:
            writer.close()
            return
        with contextlib.suppress(OSError, ValueError):
            async for line in reader:
                self._hear(member, json.loads(line))
        if not member.left:
            self._judge(f"lost {member.name}: its connection has ended", member)
        member.gone = True
        writer.close()
        self._release()

    def _admit(self, hello: Any, writer: asyncio.StreamWriter) -> Member | None:
        """Returns the process that says hello; None if it is not one of this start."""
        own = {"run": self._settings.name, "count": self._settings.count}
        if not isinstance(hello, dict) or not own.items() <= hello.items():
            return None
        member = self._members[hello["index"]]
        if member.writer is not None:
            again = f"was restarted as pid {hello['pid']} on {hello['host']}"
            self._judge(f"{member.name} {again}")
            return None
        member.name = name_of(hello["index"], hello["host"], hello["pid"])
        member.writer, member.silent = writer, 0.0
        member.send({"hub": name_of(0, platform.node(), self._settings.pid)})
        for message in (self._coordinator, self._verdict):
            if message:
                member.send(message)
        return member

    def _hear(self, member: Member, message: Message) -> None:
        member.silent = 0.0
        if "left" in message:
            member.left = True
            if reason := message["left"]:
                self._judge(f"{member.name} has stopped: {reason}", member, message["code"])
            self._release()
        elif "lost" in message:
            self._judge(f"{member.name} {message['lost']}")
        elif "coordinator" in message:
            self._coordinator = message
            for other in self._members:
                other.send(message)
        else:
            member.steps, member.still = message["steps"], message["still"]

    def _tick(self) -> None:
        s = self._settings
        present = [member for member in self._members if not (member.left or member.gone)]
        for member in present:
            member.silent += self._interval
            member.send({})
            if member.writer is not None and member.silent > s.peer_timeout:
                member.gone = True
                reason = f"lost {member.name}: no sign of life for {s.peer_timeout:g} s"
                self._judge(reason, member)
        if missing := [x for x in present if x.writer is None and x.silent > s.start_timeout]:
            for member in missing:
                member.gone = True
            who = listing([member.name for member in missing])
            self._judge(f"{who} {'has' if len(missing) == 1 else 'have'} {late(s)}")
        still = [member.still for member in present if member.still is not None]
        if s.stall_timeout and 0 < len(present) == len(still) and max(still) >= s.stall_timeout:
            self._judge(self._stall(present), stacks=True)

    def _stall(self, present: list[Member]) -> str:
        """Describes a stall, and names the processes that are behind the others."""
        what = f"no step has finished for {self._settings.stall_timeout:g} s (stall_timeout)"
        latest = max(member.steps[0] for member in present)
        behind = [f"{x.name} at step {x.steps[0]}" for x in present if x.steps[0] < latest]
        if behind:
            return f"{what}: {listing(behind)}, the others at step {latest}"
        return f"{what} after step {max(member.steps[1] for member in present)}"

    def _judge(
        self, reason: str, culprit: Member | None = None, code: int = 0, stacks: bool = False
    ) -> None:
        """Tells all processes but the culprit to exit. Only the first verdict counts."""
        if self._verdict:
            return
        code = code or self._settings.exit_code
        self._verdict = {"verdict": reason, "code": code, "stacks": stacks}
        for member in self._members:
            if member is not culprit:
                member.send(self._verdict)
        asyncio.get_running_loop().call_later(2 * GRACE, self._give_up)

    def _give_up(self) -> None:
        for member in self._members:
            if member.left:
                member.send({"alone": True})
            member.gone = True

    def _release(self) -> None:
        """Lets the process that ended the run exit, once the others have or are about to."""
        rest = [member for member in self._members if not member.gone]
        if self._verdict and all(member.left for member in rest):
            for member in rest:
                member.send({"alone": True})


class Watcher:
    """Reports its process to the hub, and ends it if the hub says so or is lost."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._interval = settings.peer_timeout / BEATS
        self._first = "process 0"
        self._writer: asyncio.StreamWriter | None = None  # to the hub, once it has answered
        self._unsent: list[Message] = []  # until then
        self._silent = 0.0  # seconds since the hub was last heard of
        self._progress: Message = {"steps": [0, 0], "busy": False}
        self._still = 0.0  # seconds since it changed
        self._stopped = 0.0  # seconds for which the process has been stopped
        self._leaves = False  # whether the process has announced its end, or was told to exit
        self._gone = False  # whether the process is gone

    async def run(self, process: asyncio.StreamReader) -> None:
        """Watches until the process, whose messages are read from `process`, is gone."""
        async with asyncio.TaskGroup() as group:
            talking = group.create_task(self._talk())
            await self._follow(process)
            if not self._leaves:
                await asyncio.sleep(LINGER)
            talking.cancel()
        if self._writer is not None:
            self._writer.close()  # in the first process, the hub stays

    async def _follow(self, process: asyncio.StreamReader) -> None:
        """Reads the process's messages until it is gone."""
        async for line in process:
            message = json.loads(line)
            if "steps" not in message:
                self._leaves |= "left" in message
                self._tell(message)
            elif message != self._progress:
                self._progress, self._still = message, 0.0
        self._gone = True
        if not self._leaves:
            self._tell({"left": "it died or was killed", "code": self._settings.exit_code})

    def _tell(self, message: Message) -> None:
        if self._writer is None:
            self._unsent.append(message)
        elif not self._writer.is_closing():
            self._writer.write(line_of(message))

    async def _talk(self) -> None:
        reader = await self._meet()
        if reader is None:
            return
        for message in self._unsent:
            self._tell(message)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen(reader))
            group.create_task(self._beat())

    async def _meet(self) -> asyncio.StreamReader | None:
        """Connects to the hub, which may start later; None if it does not answer in time."""
        s = self._settings
        me = {"index": s.index, "host": platform.node(), "pid": s.pid}
        end, why = asyncio.get_running_loop().time() + s.start_timeout, ""
        while asyncio.get_running_loop().time() < end:
            try:
                async with asyncio.timeout(HELLO):
                    reader, writer = await asyncio.open_connection(s.host, s.port)
                    writer.write(line_of({"run": s.name, "count": s.count} | me))
                    line = await reader.readline()
                if line:
                    self._first, self._writer = json.loads(line)["hub"], writer
                    return reader
                why = "it belongs to another run, or to one with another number of processes"
                writer.close()
            except OSError as error:
                why = str(error) or "timed out"
            await asyncio.sleep(RETRY)
        await self._obey(f"process 0 has {late(s)}; its address is {s.host}:{s.port} ({why})")
        return None

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError, ValueError):
            async for line in reader:
                self._silent = 0.0
                message = json.loads(line)
                if "verdict" in message:
                    await self._obey(message["verdict"], message["code"], message["stacks"])
                elif message:
                    self._inform(message)
        await self._obey(f"lost {self._first}: its connection has ended")

    async def _beat(self) -> None:
        s = self._settings
        while not self._leaves:
            await asyncio.sleep(self._interval)
            self._silent += self._interval
            if self._silent > s.peer_timeout:
                await self._obey(f"lost {self._first}: no sign of life for {s.peer_timeout:g} s")
            if _is_stopped(s.pid):
                self._stopped += self._interval
            else:
                self._stopped = 0.0
                self._still += self._interval
            if self._stopped > s.peer_timeout and s.count > 1:
                self._tell({"lost": f"has been stopped by a signal for {s.peer_timeout:g} s"})
            still = self._still if self._progress["busy"] else None
            self._tell({"steps": self._progress["steps"], "still": still})

    async def _obey(self, verdict: str, code: int = 0, stacks: bool = False) -> None:
        """Prints a verdict and makes the process exit, unless it is about to."""
        s = self._settings
        if self._leaves:
            return
        if stacks:
            self._signal(STACKS)
            await asyncio.sleep(LINGER / 2)
        code = code or s.exit_code
        hint = "; rerun the same command to resume" if code == s.exit_code else ""
        where = f"process {s.index} on {platform.node()}: " if s.count > 1 else ""
        print(f"error: {where}{verdict}{hint}", file=sys.stderr, flush=True)
        self._leaves = True
        self._inform({"code": code})
        await asyncio.sleep(min(GRACE, 2 * s.peer_timeout))  # until the process is gone
        self._signal(signal.SIGKILL)

    def _inform(self, message: Message) -> None:
        """Sends a message to the process."""
        with contextlib.suppress(OSError):  # it may be dead
            print(json.dumps(message), flush=True)

    def _signal(self, number: int) -> None:
        """Sends a signal to the process unless it is gone."""
        if not self._gone and os.getppid() == self._settings.pid:
            os.kill(self._settings.pid, number)


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped, e.g. by SIGSTOP. Only Linux says so."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


async def main() -> None:
    """Runs the watcher and, next to the first process, the hub."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, STACKS):
        signal.signal(number, signal.SIG_IGN)  # meant for the process, not for its watcher
    process = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(process)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    settings = Settings(**json.loads(await process.readline()))
    if settings.hub is None:
        await Watcher(settings).run(process)
        return
    opened = socket.socket(fileno=settings.hub)
    own = replace(settings, host="127.0.0.1", port=opened.getsockname()[1])
    await asyncio.gather(Hub(settings).run(opened), Watcher(own).run(process))


if __name__ == "__main__":
    asyncio.run(main())
