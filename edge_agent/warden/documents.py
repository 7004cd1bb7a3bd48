"""What this box was told to do: judged when it comes, kept before it is acted on, judged anew when the warden starts."""

from edge_agent.warden.config import Config
from edge_agent.warden.store import Store, StoreFailed
from edge_agent.warden.trust import Trust, TrustFile
from edge_agent.warden.verify import judge
from skerry.runtime.proved_time import ProvedTime
from skerry.wire.messages import Desired


class Documents:
    """The document on disk, whom the box trusts and what it knows of the time, which go together.

    Serving depends on no clock. Whether a document is over is judged by the time that such documents proved.
    """

    def __init__(self, config: Config, store: Store, trust: TrustFile, time: ProvedTime) -> None:
        self._config = config
        self._store = store
        self._trust = trust
        self._time = time
        time.prove(trust.trust.since_ms)

    def _judge(self, envelope: bytes, held: Desired | None, *, is_own: bool) -> tuple[Desired, Trust]:
        return judge(
            envelope,
            trust=self._trust.trust,
            fleet=self._config.fleet,
            node=self._config.node,
            held=held,
            now_at_least_ms=self._time.now_at_least_ms(),
            is_own=is_own,
        )

    def load(self) -> Desired | None:
        """What was taken last. Raises Refused where it is not trusted any more, which is then set aside, and StoreFailed."""
        own = self._store.load_desired(lambda envelope: self._judge(envelope, None, is_own=True))
        if own is None:
            return None
        desired, trust = own
        self._keep(desired, trust)
        return desired

    def take(self, envelope: bytes, held: Desired | None) -> Desired:
        """The document that came, kept. Raises Refused and StoreFailed."""
        desired, trust = self._judge(envelope, held, is_own=False)
        if desired != held:
            self._store.save_desired(envelope)
            self._keep(desired, trust)  # after it: a document leads to its key by itself, and not the other way round
        return desired

    def _keep(self, desired: Desired, trust: Trust) -> None:
        self._time.prove(desired.issued_at_ms)
        self._time.keep()
        if trust == self._trust.trust:
            return
        try:
            self._trust.keep(trust)
        except OSError as exc:
            raise StoreFailed(f"whom to trust can't be kept: {exc.strerror}") from exc
