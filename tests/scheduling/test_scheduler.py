"""Requests that share a batch get what they get alone, whenever they come and go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from mpt_trt.engines.interface import RowModel
from mpt_trt.errors import MptTrtError
from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.generate import generate
from mpt_trt.scheduling.ranks import IDLE, lead
from mpt_trt.scheduling.scheduler import NewToken, Request, Scheduler
from mpt_trt.scheduling.worker import OnFailure, Worker
from support.echo_ranks import EchoRanks
from support.generation import NETWORKS, PROMPTS, VOCAB, NetworkModel, greedy


class RowsOfNetwork(NetworkModel):
    """A RowModel that keeps token ids, and fails when a query sees a position never written."""

    selected = slice(0, 0)

    def start(self, batch_size: int) -> None:
        super().start(batch_size)
        self.all, self.selected = self.ids, slice(0, batch_size)

    def select_rows(self, first: int, count: int) -> None:
        assert 0 <= first < first + count <= self.max_batch_size
        self.ids = self.all[first : first + count]

    def copy_row(self, source: int, target: int) -> None:
        self.all[target] = self.all[source]


@dataclass
class Client:
    """A request and what came of it."""

    prompt: list[int]
    config: GenerationConfig
    stream: int = 0
    news: list[NewToken] = field(default_factory=list)
    ends: list[Exception | None] = field(default_factory=list)
    stops_at: int | None = None

    def request(self) -> Request:
        def on_token(new: NewToken) -> bool:
            self.news.append(new)
            return len(self.news) == self.stops_at

        return Request(
            tuple(self.prompt), self.config, on_token, self.ends.append, self.stream, True
        )

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(new.token for new in self.news)


def alone(client: Client) -> tuple[int, ...]:
    (output,) = generate(NetworkModel(NETWORKS[2]), [client.prompt], client.config)[0]
    return output.tokens


def model(rows: int = 3, **options: int) -> RowsOfNetwork:
    return RowsOfNetwork(NETWORKS[2], max_batch_size=rows, **options)


def run(scheduler: Scheduler) -> None:
    for _ in range(2000):
        if scheduler.is_idle:
            return
        scheduler.run_once()
    raise AssertionError("never idle")


@pytest.mark.parametrize("piece", [1, 3, None])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_every_request_gets_what_it_gets_alone(rows: int, piece: int | None) -> None:
    clients = [
        Client(prompt, greedy(max_new_tokens=count))
        for count, prompt in zip((14, 3, 1, 7, 14, 9), PROMPTS, strict=True)
    ]
    scheduler = Scheduler(model(rows), piece)
    for number, client in enumerate(clients):
        scheduler.add(client.request())
        for _ in range(number):
            scheduler.run_once()
    run(scheduler)
    assert [client.tokens for client in clients] == [alone(client) for client in clients]
    assert [client.ends for client in clients] == [[None]] * len(clients)
    assert scheduler.num_generated == sum(len(client.tokens) for client in clients)
    assert scheduler.num_read == sum(map(len, PROMPTS))


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5, "temperature": 0.8, "random_seed": 7},
        {"top_k": 0, "top_p": 0.9, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.3, "top_log_probs": 3},
    ],
)
def test_sampling_log_probs_and_penalties(options: dict) -> None:
    clients = [Client(prompt, greedy(**options)) for prompt in PROMPTS]
    scheduler = Scheduler(model())
    for client in clients:
        scheduler.add(client.request())
    run(scheduler)
    for client in clients:
        (expected,) = generate(NetworkModel(NETWORKS[2]), [client.prompt], client.config)[0]
        assert client.tokens == expected.tokens
        assert [new.log_prob for new in client.news] == pytest.approx(expected.log_probs, abs=1e-4)
        top = [[token for token, _ in new.top] for new in client.news if new.top]
        assert top == [[token for token, _ in one] for one in expected.top_log_probs]


@pytest.mark.parametrize("max_logits", [1, 3, None])
def test_log_probs_of_prompts(max_logits: int | None) -> None:
    """They are those of the same tokens when they are generated."""
    config = greedy(top_log_probs=2, end_ids=(), max_new_tokens=6)
    (whole,) = generate(NetworkModel(NETWORKS[2]), PROMPTS[:1], config)[0]
    reported: list[tuple[NewToken, ...]] = []
    first = Client([*PROMPTS[0], *whole.tokens[:-1]], replace(config, max_new_tokens=1))
    others = [Client(prompt, greedy()) for prompt in PROMPTS[1:]]
    scheduler = Scheduler(model(), max_logits=max_logits)
    scheduler.add(replace(first.request(), on_prompt=reported.append))
    for client in others:
        scheduler.add(client.request())
    run(scheduler)
    (prompt,) = reported
    assert [each.token for each in prompt] == first.prompt
    assert (prompt[0].log_prob, prompt[0].top) == (None, ())
    found = [*prompt[len(PROMPTS[0]) :], *first.news]
    assert [each.log_prob for each in found] == pytest.approx(whole.log_probs, abs=1e-4)
    for each, top in zip(found, whole.top_log_probs, strict=True):
        assert [token for token, _ in each.top] == [token for token, _ in top]
    assert [client.tokens for client in others] == [alone(client) for client in others]


def test_completions_of_a_prompt_have_random_streams_of_their_own() -> None:
    config = greedy(top_k=0, end_ids=())
    first, second = (Client(PROMPTS[0], config, stream) for stream in (0, 1))
    scheduler = Scheduler(model())
    for client in (first, second):
        scheduler.add(client.request())
    run(scheduler)
    assert first.tokens == alone(first) != second.tokens


def test_nobody_waits_longer_than_a_piece_and_short_prompts_overtake() -> None:
    long = list(np.random.default_rng(0).integers(0, VOCAB, 30))
    talking, reading, short = (
        Client(prompt, greedy(max_new_tokens=8, end_ids=())) for prompt in ([5], long, [7, 8])
    )
    network = model()
    scheduler = Scheduler(network, piece_tokens=4)
    scheduler.add(talking.request())
    scheduler.run_once()
    scheduler.add(reading.request())
    scheduler.add(short.request())
    counts = []
    while len(talking.news) < 8:
        scheduler.run_once()
        counts.append(len(talking.news))
    # A token at least every second step, and none of the steps reads more than a piece.
    assert all(later > earlier for earlier, later in zip(counts, counts[2:], strict=False))
    assert max(ids.size for ids, _, _ in network.steps) <= 4
    assert short.news and not reading.news
    run(scheduler)
    for client in (talking, reading, short):
        assert client.tokens == alone(client)


@pytest.mark.parametrize("piece_tokens", [7, 12, 24])
def test_prompts_in_adjacent_rows_are_read_together(piece_tokens: int) -> None:
    """Short ones are padded, long ones go on, and one that asks for its log-probabilities waits."""
    numbers = np.random.default_rng(0)
    prompts = [numbers.integers(0, VOCAB, length).tolist() for length in (4, 3, 9, 1, 5, 4)]
    clients = [Client(prompt, greedy(end_ids=())) for prompt in prompts]
    reported: list[tuple[NewToken, ...]] = []
    network = model(rows=6)
    scheduler = Scheduler(network, piece_tokens)
    for number, client in enumerate(clients):
        on_prompt = reported.append if number == 4 else None
        scheduler.add(replace(client.request(), on_prompt=on_prompt))
    run(scheduler)
    sizes = [ids.shape for ids, _, _ in network.steps]
    assert max(rows * seq for rows, seq in sizes if seq > 1) <= piece_tokens
    assert any(rows > 1 and seq > 1 for rows, seq in sizes)
    assert [client.tokens for client in clients] == [alone(client) for client in clients]
    assert scheduler.num_read == sum(map(len, prompts))
    (prompt,) = reported
    assert [each.token for each in prompt] == prompts[4]


def test_ranks_on_cpus_read_prompts_one_by_one_and_exchange_only_steps() -> None:
    """While the same rows generate, nothing else is exchanged."""
    told: list[str] = []

    class Ranks(EchoRanks):
        def exchange(self, value: tuple) -> list:
            told.append(value[0])
            return super().exchange(value)

    network = model(rows=6)
    scheduler = Scheduler(lead(network, Ranks(0, 2)))
    first, *others = (Client(prompt, greedy(end_ids=())) for prompt in PROMPTS)
    scheduler.add(first.request())
    run(scheduler)
    assert told == ["start", "select_rows", "select_rows", *["step"] * 14]
    for client in others:
        scheduler.add(client.request())
    run(scheduler)
    assert [client.tokens for client in others] == [alone(client) for client in others]
    assert all(len(ids) == 1 for ids, _, _ in network.steps if ids.shape[1] > 1)


def test_an_idle_rank_tells_the_others_before_they_give_up() -> None:
    told, is_enough = [], threading.Event()

    class Ranks(EchoRanks):
        patience_seconds = 0.2

        def exchange(self, value: tuple) -> list:
            told.append(value[0])
            if told[-3:] == [IDLE] * 3:
                is_enough.set()
            return super().exchange(value)

    leader = lead(model(), Ranks(0, 2))
    assert leader.idle_seconds < Ranks.patience_seconds
    worker = Worker(Scheduler(leader), "exit", leader.keep_waiting, leader.idle_seconds)
    worker.start()
    assert is_enough.wait(30)
    worker.stop()
    worker.join(30)
    assert worker.failure is None and not worker.is_running


def test_requests_wait_in_order() -> None:
    clients = [Client(prompt, greedy(max_new_tokens=2, end_ids=())) for prompt in PROMPTS]
    order: list[int] = []
    scheduler = Scheduler(model(rows=1))
    for number, client in enumerate(clients):
        request = client.request()
        ended = Callable[[Exception | None], None]
        end: ended = lambda _, number=number: order.append(number)  # noqa: E731
        scheduler.add(replace(request, on_end=end))
    run(scheduler)
    assert order == [0, 1, 2, 3, 4, 5]


def test_cancelled_requests_free_their_rows() -> None:
    clients = [Client(prompt, greedy(end_ids=())) for prompt in PROMPTS]
    requests = [client.request() for client in clients]
    scheduler = Scheduler(model(rows=3), piece_tokens=4)
    for request in requests:
        scheduler.add(request)
    for _ in range(9):
        scheduler.run_once()
    assert (scheduler.num_running, scheduler.num_waiting) == (3, 3)
    # One that generates, one whose prompt is half read, and one that waits.
    assert clients[0].news and not clients[2].news
    for number in (0, 2, 5, 5):
        scheduler.cancel(requests[number])
    assert (scheduler.num_running, scheduler.num_waiting) == (3, 0)
    run(scheduler)
    for number in (1, 3, 4):
        assert clients[number].tokens == alone(clients[number])
    assert [bool(client.ends) for client in clients] == [False, True, False, True, True, False]


def test_a_callback_ends_its_request() -> None:
    client = Client(PROMPTS[0], greedy(end_ids=()), stops_at=3)
    other = Client(PROMPTS[1], greedy())
    scheduler = Scheduler(model())
    for one in (client, other):
        scheduler.add(one.request())
    run(scheduler)
    assert client.tokens == alone(client)[:3] and client.ends == [None]
    assert other.tokens == alone(other)


def test_a_step_that_fails_ends_what_runs_and_no_more() -> None:
    network = model(rows=2)
    clients = [Client(prompt, greedy()) for prompt in PROMPTS[:4]]
    scheduler = Scheduler(network)
    for client in clients:
        scheduler.add(client.request())
    for _ in range(4):
        scheduler.run_once()
    error = RuntimeError("out of luck")
    scheduler.fail(error, with_waiting=False)
    scheduler.restart()
    run(scheduler)
    assert [client.ends for client in clients] == [[error], [error], [None], [None]]
    assert clients[3].tokens == alone(clients[3])


@pytest.mark.parametrize("on_failure", ["continue", "exit"])
@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_row_that_cannot_be_moved_ends_what_runs(
    is_cancelled: bool, on_failure: OnFailure
) -> None:
    """The first request leaves, by its end or by its client's, and the last row moves there."""
    errors = [RuntimeError("out of luck")]

    class Stuck(RowsOfNetwork):
        def copy_row(self, source: int, target: int) -> None:
            if errors:
                raise errors.pop()
            super().copy_row(source, target)

    error = errors[0]
    clients = [Client(prompt, greedy(end_ids=())) for prompt in PROMPTS[:3]]
    worker = Worker(Scheduler(Stuck(NETWORKS[2], max_batch_size=3)), on_failure)
    requests = [client.request() for client in clients]

    def leave(new: NewToken) -> bool:
        clients[0].news.append(new)
        if is_cancelled and len(clients[0].news) == 2:
            worker.cancel(requests[0])
        return not is_cancelled and len(clients[0].news) == 2

    requests[0] = replace(requests[0], on_token=leave)
    late = Client(PROMPTS[3], greedy())

    def on_end(reason: Exception | None) -> None:
        clients[2].ends.append(reason)
        worker.submit(late.request())
        worker.stop()

    requests[2] = replace(requests[2], on_end=on_end)
    for request in requests:
        worker.submit(request)
    worker.start()
    worker.join(30)
    assert not worker.is_running and not errors
    assert [client.ends for client in clients] == [[] if is_cancelled else [None], [error], [error]]
    if on_failure == "continue":
        assert worker.failure is None
        assert (late.tokens, late.ends) == (alone(late), [None])
    else:
        assert worker.failure is error
        assert late.tokens == () and isinstance(late.ends[0], MptTrtError)


