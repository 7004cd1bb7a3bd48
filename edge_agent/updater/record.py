"""What the updater keeps: what is under way, how the last changes ended, what happened. On the disk before it is acted on."""

import time
from pathlib import Path

import msgspec

from skerry.runtime import durable, log
from skerry.wire import codec
from skerry.wire.box import UpdateRecord, UpdateStep

logger = log.get("updater")

MOST_STEPS = 32


class RecordFile:
    """``state_dir/record.json``; the warden reads it too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.record = durable.read(path, UpdateRecord) or UpdateRecord()

    def keep(self, record: UpdateRecord, kind: str, subject: str, text: str = "", *, is_vital: bool = False) -> None:
        """The next state, and what led to it. Raises OSError where it is ``is_vital`` that it lasts; of the rest a power cut costs no more
        than that it is found again."""
        seq = self.record.steps[-1].seq + 1 if self.record.steps else 1
        step = UpdateStep(seq, time.time_ns() // 1_000_000, kind, subject, text[:500])
        record = msgspec.structs.replace(record, steps=[*self.record.steps, step][-MOST_STEPS:])
        try:
            durable.write(self._path, codec.encode(record), mode=0o644)
        except OSError as exc:
            if is_vital:
                raise
            logger.error("record.not_kept", reason=exc.strerror)
        self.record = record
        logger.info(kind, subject=subject, text=text[:500])
