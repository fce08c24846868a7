"""The calls to the service, written once for both clients."""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack
from urllib.parse import quote, urlsplit

import httpx

from rpg.client.back_off import BackOff, Patience
from rpg.client.download import (
    DirectoryForm,
    PartialFile,
    in_memory,
    is_there,
    model_path,
    partial_file,
)
from rpg.client.errors import CallError, refused, unreachable
from rpg.client.schema import (
    GeneratorInfo,
    GeneratorList,
    Job,
    JobPage,
    JobState,
    ModelFile,
    ModelPage,
    UnderstoodDescription,
)
from rpg.client.transport import EventReader, Response, Transport
from rpg.errors import RPGError

JobCallback = Callable[[Job], None]
BytesCallback = Callable[[int, int], None]

POLL_SECONDS = 2.0
_POLLS_WITHOUT_EVENTS = 30
_TOO_MANY = 429
_LONGEST_SLEEP = 60.0


class SamplingOptions(TypedDict, total=False):
    """How models are made; what is left out or None is the generator's own default.

    Steps are evaluations of the denoiser; guidance 1 is off; eta 0 is deterministic; temperature scales the
    starting noise; dtype is that of the networks' floating-point tensors (float32, float16 or bfloat16).
    With evaluate every model is measured, where the generator can be (`GeneratorInfo.evaluates`). Jobs of
    higher priority (-100 to 100, 0 if not given) are made first.
    """

    solver: str | None
    steps: int | None
    guidance: float | None
    eta: float | None
    temperature: float | None
    dtype: str | None
    evaluate: bool | None
    priority: int | None


class _WholeResponse(NamedTuple):
    status: int
    body: bytes

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise RPGError("the answer is not JSON: expected that of RPG's service") from None


