"""Calls that go well and calls that do not: what is sent, what is sent again, what is told."""

import asyncio
import inspect
import socket
import time

import pytest

from rpg.client import AsyncClient, CallError, Client, Job, ModelFile, Patience
from rpg.client.calls import SamplingOptions
from rpg.client.schema import SamplingRequest
from rpg.client.transport import Event, EventReader
from rpg.errors import RPGError
from tests.client.conftest import HURRY, TOKEN, Both, Live, answered, cut_after
from tests.serve.conftest import CONDITIONS

PROBLEM = {"Content-Type": "application/problem+json"}


def test_the_options_of_a_submission_are_those_of_a_request() -> None:
    asked = SamplingRequest.model_fields.keys() - {"generator", "seed"}
    assert SamplingOptions.__annotations__.keys() == asked


def test_answers_pass_over_what_a_newer_service_adds_and_lack_nothing() -> None:
    given = {
        "index": 1,
        "sha256": "ab" * 32,
        "bytes": 2,
        "accuracy": None,
        "similarity": 0.5,
        "description": None,
    }
    model = ModelFile.from_json({**given, "colour": "red"})
    # What came with a later version of the service may be missing.
    later = {"metrics": None, "failure": None, "pack": None, "offset": 0}
    assert model.model_dump() == {**given, **later}
    with pytest.raises(RPGError, match=r"^the answer lacks bytes, sha256: expected that of RPG's service$"):
        ModelFile.from_json({key: value for key, value in given.items() if key not in ("bytes", "sha256")})
    with pytest.raises(RPGError, match=r"^the answer is no object: expected that of RPG's service$"):
        ModelFile.from_json([given])
    with pytest.raises(
        RPGError, match=r"^the answer is wrong at bytes: .* valid integer.*: expected that of"
    ):
        ModelFile.from_json({**given, "bytes": "many"})


def test_both_clients_have_the_same_methods() -> None:
    methods = ("generators", "submit", "job", "jobs", "wait", "cancel", "download", "generate")
    for name in methods:
        assert inspect.signature(getattr(Client, name)) == inspect.signature(getattr(AsyncClient, name))


def test_both_clients_agree(both: Both, live: Live) -> None:
    first, second = both("submit", "small", CONDITIONS, 2, seed=7, steps=2)
    assert (first.id != second.id, first.seed, first.models) == (True, 7, 4)
    told: list[Job] = []
    one, other = both("wait", first.id, told.append)
    assert one == other and one.state == "succeeded"
    assert told[-1] == one
    assert both("job", first.id)[0] == both("job", first.id)[1] == one
    generators = both("generators")
    assert [each.name for each in generators[0]] == ["small"]
    assert generators[0][0].condition_size == 3
    page, same = both("jobs", state="succeeded", limit=1)
    assert page == same and len(page.jobs) == 1


def test_pages(client: Client) -> None:
    ids = [client.submit("small", CONDITIONS[:1]).id for _ in range(3)]
    found, after = [], None
    while True:
        page = client.jobs(generator="small", limit=2, after=after)
        found += [job.id for job in page.jobs]
        after = page.next
        if after is None:
            break
    assert found[:3] == ids[::-1]
    assert len(set(found)) == len(found)


def test_the_blocking_client_works_inside_of_an_event_loop(live: Live) -> None:
    async def run() -> None:
        with Client(live.url, TOKEN, HURRY) as client:
            job = client.submit("small", CONDITIONS)
            assert client.wait(job.id).finished == 2

    asyncio.run(run())


def test_one_model(both: Both, expected) -> None:  # type: ignore[no-untyped-def]
    content = expected(CONDITIONS[1:], 1, 9)[0]
    assert both("generate", "small", CONDITIONS[1], 9) == (content, content)


def test_problems_are_one_line(both: Both, client: Client, live: Live) -> None:
    with pytest.raises(CallError, match=r"^generator: 'large' is not served; expected one of small$") as told:
        client.submit("large", CONDITIONS)
    assert (told.value.status, told.value.is_temporary) == (422, False)
    with pytest.raises(RPGError, match="expected 3 values, got 1"):
        client.submit("small", [[1.0]])
    with pytest.raises(RPGError, match="expected finite numbers"):
        client.submit("small", [[float("nan"), 0, 0]])
    with pytest.raises(RPGError, match="expected lists of numbers"):
        client.submit("small", [["a"]])  # type: ignore[list-item]
    with pytest.raises(RPGError, match="no job 'none'"):
        client.wait("none")
    with Client(live.url, "wrong", HURRY) as other, pytest.raises(CallError, match="unknown token"):
        other.jobs()
    assert len(live.asked("GET", "/v1/jobs")) == 1, "what is refused for good is asked once"


@pytest.mark.parametrize("server", ["127.0.0.1:8000", "ftp://host", "http://", "", "http://host:port"])
def test_an_address_that_is_none(server: str) -> None:
    with pytest.raises(RPGError):
        Client(server)


def test_a_token_that_is_none(live: Live) -> None:
    with pytest.raises(RPGError, match="without blanks"):
        Client(live.url, "a\nb")


