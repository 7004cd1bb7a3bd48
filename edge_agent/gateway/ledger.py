"""What the gateway has answered: counters by deployment, for the agent, for Prometheus and for Triton's statistics call."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import msgspec

from skerry.wire import latency
from skerry.wire.box import GatewayTotals, Routed, ServeTotals
from skerry.wire.messages import Tier

ServedBy = Literal["edge", "peer", "cloud"]
Reason = Literal["REJECTED", "CANCELED", "BACKEND", "OTHER"]
"""Why a request got no answer, in Triton's words: nobody could in time, nobody waited any more, the replica failed, anything else."""
REASONS: tuple[Reason, ...] = get_args(Reason)
MOST_EXACT_ROWS = 64
"""Larger runs are counted at the power of two below: how many rows a request has is its caller's to choose, and each size is kept."""
NS_PER_MS = 1_000_000


class Runs(msgspec.Struct):
    """Runs of a model with one number of rows: how many, and how long they took in all."""

    count: int = 0
    compute_ns: int = 0


class Account(msgspec.Struct):
    """One deployment's counters since the gateway started. Whole numbers all of them, so that several processes' are added up exactly.

    ``queue_ns``, ``input_ns``, ``compute_ns`` and ``output_ns`` are sums over the ``computed`` requests that replicas of this box answered,
    ``rows`` is what these held; ``runs`` counts what the replicas ran, once for all requests that shared a run, by its rows.
    ``late`` counts answers past their deadline, ``hedged`` requests that ran here because an answer from elsewhere was overdue, ``retried``
    tries after the first, ``shed`` what was refused in favour of more urgent requests, ``compared`` answers of shadows, ``differed``
    those of them that did not agree; ``waiting`` and ``slots`` are of now.
    """

    model: str
    version: int
    edge: int = 0
    peer: int = 0
    cloud: int = 0
    total_ns: int = 0
    latency: dict[int, int] = {}
    failures: dict[Reason, int] = {}
    failures_ns: int = 0
    computed: int = 0
    rows: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    compute_ns: int = 0
    output_ns: int = 0
    runs: dict[int, Runs] = {}
    runs_rows: int = 0
    last_at_ms: int = 0
    late: int = 0
    hedged: int = 0
    retried: int = 0
    shed: int = 0
    compared: int = 0
    differed: int = 0
    waiting: int = 0
    slots: int = 0

    @property
    def answered(self) -> int:
        """Requests that got an answer."""
        return self.edge + self.peer + self.cloud

    @property
    def unanswered(self) -> int:
        """Requests that got none."""
        return sum(self.failures.values())

    @property
    def executions(self) -> int:
        """Runs of the model on this box."""
        return sum(runs.count for runs in self.runs.values())

    @property
    def executed_ns(self) -> int:
        """How long these took."""
        return sum(runs.compute_ns for runs in self.runs.values())

    def served(
        self,
        by: ServedBy,
        *,
        total_ms: float,
        at_ms: int,
        rows: int = 0,
        queue_ms: float = 0.0,
        compute_ms: float = 0.0,
        input_ms: float = 0.0,
        output_ms: float = 0.0,
    ) -> None:
        """Count an answer, given at ``at_ms`` (wall clock). ``rows`` is what a replica of this box computed for it, 0 where none did."""
        if by == "edge":
            self.edge += 1
        elif by == "peer":
            self.peer += 1
        else:
            self.cloud += 1
        self.total_ns += round(total_ms * NS_PER_MS)
        bucket = latency.bucket_of(total_ms)
        self.latency[bucket] = self.latency.get(bucket, 0) + 1
        self.last_at_ms = max(self.last_at_ms, at_ms)
        if rows:
            self.computed += 1
            self.rows += rows
            self.queue_ns += round(queue_ms * NS_PER_MS)
            self.input_ns += round(input_ms * NS_PER_MS)
            self.compute_ns += round(compute_ms * NS_PER_MS)
            self.output_ns += round(output_ms * NS_PER_MS)

    def ran(self, rows: int, compute_ms: float) -> None:
        """Count one run of the model on this box, whoever shared it and whatever became of their requests."""
        size = rows if rows <= MOST_EXACT_ROWS else 1 << (rows.bit_length() - 1)
        runs = self.runs.get(size)
        if runs is None:
            runs = self.runs[size] = Runs()
        runs.count += 1
        runs.compute_ns += round(compute_ms * NS_PER_MS)
        self.runs_rows += rows

    def made_way(self) -> None:
        """Count one that had to leave the queue for a more urgent one."""
        self.shed += 1

    def asked_besides(self, *, differs: bool) -> None:
        """Count a shadow's answer."""
        self.compared += 1
        self.differed += differs

    def refused(self, total_ms: float) -> None:
        """Count a request that nobody could answer in time."""
        self.failed("REJECTED", total_ms)

    def cancelled(self, total_ms: float) -> None:
        """Count a request whose caller went away."""
        self.failed("CANCELED", total_ms)

    def failed(self, reason: Reason, total_ms: float) -> None:
        """Count a request that got no answer."""
        self.failures[reason] = self.failures.get(reason, 0) + 1
        self.failures_ns += round(total_ms * NS_PER_MS)


