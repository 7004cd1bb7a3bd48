"""A box tries what was announced before what its settings say, and forgets neither."""

from edge_agent.link.addresses import AddressBook
from skerry.runtime.settings import Broker
from skerry.wire.messages import Addresses

BROKER = Broker("broker.old", 8883, ca_file="/ca", others=["broker.old:8884", "broker.old:8883", "[::1]:1883"])


def where(book: AddressBook) -> list[tuple[str, int]]:
    return [(broker.host, broker.port) for broker in book.brokers()]


def test_the_announced_come_first_each_once_and_with_the_same_certificates(tmp_path):
    book = AddressBook(tmp_path / "a.json", BROKER, "https://old")
    settings = [("broker.old", 8883), ("broker.old", 8884), ("::1", 1883)]
    assert where(book) == settings
    moves: list[int] = []
    book.on_move = lambda: moves.append(1)
    book.hear(Addresses(["broker.new:1", "broker.old:8884", "nonsense"], "https://new/"))
    assert where(book) == [("broker.new", 1), ("broker.old", 8884), ("broker.old", 8883), ("::1", 1883)]
    assert {broker.ca_file for broker in book.brokers()} == {"/ca"}
    book.hear(Addresses(["broker.new:1", "broker.old:8884", "nonsense"], "https://new/"))
    book.hear(Addresses(["broker.new:1", "broker.old:8884", "nonsense"], "https://newer"))
    assert moves == [1], "only another broker is a move"
    again = AddressBook(tmp_path / "a.json", BROKER, "https://old")
    assert where(again) == where(book), "kept over a restart"
    again.hear(Addresses())
    assert where(again) == settings, "what is announced no more is forgotten"


def test_of_two_addresses_of_the_coordinator_the_one_that_does_not_answer_gives_way(tmp_path):
    book = AddressBook(tmp_path / "a.json", BROKER, "https://old/")
    assert [book.coordinator_url(), book.coordinator_failed(), book.coordinator_url()] == ["https://old", None, "https://old"]
    book.hear(Addresses([], "https://new"))
    urls = []
    for _ in range(3):
        urls.append(book.coordinator_url())
        book.coordinator_failed()
    assert urls == ["https://new", "https://old", "https://new"]


def test_a_damaged_file_costs_what_it_held_and_no_start(tmp_path):
    (tmp_path / "a.json").write_bytes(b"{")
    assert where(AddressBook(tmp_path / "a.json", BROKER, "https://old"))[0] == ("broker.old", 8883)