def test_too_much_is_waiting(client: Client, live: Live) -> None:
    live.fault("POST", "/v1/jobs", answered(429, {"Retry-After": "1", **PROBLEM}, b'{"detail": "full"}'))
    live.fault("POST", "/v1/jobs", answered(503, {}))
    start = time.monotonic()
    job = client.submit("small", CONDITIONS)
    assert 1.0 <= time.monotonic() - start < 4.0
    assert job.models == 2
    assert len(live.asked("POST", "/v1/jobs")) == 3


def test_who_is_asked_to_wait_for_too_long_is_told_at_once(client: Client, live: Live) -> None:
    live.fault("POST", "/v1/jobs", answered(429, {"Retry-After": "60", **PROBLEM}, b'{"detail": "full"}'))
    with pytest.raises(CallError, match=r"^full$") as told:
        client.submit("small", CONDITIONS)
    assert told.value.retry_after == 60


def test_a_proxys_error_is_tried_again_and_the_services_own_is_not(client: Client, live: Live) -> None:
    live.fault("GET", "/v1/jobs", answered(500, {}, b"Internal Server Error"))
    client.jobs()
    live.fault("GET", "/v1/jobs", answered(500, PROBLEM, b'{"detail": "an error\\n of the service"}'))
    with pytest.raises(CallError, match=r"^an error of the service$"):
        client.jobs()


def test_what_is_not_the_service(client: Client, live: Live) -> None:
    live.fault("GET", "/v1/jobs", answered(200, {}, b"<html>"))
    with pytest.raises(RPGError, match="not JSON"):
        client.jobs()
    live.fault("GET", "/v1/jobs", answered(200, {}, b'{"jobs": []}'))
    with pytest.raises(RPGError, match="lacks next"):
        client.jobs()
    live.fault("GET", "/v1/jobs", answered(302, {"Location": "/login"}))
    with pytest.raises(CallError, match=r"GET http://.*/v1/jobs was answered with HTTP status 302"):
        client.jobs()


def test_a_connection_lost_after_the_job_was_accepted_makes_one_job(client: Client, live: Live) -> None:
    before = {job.id for job in client.jobs().jobs}
    live.fault("POST", "/v1/jobs", cut_after(10))
    job = client.submit("small", CONDITIONS)
    first, second = live.asked("POST", "/v1/jobs")
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]
    assert {each.id for each in client.jobs().jobs} - before == {job.id}
    again = client.submit("small", CONDITIONS)
    assert again.id != job.id, "two submissions are two jobs"


def test_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    patience = Patience(first=0.05, largest=0.1, total=0.3)
    start = time.monotonic()
    with (
        Client(f"http://127.0.0.1:{port}", TOKEN, patience) as client,
        pytest.raises(CallError, match=rf"^http://127.0.0.1:{port}: no connection: .*refused$"),
    ):
        client.jobs()
    assert 0.1 < time.monotonic() - start < 3
    (told,) = caplog.messages
    assert told.endswith("refused; trying again for up to 0 s")


def test_events_that_break_off_are_taken_up_again(client: Client, live: Live) -> None:
    job = client.submit("small", CONDITIONS, 100, steps=20)
    for _ in range(2):
        live.fault("GET", "/events", cut_after(700))
    told: list[Job] = []
    assert client.wait(job.id, told.append).state == "succeeded"
    assert len(live.asked("GET", "/events")) >= 2
    finished = [each.finished for each in told]
    assert finished == sorted(finished) and finished[-1] == 200
    assert len({each.version for each in told}) == len(told), "nothing is told twice"


def test_without_events_it_asks_now_and_then(client: Client, live: Live) -> None:
    for broken in (answered(503, {}), answered(200, {"Content-Type": "text/html"}, b"login")):
        job = client.submit("small", CONDITIONS, 50, steps=20)
        live.requests.clear()
        for _ in range(9):
            live.fault("GET", "/events", broken)
        assert client.wait(job.id).state == "succeeded"
        live.faults.clear()
        assert len(live.asked("GET", job.id)) > len(live.asked("GET", "/events"))


def test_cancelling(both: Both, client: Client, live: Live) -> None:
    jobs = [client.submit("small", CONDITIONS, 5000, steps=1000) for _ in range(2)]
    assert client.cancel(jobs[0].id).state == "cancelled"
    # The answer is lost; asking again must not remove the job.
    live.fault("DELETE", jobs[1].id, cut_after(10))
    assert client.cancel(jobs[1].id).state == "cancelled"
    assert len(live.asked("DELETE", jobs[1].id)) == 1
    done = client.submit("small", CONDITIONS)
    client.wait(done.id)
    one, other = both("cancel", done.id)
    assert one == other == client.job(done.id)
    assert one.state == "succeeded"


def test_events_cut_anywhere() -> None:
    stream = (
        b'event: progress\r\nid: 1\r\ndata: {"a":\ndata: 1}\n\n: still here\n\nevent: end\ndata: \xc3\xa4\n\n'
    )
    expected = [Event("progress", '{"a":\n1}'), Event("end", "ä")]
    for size in (1, 2, 7, 1000):
        reader = EventReader()
        blocks = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert [event for block in blocks for event in reader.feed(block)] == expected
