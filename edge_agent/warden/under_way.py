"""Steps that take long, by what they are about: an engine that hangs holds up what is its own alone."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any


class UnderWay:
    """At most one step at a time about each subject. ``on_end`` is told when one ends that was waited for no more."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end = on_end
        self._tasks: dict[str, asyncio.Task[bool]] = {}

    async def take(self, steps: Iterable[tuple[str, Callable[[], Coroutine[Any, Any, bool]]]], *, within_s: float) -> bool:
        """Begin each whose subject is free, and wait for them for so long; whether any, or one that was under way, moved something."""
        moved = self._landed()
        begun = {}
        for subject, step in steps:
            if subject not in self._tasks:
                begun[asyncio.create_task(step(), name=f"warden.step.{subject}")] = subject
        if begun:
            done, late = await asyncio.wait(begun, timeout=within_s)
            for task in late:
                self._tasks[begun[task]] = task
                task.add_done_callback(lambda _: self._on_end())
            moved = [task.result() for task in done] + moved
        return any(moved)

    def _landed(self) -> list[bool]:
        landed = {subject: task for subject, task in self._tasks.items() if task.done()}
        for subject in landed:
            del self._tasks[subject]
        return [task.result() for task in landed.values()]

    async def end(self, *, within_s: float) -> None:
        """Let what is under way end, so that what it did is on record."""
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=within_s)
        self._landed()