class Calls:
    """The calls over a transport.

    All of them raise a `CallError`, which is an `RPGError`, when the service refuses or cannot be reached,
    the latter after trying again for as long as the patience lasts.
    """

    def __init__(
        self, server: str, transport: Transport, patience: Patience, poll_seconds: float = POLL_SECONDS
    ) -> None:
        self._server = server
        self._transport = transport
        self._patience = patience
        self._poll_seconds = poll_seconds

    async def generators(self) -> list[GeneratorInfo]:
        """The generators that are served."""
        return GeneratorList.from_json((await self._call("GET", "/v1/generators")).json()).generators

    async def submit(
        self,
        generator: str,
        conditions: Sequence[Sequence[float]] | None = None,
        number: int = 1,
        seed: int = 0,
        *,
        descriptions: Sequence[str] | None = None,
        pack: bool = False,
        **settings: Unpack[SamplingOptions],
    ) -> Job:
        """Ask for `number` models for each condition, or in all where the generator takes none.

        With `pack` the service stores small networks many in a file, which is faster.

        Where the generator has a text encoder (`GeneratorInfo.descriptions`), `descriptions` may stand in
        place of conditions. However often the request has to be sent, the service makes one job of it.

        Raises:
            RPGError: for what cannot be sent: conditions that are no finite numbers, or other descriptions
                than texts.
        """
        asked: dict[str, Any] = {"generator": generator, "number": number, "seed": seed}
        asked |= {key: value for key, value in settings.items() if value is not None}
        if conditions is not None:
            asked["conditions"] = _numbers(conditions)
        if descriptions is not None:
            asked["descriptions"] = _texts(descriptions)
        if pack:
            asked["pack"] = True
        headers = {"Content-Type": "application/json", "Idempotency-Key": uuid.uuid4().hex}
        body = _encoded(asked)
        return Job.from_json((await self._call("POST", "/v1/jobs", headers=headers, content=body)).json())

    async def understand(self, generator: str, description: str) -> UnderstoodDescription:
        """Which classes a description means, where the generator has a words model; nothing is made.

        Raises:
            RPGError: for another description than a text.
        """
        [text] = _texts([description])
        path, headers = (
            f"/v1/generators/{quote(generator, safe='')}/understand",
            {"Content-Type": "application/json"},
        )
        body = _encoded({"description": text})
        return UnderstoodDescription.from_json(
            (await self._call("POST", path, headers=headers, content=body)).json()
        )

    async def job(self, id: str) -> Job:
        """One job."""
        return Job.from_json((await self._call("GET", _job(id))).json())

    async def jobs(
        self,
        state: str | None = None,
        generator: str | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> JobPage:
        """A page of at most `limit` jobs, newest first; `after` is `next` of the page before."""
        asked = {"state": state, "generator": generator, "limit": limit, "after": after}
        asked = {key: value for key, value in asked.items() if value is not None}
        return JobPage.from_json((await self._call("GET", "/v1/jobs", params=asked)).json())

    async def wait(self, id: str, progress: JobCallback | None = None) -> Job:
        """Wait until a job has succeeded, failed or been cancelled; `progress` is told of changes."""
        seen: int | None = None

        def tell(job: Job) -> None:
            nonlocal seen
            if job.version != seen:
                seen = job.version
                if progress is not None:
                    progress(job)

        while True:
            before, polls = seen, 1
            try:
                job = await self._follow(id, tell)
                if job is not None and job.has_ended:
                    return job
                # A proxy may hold events back: asking now and then is quicker there.
                polls = _POLLS_WITHOUT_EVENTS if seen == before else 1
            except CallError as error:
                if error.status != _TOO_MANY:
                    raise
                # Too many listen. If all of them asked as often instead, that would be more work.
                await self._transport.sleep(min(error.retry_after or 0.0, _LONGEST_SLEEP))
            for _ in range(polls):
                job = await self.job(id)
                tell(job)
                if job.has_ended:
                    return job
                await self._transport.sleep(self._poll_seconds)

    async def cancel(self, id: str) -> Job:
        """Stop a job within one denoising batch. One that has ended stays as it is, with its models."""
        back_off = BackOff(self._patience)
        while True:
            # The job is looked at before each attempt, since DELETE removes a job that has ended.
            job = await self.job(id)
            if job.has_ended:
                return job
            try:
                response = await self._once("DELETE", _job(id))
            except CallError as error:
                await self._transport.sleep(back_off.seconds(error))
                continue
            if response.status == 204:
                raise RPGError(f"job {id} ended while it was being cancelled, and is removed")
            return Job.from_json(response.json())

    async def download(self, id: str, directory: Path, progress: BytesCallback | None = None) -> list[Path]:
        """Write all models of a job that are finished into `directory`, and return their paths by index.

        A model is a file, or a directory where those are that its generator learned from. What is there
        already is not fetched again, and weights that were broken off are continued. Each file is checked
        against its SHA-256 before the model takes its name. `progress` is told bytes of weights done and to
        do.

        Raises:
            RPGError: naming the file that is damaged, cannot be written, or would replace another one.
        """
        models, form = await self._models(id)
        total = sum(model.bytes for model in models)
        done = 0
        paths = []
        tell = progress or (lambda done, total: None)
        for model in models:
            target = model_path(directory, model, form)
            before = done

            def arrived(size: int, before: int = before) -> None:
                tell(before + size, total)

            if not await self._transport.run_blocking(partial(is_there, target, model, form)):
                with partial_file(target, model, form) as file:
                    await self._transport.run_blocking(file.read_what_is_there)
                    await self._fetch(_weights(id, model, form), file, arrived)
                    await self._transport.run_blocking(file.sync)
            done += model.bytes
            tell(done, total)
            paths.append(target)
        return paths

    async def generate(
        self,
        generator: str,
        condition: Sequence[float] | None = None,
        seed: int = 0,
        *,
        description: str | None = None,
        **settings: Unpack[SamplingOptions],
    ) -> bytes:
        """Have one model made: the content of its .safetensors file, checked against its SHA-256.

        Where models are directories, it is the file of weights; `download` fetches the others as well.

        The model is a job like any other, so that a lost connection makes no second one and loses no work.

        Raises:
            RPGError: with the reason, if it could not be made.
        """
        conditions = None if condition is None else [condition]
        descriptions = None if description is None else [description]
        job = await self.submit(generator, conditions, 1, seed, descriptions=descriptions, **settings)
        job = await self.wait(job.id)
        if job.state != JobState.succeeded:
            raise RPGError(f"job {job.id}: {job.state}" + (f": {job.error}" if job.error else ""))
        (model,), form = await self._models(job.id)
        file, buffer = in_memory(model, "the model")
        await self._fetch(_weights(job.id, model, form), file, lambda size: None)
        file.check()
        return buffer.getvalue()

    async def _follow(self, id: str, tell: JobCallback) -> Job | None:
        """Tell of each of a job's events until they end; returns the last one's job, if there was any."""
        job = None
        try:
            response = await self._open("GET", f"{_job(id)}/events", headers={"Accept": "text/event-stream"})
            try:
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    return None
                reader = EventReader()
                while block := await self._block(response):
                    for event in reader.feed(block):
                        job = Job.from_json(_WholeResponse(200, event.data.encode()).json())
                        tell(job)
                        if event.name == "end":
                            return job
            finally:
                await response.close()
        except CallError as error:
            if not error.is_temporary or error.status == _TOO_MANY:
                raise
        return job

    async def _models(self, id: str) -> tuple[list[ModelFile], DirectoryForm | None]:
        """The finished models, and what makes directories of their weights, if they are such."""
        found: list[ModelFile] = []
        form: DirectoryForm | None = None
        start: int | None = 0
        while start is not None:
            response = await self._call("GET", f"{_job(id)}/models", params={"start": start})
            page = ModelPage.from_json(response.json())
            found += page.models
            if page.next is not None and page.next <= start:
                raise RPGError("the answer is wrong at next: expected a later model of RPG's service")
            start = page.next
            if page.weights is not None and page.models and form is None:
                form = await self._form(id, page)
        return found, form

    async def _form(self, id: str, page: ModelPage) -> DirectoryForm:
        assert page.weights is not None
        companions: dict[str, bytes] = {}
        for each in page.companions:
            file, buffer = in_memory(each, each.name)
            # They are the same for all models.
            await self._fetch(_file(id, page.models[0], each.name), file, lambda size: None)
            file.check()
            companions[each.name] = buffer.getvalue()
        return DirectoryForm(page.weights, companions)

    async def _fetch(self, path: str, file: PartialFile, arrived: Callable[[int], None]) -> None:
        was_continued = file.size > 0
        await self._fill(path, file, arrived)
        if was_continued and not file.is_right:
            # A machine that went down may have left anything in the file.
            file.restart()
            await self._fill(path, file, arrived)

    async def _fill(self, path: str, file: PartialFile, arrived: Callable[[int], None]) -> None:
        back_off = BackOff(self._patience)
        while file.size < file.model.bytes:
            before = file.size
            try:
                await self._fill_once(path, file, arrived)
            except CallError as error:
                if file.size > before:
                    back_off.reset()
                await self._transport.sleep(back_off.seconds(error))

    async def _fill_once(self, path: str, file: PartialFile, arrived: Callable[[int], None]) -> None:
        headers = {"Accept-Encoding": "identity"}
        if file.size:
            headers |= {"Range": f"bytes={file.size}-", "If-Range": f'"{file.model.sha256}"'}
        response = await self._open("GET", path, headers=headers)
        try:
            continues = response.headers.get("content-range", "").startswith(f"bytes {file.size}-")
            if file.size and not (response.status == 206 and continues):
                file.restart()
            while block := await self._block(response):
                file.write(block)
                arrived(file.size)
        finally:
            await response.close()
        if file.size < file.model.bytes:
            raise CallError(f"{file.name}: broke off after {file.size} bytes", None, True)

    async def _call(self, method: str, path: str, **request: Any) -> _WholeResponse:
        back_off = BackOff(self._patience)
        while True:
            try:
                return await self._once(method, path, **request)
            except CallError as error:
                await self._transport.sleep(back_off.seconds(error))

    async def _once(self, method: str, path: str, **request: Any) -> _WholeResponse:
        response = await self._open(method, path, **request)
        try:
            return _WholeResponse(response.status, await self._rest(response))
        finally:
            await response.close()

    async def _open(self, method: str, path: str, **request: Any) -> Response:
        try:
            response = await self._transport.send(method, self._server + path, **request)
        except httpx.TransportError as error:
            raise unreachable(self._server, error) from error
        if 200 <= response.status < 300:
            return response
        try:
            body = await self._rest(response)
        finally:
            await response.close()
        raise refused(f"{method} {self._server}{path}", response.status, response.headers, body)

    async def _rest(self, response: Response) -> bytes:
        blocks = []
        while block := await self._block(response):
            blocks.append(block)
        return b"".join(blocks)

    async def _block(self, response: Response) -> bytes:
        try:
            return await response.block()
        except httpx.TransportError as error:
            raise unreachable(self._server, error) from error


def checked_server(server: str) -> str:
    """The address without a slash at its end.

    Raises:
        RPGError: if it is none.
    """
    parts = urlsplit(server)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise RPGError(f"'{server}': expected the address of a service, such as http://127.0.0.1:8000")
    try:
        httpx.URL(server)
    except httpx.InvalidURL as error:
        raise RPGError(f"'{server}': {error}") from error
    return server.rstrip("/")


def common_headers(token: str | None) -> Mapping[str, str]:
    """What every request carries.

    Raises:
        RPGError: for a token that no header can carry.
    """
    if token is None:
        return {}
    if not token or not all("!" <= character <= "~" for character in token):
        raise RPGError("the token: expected letters, digits and signs of ASCII without blanks")
    return {"Authorization": f"Bearer {token}"}


def _job(id: str) -> str:
    if not id or id.strip(".") == "":
        raise RPGError(f"'{id}': expected a job's id")
    return f"/v1/jobs/{quote(id, safe='')}"


def _file(id: str, model: ModelFile, name: str) -> str:
    return f"{_job(id)}/models/{model.index}/files/{name}"


def _weights(id: str, model: ModelFile, form: DirectoryForm | None) -> str:
    return _file(id, model, form.weights) if form else f"{_job(id)}/models/{model.index}"


def _numbers(conditions: Sequence[Sequence[float]]) -> list[list[float]]:
    try:
        return [[float(value) for value in condition] for condition in conditions]
    except (TypeError, ValueError) as error:
        raise RPGError(f"conditions: expected lists of numbers: {error}") from None


def _texts(descriptions: Sequence[str]) -> list[str]:
    # A text is a sequence of texts as well.
    if isinstance(descriptions, str) or not all(isinstance(text, str) for text in descriptions):
        raise RPGError(f"descriptions: expected a list of texts, got {descriptions!r:.80}")
    return list(descriptions)


def _encoded(asked: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(asked, allow_nan=False).encode()
    except ValueError:
        raise RPGError("expected finite numbers alone in what is asked for") from None
