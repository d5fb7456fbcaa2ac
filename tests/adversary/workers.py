"""Guarded runs: every case in a child process with a time limit, so that a hang costs one case."""

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

_RECYCLED = 250  # cases a child runs before it is replaced


@dataclasses.dataclass
class _Worker:
    process: Any
    pipe: Connection
    item: Any = None
    since: float = 0.0
    done: int = 0


def run(
    work: Callable[[Any], Any], items: Iterable[Any], *, jobs: int, limit: float
) -> Iterator[tuple[Any, Any, str]]:
    """(item, result, "") for each item; (item, None, "a hang" or "killed") where there is none.

    ``work`` returns (result, whether the process may go on).
    """
    context = multiprocessing.get_context("fork")
    pending = iter(items)
    workers: list[_Worker] = []
    more = True

    def start() -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(work, theirs), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def stop(worker: _Worker) -> None:
        worker.pipe.close()
        worker.process.kill()
        worker.process.join()
        workers.remove(worker)

    try:
        while True:
            while more and len(workers) < jobs:
                workers.append(start())
            for worker in workers:
                if worker.item is None and more:
                    try:
                        worker.item = next(pending)
                    except StopIteration:
                        more = False
                        break
                    worker.since = time.monotonic()
                    worker.pipe.send(worker.item)
            busy = [worker for worker in workers if worker.item is not None]
            if not busy:
                return
            ready = wait([worker.pipe for worker in busy], timeout=0.5)
            for worker in busy:
                item = worker.item
                if worker.pipe in ready:
                    try:
                        result, sane = worker.pipe.recv()
                    except (EOFError, OSError):
                        stop(worker)
                        yield item, None, "killed"
                        continue
                    worker.item, worker.done = None, worker.done + 1
                    if not sane or worker.done >= _RECYCLED:
                        stop(worker)
                    yield item, result, ""
                elif time.monotonic() - worker.since > limit:
                    stop(worker)
                    yield item, None, "a hang"
    finally:
        for worker in list(workers):
            stop(worker)


def _serve(work: Callable[[Any], Any], pipe: Connection) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        pipe.send(work(item))