def test_requests_that_come_too_late_are_rejected() -> None:
    """Also in the last moments of the thread, after it has looked for requests."""
    first, late = Client([5], greedy()), Client([7], greedy())
    moments: list[int] = []

    def deliver() -> None:
        if first.ends and not worker.is_running:
            with pytest.raises(MptTrtError, match="was stopped"):
                worker.submit(late.request())
            moments.append(1)

    worker = Worker(Scheduler(model(), deliver=deliver))
    worker.submit(first.request())
    worker.stop()
    worker.start()
    worker.join(30)
    assert moments == [1] and first.tokens == alone(first)
    with pytest.raises(MptTrtError, match="was stopped"):
        worker.submit(late.request())
    assert not late.news


def test_logits_that_are_no_numbers_end_only_their_request() -> None:
    class Overflowing(RowsOfNetwork):
        def step(self, *arguments):
            logits = super().step(*arguments).copy()
            if len(logits) == 2:
                logits[0, 7] = np.nan
            return logits

    clients = [Client(prompt, greedy()) for prompt in PROMPTS[:2]]
    scheduler = Scheduler(Overflowing(NETWORKS[2], max_batch_size=2))
    for client in clients:
        scheduler.add(client.request())
    run(scheduler)
    assert isinstance(clients[0].ends[0], FloatingPointError)
    assert clients[1].tokens == alone(clients[1])


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt 0 is empty"),
        ([VOCAB], {}, "the vocabulary is 0..60"),
        ([1] * 30, {}, "a cache row holds 40"),
        ([1], {"num_beams": 2}, "num_beams is 2; requests that share a batch need 1"),
    ],
)
def test_requests_that_do_not_fit_are_rejected(prompt, options, message: str) -> None:
    with pytest.raises(MptTrtError, match=message):
        Scheduler(model()).require_fitting(Client(prompt, greedy(**options)).request())


def test_pieces_have_at_least_a_token() -> None:
    with pytest.raises(MptTrtError, match="piece_tokens is 0"):
        Scheduler(model(), 0)


def random_requests(seed: int, model: RowModel, vocab_size: int) -> Iterator[Client]:
    numbers = np.random.default_rng(seed)
    for _ in range(12):
        prompt = numbers.integers(0, vocab_size, numbers.integers(1, 20)).tolist()
        yield Client(prompt, greedy(max_new_tokens=int(numbers.integers(1, 12))))
