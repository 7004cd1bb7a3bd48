"""Where this box finds broker and coordinator: where a signed document said that they are, then where the settings say."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from skerry.runtime import durable, log, settings
from skerry.runtime.settings import Broker
from skerry.wire import codec
from skerry.wire.messages import Addresses

logger = log.get("agent.addresses")


class AddressBook:
    """``state_dir/addresses.json`` holds what was announced last: a box whose broker is gone when it starts knows the next one.

    What answers shows a certificate of the fleet, wherever it is; who announced it was checked by the warden.
    """

    def __init__(self, path: Path, broker: Broker, coordinator_url: str) -> None:
        self._path = path
        self._broker = broker
        self._coordinator_url = coordinator_url
        self._announced = durable.read(path, Addresses) or Addresses()
        self._urls_failed = 0
        self.on_move: Callable[[], None] = lambda: None

    def hear(self, announced: Addresses) -> None:
        """What the warden took from a signed document."""
        if announced == self._announced:
            return
        has_moved = announced.brokers != self._announced.brokers
        self._announced, self._urls_failed = announced, 0
        try:
            durable.write(self._path, codec.encode(announced))
        except OSError as exc:
            logger.error("addresses.not_kept", reason=exc.strerror)
        logger.info("addresses.announced", brokers=announced.brokers, coordinator=announced.coordinator)
        if has_moved:
            self.on_move()

    def brokers(self) -> list[Broker]:
        """In the order in which they are tried."""
        found: dict[tuple[str, int], Broker] = {}
        for address in [*self._announced.brokers, f"{self._broker.host}:{self._broker.port}", *self._broker.others]:
            try:
                host, port = settings.split_listen(address)
            except settings.SettingsError as exc:
                logger.warning("address.passed_over", address=address[:200], reason=str(exc))
                continue
            found.setdefault((host, port), msgspec.structs.replace(self._broker, host=host, port=port))
        return list(found.values())

    def coordinator_url(self) -> str:
        """Where to ask next."""
        urls = list(dict.fromkeys(filter(None, [self._announced.coordinator, self._coordinator_url])))
        return urls[self._urls_failed % len(urls)].rstrip("/")

    def coordinator_failed(self) -> None:
        """Nobody answered there: the next one is tried."""
        self._urls_failed += 1
