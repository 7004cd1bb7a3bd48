"""The release of the box's own programs that it was told of: what the updater gets to know of it, and what is told of the updater."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from edge_agent.core import update
from edge_agent.warden.store import Store
from skerry import __version__
from skerry.runtime import durable, log
from skerry.wire import codec
from skerry.wire.box import UpdateRecord, UpdateStep, WantedSoftware
from skerry.wire.messages import Desired, ModelRef, Software, SoftwareReport

logger = log.get("warden.software")

AGAIN_S = 60.0
"""systemd overlooks a change that comes while the updater ends: one that nothing came of is told again."""
MOST_RECORD_BYTES = 1 << 20


class BoxSoftware:
    """``state_dir/software.json`` is the updater's to read; ``record_file`` is what it keeps, None where there is no updater. ``on_step``
    hears of each thing that happened in the updater, once."""

    def __init__(self, state_dir: Path, record_file: Path | None, store: Store, *, on_step: Callable[[UpdateStep], None]) -> None:
        self._wanted_file = state_dir / "software.json"
        self._told_file = state_dir / "software_told.json"
        self._record_file = record_file
        self._store = store
        self._on_step = on_step
        self._told = durable.read(self._told_file, int) or 0
        self._written: WantedSoftware | None = durable.read(self._wanted_file, WantedSoftware)
        self._written_at = time.monotonic()
        self._record = None if record_file is None else UpdateRecord()
        self._stamp = (0, 0)

    def needs(self, desired: Desired | None) -> list[ModelRef]:
        """The release's bytes, as long as they are to come."""
        software = desired.software if desired else None
        if software is None or not self._is_awaited(software) or software.sha256 in self._store.models():
            return []
        return [ModelRef(f"skerry-{software.version}", 0, software.sha256, software.size_bytes)]

    def in_use(self, desired: Desired | None) -> set[str]:
        """The digest whose bytes must stay."""
        software = desired.software if desired else None
        return {software.sha256} if software is not None and self._is_awaited(software) else set()

    def _is_awaited(self, software: Software) -> bool:
        if not software.sha256 or self._record is None or software.version == __version__:
            return False
        held = self._record.under_way
        if held is not None and update.key(held) == update.key(software):
            return held.stage == "preparing"
        ended = update.outcome_of(self._record, software)
        return ended is None or ended.is_good

    def look(self, desired: Desired | None, not_fetched: Mapping[str, str]) -> SoftwareReport:
        """Tell the updater what is wanted, once it is here, and say how far it is."""
        self._read()
        software = desired.software if desired else None
        is_here = software is not None and (not software.sha256 or software.sha256 in self._store.models())
        if self._record is not None:
            self._hand_over(software if is_here else None)
            self._clear(software)
        waiting = not_fetched.get(software.sha256, "") if software is not None else ""
        return update.report(software, self._record, running=__version__, is_here=is_here, waiting=waiting)

    def _read(self) -> None:
        """What the updater keeps, where it changed."""
        if self._record_file is None:
            return
        try:
            status = self._record_file.stat()
        except OSError:
            return
        stamp = (status.st_mtime_ns, status.st_ino)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        self._record = durable.read(self._record_file, UpdateRecord, max_bytes=MOST_RECORD_BYTES) or UpdateRecord()
        news = [step for step in self._record.steps if step.seq > self._told]
        if self._record.steps and self._record.steps[-1].seq < self._told:
            news = self._record.steps  # another file than the one that was told of
        for step in news:
            self._on_step(step)
        if news:
            self._told = news[-1].seq
            self._keep(self._told_file, codec.encode(self._told))

    def _hand_over(self, software: Software | None) -> None:
        wanted = WantedSoftware(software, str(self._store.model_path(software.sha256)) if software is not None and software.sha256 else "")
        is_idle = software is not None and software.version != __version__ and self._record is not None and self._is_idle(software)
        is_lost = is_idle and time.monotonic() - self._written_at >= AGAIN_S
        if wanted == (self._written or WantedSoftware()) and not is_lost:
            return
        if self._keep(self._wanted_file, codec.encode(wanted)):
            self._written, self._written_at = wanted, time.monotonic()

    def _is_idle(self, software: Software) -> bool:
        record = self._record or UpdateRecord()
        return record.under_way is None and update.outcome_of(record, software) is None

    def _clear(self, software: Software | None) -> None:
        """A release that is unpacked, or will not be, lies here no more."""
        if software is None or not software.sha256 or self._is_awaited(software):
            return
        if software.sha256 in self._store.models():
            self._store.remove(software.sha256)

    def _keep(self, path: Path, content: bytes) -> bool:
        try:
            durable.write(path, content, mode=0o644)
        except OSError as exc:
            logger.error("software.not_kept", path=path.name, reason=exc.strerror)
            return False
        return True