_NOT_SUMMED = {"model", "version", "latency", "failures", "runs", "last_at_ms", "slots"}
_SUMMED = [name for name in Account.__struct_fields__ if name not in _NOT_SUMMED]


def merged(accounts: Sequence[Account]) -> Account:
    """The sum of one or more accounts, as of one deployment's in several processes. ``slots`` is what each of them sees, and the same."""
    total = Account(accounts[0].model, accounts[0].version)
    for name in _SUMMED:
        setattr(total, name, sum(getattr(account, name) for account in accounts))
    total.latency = latency.merged(account.latency for account in accounts)
    total.last_at_ms = max(account.last_at_ms for account in accounts)
    total.slots = max(account.slots for account in accounts)
    for account in accounts:
        for reason, count in account.failures.items():
            total.failures[reason] = total.failures.get(reason, 0) + count
        for rows, runs in account.runs.items():
            held = total.runs.setdefault(rows, Runs())
            held.count += runs.count
            held.compute_ns += runs.compute_ns
    return total


def merged_by_name(processes: Iterable[Mapping[str, Account]]) -> dict[str, Account]:
    """The accounts of several processes, by deployment."""
    found: dict[str, list[Account]] = {}
    for accounts in processes:
        for name, account in accounts.items():
            found.setdefault(name, []).append(account)
    return {name: merged(accounts) for name, accounts in found.items()}


class Ledger:
    """Every deployment's account in this process. ``started_at_ms`` is when it began to count, on the wall clock."""

    def __init__(self, node: str, tier: Tier) -> None:
        self._node = node
        self._tier: Tier = tier
        self.started_at_ms = time.time_ns() // 1_000_000
        self.accounts: dict[str, Account] = {}

    def account(self, deployment: str, model: str, version: int) -> Account:
        """The account of a deployment, opened on first use."""
        found = self.accounts.get(deployment)
        if found is None:
            found = self.accounts[deployment] = Account(model, version)
        found.model, found.version = model, version
        return found

    def totals(
        self, accounts: Mapping[str, Account] | None = None, *, started_at_ms: int | None = None, routed: Sequence[Routed] = ()
    ) -> GatewayTotals:
        """What the agent is told: of ``accounts``, the sum of several processes that count since ``started_at_ms``, else of this one's."""
        return GatewayTotals(
            self.started_at_ms if started_at_ms is None else started_at_ms,
            self._node,
            self._tier,
            [_told(name, account) for name, account in sorted((self.accounts if accounts is None else accounts).items())],
            list(routed),
        )


def _told(deployment: str, account: Account) -> ServeTotals:
    failures = account.failures
    return ServeTotals(
        deployment,
        edge=account.edge,
        peer=account.peer,
        cloud=account.cloud,
        refused=failures.get("REJECTED", 0),
        failed=failures.get("BACKEND", 0) + failures.get("OTHER", 0),
        late=account.late,
        latency=dict(account.latency),
        compared=account.compared,
        differed=account.differed,
    )
