"""What this box was told to do: judged when it comes, kept before it is acted on, judged anew when the warden starts."""

from edge_agent.warden.config import Config
from edge_agent.warden.store import Store, StoreFailed
from edge_agent.warden.trust import Trust, TrustFile
from edge_agent.warden.verify import judge
from skerry.wire.messages import Desired


class Documents:
    """The document on disk and whom the box trusts, which go together."""

    def __init__(self, config: Config, store: Store, trust: TrustFile) -> None:
        self._config = config
        self._store = store
        self._trust = trust

    def _judge(self, envelope: bytes, held: Desired | None, *, is_own: bool) -> tuple[Desired, Trust]:
        return judge(
            envelope,
            trust=self._trust.trust,
            fleet=self._config.fleet,
            node=self._config.node,
            held=held,
            now_at_least_ms=self._trust.now_at_least_ms,
            is_own=is_own,
        )

    def load(self) -> Desired | None:
        """What was taken last. Raises Refused where it is not trusted any more, which is then set aside, and StoreFailed."""
        own = self._store.load_desired(lambda envelope: self._judge(envelope, None, is_own=True))
        if own is None:
            return None
        desired, trust = own
        if trust != self._trust.trust:
            self._keep(trust)
        return desired

    def take(self, envelope: bytes, held: Desired | None) -> Desired:
        """The document that came, kept. Raises Refused and StoreFailed."""
        desired, trust = self._judge(envelope, held, is_own=False)
        if desired != held:
            self._store.save_desired(envelope)
            self._keep(trust)  # after it: a document leads to its key by itself, and not the other way round
        return desired

    def _keep(self, trust: Trust) -> None:
        try:
            self._trust.keep(trust)
        except OSError as exc:
            raise StoreFailed(f"whom to trust can't be kept: {exc.strerror}") from exc
