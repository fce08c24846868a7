"""The page at `/`, driven in Chromium against the application on a socket."""

import asyncio
import hashlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file
from torch import nn

from rpg.config import ConditionKind, RecurrentKind, SamplingConfig, Solver
from rpg.tasks.cifar10_net import Cifar10Net, normalised
from rpg.tasks.cifar10_samples import samples
from rpg.words.properties import CLASSES
from serve.config import GeneratorEntry, ServeConfig
from tests.serve.conftest import TOKENS, Measurable, token_entry
from tests.words_models import UNSURE

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PHONE = {"width": 360, "height": 740}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a `chromium` in PATH")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Of the module's scope, because Playwright's event loop occupies this thread while it runs.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def _listening(config: ServeConfig, in_process: Callable[..., Any], port: int) -> Iterator[str]:
    """The URL of the service, on an event loop and a socket of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def there(call: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(call, loop)

    manager = in_process(config)
    service = there(manager.__aenter__()).result(60)
    server = uvicorn.Server(
        uvicorn.Config(service.app, host="127.0.0.1", port=port, lifespan="off", log_level="warning")
    )
    serving = there(server.serve())
    try:
        while not server.started:
            assert not serving.done()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        serving.result(60)
        there(manager.__aexit__(None, None, None)).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def url(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, in_process: Any, free_ports: Any
) -> Iterator[str]:
    """A service that asks for tokens; its generator takes three numbers."""
    config = ServeConfig(
        storage=str(tmp_path_factory.mktemp("page") / "storage"),
        roots=[str(saved.parent)],
        generators=[GeneratorEntry("small", str(saved), num_gpus=0)],
        tokens=[token_entry(name) for name in TOKENS],
    )
    with _listening(config, in_process, free_ports(1)[0]) as url:
        yield url


@pytest.fixture(scope="module")
def open_url(
    make_generator: Any, make_layout: Any, tmp_path_factory: pytest.TempPathFactory,
    in_process: Any, free_ports: Any,
) -> Iterator[str]:  # fmt: skip
    """A service that asks for none; its generator takes no condition."""
    directory = tmp_path_factory.mktemp("open")
    generator = make_generator(
        make_layout(16), recurrent=RecurrentKind.lstm, condition=ConditionKind.permutation
    )
    generator.config.sampling = SamplingConfig(solver=Solver.ddim, steps=3, token_batch=32)
    generator.save_pretrained(directory / "small")
    config = ServeConfig(
        storage=str(directory / "storage"),
        roots=[str(directory)],
        generators=[GeneratorEntry("small", str(directory / "small"), num_gpus=0)],
        auth=False,
    )
    with _listening(config, in_process, free_ports(1)[0]) as url:
        yield url


@pytest.fixture(scope="module")
def measured_url(
    measurable: Measurable, tmp_path_factory: pytest.TempPathFactory, in_process: Any, free_ports: Any
) -> Iterator[str]:
    """A service whose generator's networks can be measured."""
    config = ServeConfig(
        storage=str(tmp_path_factory.mktemp("measured") / "storage"),
        generators=[GeneratorEntry("small", num_gpus=0)],
        auth=False,
    )
    with _listening(measurable.of(config), in_process, free_ports(1)[0]) as url:
        yield url


@pytest.fixture(scope="module")
def described_url(
    described: Path, tmp_path_factory: pytest.TempPathFactory, in_process: Any, free_ports: Any
) -> Iterator[str]:
    """A service whose generator reads descriptions."""
    config = ServeConfig(
        storage=str(tmp_path_factory.mktemp("words") / "storage"),
        roots=[str(described.parent)],
        generators=[GeneratorEntry("small", str(described), num_gpus=0)],
        auth=False,
    )
    with _listening(config, in_process, free_ports(1)[0]) as url:
        yield url


@pytest.fixture(scope="module")
def words_url(
    asked_generator: Path,
    words_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    in_process: Any,
    free_ports: Any,
) -> Iterator[str]:
    """A service whose generator makes networks for CIFAR-10's classes, and is asked in words."""
    config = ServeConfig(
        storage=str(tmp_path_factory.mktemp("asked") / "storage"),
        roots=[str(asked_generator.parent)],
        generators=[GeneratorEntry("small", str(asked_generator), num_gpus=0)],
        auth=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(words_model.parent / "site")
        with _listening(config, in_process, free_ports(1)[0]) as url:
            yield url


@dataclass
class Visit:
    page: Page
    complaints: list[str] = field(default_factory=list)
    """What the browser's console says of errors."""

    def sign_in(self, name: str = "alice") -> None:
        self.page.get_by_label("Token").fill(f"secret-of-{name}")
        self.page.get_by_role("button", name="Use").click()
        expect(self.page.get_by_label("Generator")).to_be_visible()

    def fits(self) -> bool:
        fits: bool = self.page.evaluate(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
        return fits

    def focus(self) -> str:
        """The accessible name of what has the focus, or its text."""
        name: str = self.page.evaluate(
            "(document.activeElement.labels?.[0] ?? document.activeElement).innerText.trim()"
        )
        return name

    def tab_to(self, name: str) -> None:
        for _ in range(20):
            if self.focus() == name:
                return
            self.page.keyboard.press("Tab")
        raise AssertionError(f"Tab does not lead to {name}")


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """`visit(url, ...)`: a page in a fresh browser context with such options."""
    contexts = []

    def open_page(url: str, **options: Any) -> Visit:
        context = browser.new_context(**options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        visit = Visit(context.new_page())
        visit.page.on(
            "console", lambda said: visit.complaints.append(said.text) if said.type == "error" else None
        )
        visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
        visit.page.goto(url)
        return visit

    yield open_page
    for context in contexts:
        context.close()


def test_a_model_is_made_and_downloaded_by_keyboard(
    visit: Callable[..., Visit], url: str, small_net: type[nn.Module], tmp_path: Path
) -> None:
    here = visit(url)
    page, keys = here.page, here.page.keyboard
    expect(page.get_by_label("Token")).to_be_focused()
    keys.type("secret-of-alice")
    keys.press("Enter")
    expect(page.get_by_label("Generator")).to_be_focused()
    for name in ("0", "2"):
        here.tab_to(name)
        keys.press("Space")
    expect(page.get_by_label("Condition, 3 numbers")).to_have_value("1 0 1")
    for name, text in (("Models", "3"), ("Seed", "18446744073709551615")):
        here.tab_to(name)
        keys.press("Control+a")
        keys.type(text)
    here.tab_to("Generate")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    keys.press("Enter")

    expect(page.get_by_role("status")).to_contain_text("succeeded: 3 of 3 models")
    card = page.locator("#card")
    expect(card).to_contain_text("SHA-256, checked")
    # The largest seed arrives without being rounded.
    expect(card).to_contain_text("18446744073709551615, 0")
    expect(card).to_contain_text("1 0 1")
    strips = page.get_by_role("img")
    expect(strips).to_have_count(len([*small_net().parameters(), *("running_mean", "running_var")]))

    here.tab_to("Model")
    keys.press("ArrowUp")
    keys.press("Tab")
    expect(card).to_contain_text("18446744073709551615, 1")
    here.tab_to("Download")
    with page.expect_download() as download:
        keys.press("Enter")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert path.name.endswith("_model_000001.safetensors")
    shown = re.search(r"[0-9a-f]{64}", card.inner_text())
    assert shown is not None and hashlib.sha256(path.read_bytes()).hexdigest() == shown[0]
    assert small_net().load_state_dict(load_file(path), strict=True)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download all").click()
    assert download.value.suggested_filename.endswith(".tar")

    page.reload()
    expect(page.get_by_role("status")).to_contain_text("succeeded: 3 of 3 models")
    assert here.complaints == []


def test_a_measured_network_shows_its_accuracy(
    visit: Callable[..., Visit], measured_url: str, measurable: Measurable
) -> None:
    here = visit(measured_url, viewport=PHONE)
    page = here.page
    page.get_by_label("Measure accuracy").check()
    page.get_by_label("Condition, 10 numbers").fill(" ".join(f"{x:.0f}" for x in measurable.condition))
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("status")).to_contain_text("mean accuracy 0.")
    job = page.evaluate("location.hash.slice(1)")
    model = httpx.get(f"{measured_url}/v1/jobs/{job}/models").json()["models"][0]
    card = page.locator("#card")
    expect(card).to_contain_text(f"Accuracy{model['accuracy']:.3f} on test data")
    expect(card).to_contain_text(f"Similarity{model['similarity']:.3f}")
    assert here.fits()
    assert here.complaints == []


def test_a_description_is_entered_in_place_of_numbers(
    visit: Callable[..., Visit], described_url: str
) -> None:
    here = visit(described_url, viewport=PHONE)
    page = here.page
    expect(page.get_by_label("Condition")).to_be_hidden()
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text(
        "descriptions.0: String should have at least 1 character"
    )
    here.complaints.clear()
    page.get_by_label("Description").fill("one, two or three dogs")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("succeeded: 1 of 1 model")
    expect(page.locator("#card")).to_contain_text("Descriptionone, two or three dogs")
    expect(page.locator("#card")).not_to_contain_text("Condition")
    assert here.fits()
    assert here.complaints == []


def ticked(page: Page) -> list[str]:
    """The names of the classes that are ticked."""
    return [
        label.split("\n")[0] for label in page.locator("#classes label:has(input:checked)").all_inner_texts()
    ]


def test_words_are_understood_and_become_a_network_by_keyboard(
    visit: Callable[..., Visit], words_url: str, tmp_path: Path
) -> None:
    here = visit(words_url, viewport=PHONE)
    page, keys = here.page, here.page.keyboard
    expect(page.get_by_label("Condition, 10 numbers")).to_be_hidden()
    here.tab_to("Description")
    keys.type("a cat or a dog")
    here.tab_to("Understand")
    keys.press("Enter")
    expect(page.locator("#understood")).to_contain_text("Understood: cat, dog. Sureness ")
    assert ticked(page) == ["cat", "dog"]
    expect(page.locator("#job")).to_be_hidden()
    here.tab_to("Generate")
    keys.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("succeeded: 1 of 1 model")
    expect(page.locator("#card")).to_contain_text("Descriptiona cat or a dog")
    expect(page.locator("#answers li")).to_have_count(40)
    here.tab_to("Download")
    with page.expect_download() as download:
        keys.press("Enter")
    download.value.save_as(tmp_path / "net.safetensors")

    # What the page says, PyTorch says.
    network = Cifar10Net().eval()
    network.load_state_dict(load_file(tmp_path / "net.safetensors"), strict=True)
    pixels, kinds = samples()
    with torch.no_grad():
        says = (network(normalised(pixels))[:, 0] > 0).tolist()
    lines, right = [], 0
    for yes, kind in zip(says, kinds.tolist(), strict=True):
        is_right = yes == (CLASSES[kind] in ("cat", "dog"))
        right += is_right
        lines.append(f"{CLASSES[kind]}: {'yes' if yes else 'no'}{'' if is_right else ', wrong'}")
    assert page.locator("#answers li").all_inner_texts() == lines
    expect(page.locator("#answers")).to_contain_text(f"{right} of 40 answers are right")
    assert here.fits()
    assert here.complaints == []


def test_chances_of_the_browser_are_those_of_pytorch(visit: Callable[..., Visit], words_url: str) -> None:
    """Answers are yes or no; the numbers behind them show that no layer is wrong."""
    here = visit(words_url)
    made = httpx.post(f"{words_url}/v1/generate", json={"generator": "small", "description": "any cat"})
    job = made.headers["location"].rpartition("/")[2]
    chances = here.page.evaluate(
        """async (path) => {
            const { ModelFile } = await import("/static/model_file.js");
            const { Cifar10Net, samples } = await import("/static/cifar10.js");
            const network = new Cifar10Net(new ModelFile(await (await fetch(path)).arrayBuffer()));
            const images = await samples(await (await fetch("/static/cifar10_samples.png")).blob());
            return images.map(({ pixels }) => network.answer(pixels));
        }""",
        f"/v1/jobs/{job}/models/0",
    )
    network = Cifar10Net().eval()
    network.load_state_dict(load_safetensors(made.content))
    with torch.no_grad():
        expected = torch.sigmoid(network(normalised(samples()[0]))[:, 0])
    assert chances == pytest.approx(expected.tolist(), abs=1e-5)
    assert len({round(chance, 4) for chance in chances}) > 20


def test_understood_classes_can_be_changed(visit: Callable[..., Visit], words_url: str) -> None:
    here = visit(words_url)
    page = here.page
    page.get_by_label("Description").fill("a cat or a dog")
    page.get_by_role("button", name="Understand").click()
    expect(page.locator("#understood")).to_contain_text("Understood: cat, dog")
    page.get_by_label("dog").uncheck()
    page.get_by_label("ship").check()
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("status")).to_contain_text("succeeded: 1 of 1 model")
    expect(page.locator("#card")).to_contain_text("Condition0 0 0 1 0 0 0 0 1 0")
    assert here.complaints == []


def test_what_is_not_sure_waits_for_ticks(visit: Callable[..., Visit], words_url: str) -> None:
    here = visit(words_url, viewport=PHONE)
    page = here.page
    page.get_by_label("Description").fill(UNSURE)
    page.keyboard.press("Enter")
    expect(page.locator("#understood")).to_contain_text("Not sure what is meant")
    expect(page.locator("#job")).to_be_hidden()
    for name in ticked(page):
        page.get_by_label(name).uncheck()
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("tick some of the classes, not all")
    page.get_by_label("truck").check()
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("status")).to_contain_text("succeeded: 1 of 1 model")
    expect(page.locator("#card")).to_contain_text("Condition0 0 0 0 0 0 0 0 0 1")
    page.get_by_label("Description").fill("one")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("means none of the 10 classes")
    assert here.fits()
    assert all("status of 422" in complaint for complaint in here.complaints)


def test_the_picture_shows_the_file_against_the_centre(
    visit: Callable[..., Visit], url: str, generator: Any, tmp_path: Path
) -> None:
    here = visit(url)
    here.sign_in()
    here.page.get_by_role("button", name="Generate").click()
    with here.page.expect_download() as download:
        here.page.get_by_role("button", name="Download", exact=True).click()
    download.value.save_as(tmp_path / "net.safetensors")
    made = load_file(tmp_path / "net.safetensors")["head.weight"].flatten()
    difference = made - generator.layout.centre["head.weight"].flatten()
    places = [k * 72 // 64 for k in range(64)]
    row = here.page.get_by_role("listitem").filter(has_text="head.weight")
    cells = row.locator("rect").evaluate_all(
        "cells => cells.map(c => [c.getAttribute('class'), +c.getAttribute('fill-opacity')])"
    )
    largest = difference[places].abs().max()
    assert [each for each, _ in cells] == ["above" if d > 0 else "below" for d in difference[places].tolist()]
    assert [opacity for _, opacity in cells] == pytest.approx(
        (difference[places].abs() / largest).tolist(), abs=1e-4
    )
    assert here.complaints == []


@pytest.mark.parametrize(
    ("label", "text", "line"),
    [
        ("Condition, 3 numbers", "1 0", "condition: expected 3 values, got 2"),
        ("Condition, 3 numbers", "1 0 cat", "conditions.0.2: Input should be a valid number"),
        ("Models", "0", "number: Input should be greater than or equal to 1"),
        ("Models", "1000000", "number: expected at most 10000 models (limits.models_per_job), got 1000000"),
        ("Seed", "18446744073709551616", "seed: Input should be less than 18446744073709551616"),
        ("Seed", "-1", "seed: Input should be greater than or equal to 0"),
    ],
)
def test_what_is_refused_is_told_in_the_services_line(
    visit: Callable[..., Visit], url: str, label: str, text: str, line: str
) -> None:
    here = visit(url, viewport=PHONE)
    here.sign_in()
    here.page.get_by_label(label).fill(text)
    here.page.get_by_role("button", name="Generate").click()
    expect(here.page.get_by_role("alert")).to_have_text(line)
    expect(here.page.get_by_role("alert")).to_be_in_viewport(ratio=0.9)
    assert here.fits()
    # The browser itself logs answers whose status is an error.
    assert all("status of 422" in complaint for complaint in here.complaints)


def test_tokens_are_asked_for_and_not_kept(visit: Callable[..., Visit], url: str) -> None:
    here = visit(url)
    page = here.page
    page.get_by_label("Token").fill("wrong")
    page.get_by_role("button", name="Use").click()
    expect(page.get_by_role("alert")).to_have_text("unknown token")
    expect(page.get_by_label("Generator")).to_be_hidden()
    here.sign_in("reader")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_have_text("this token lacks the scope 'submit'")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_a_large_job_moves_and_can_be_cancelled(visit: Callable[..., Visit], url: str) -> None:
    here = visit(url)
    here.sign_in()
    here.page.get_by_label("Models").fill("10000")
    here.page.get_by_role("button", name="Generate").click()
    expect(here.page.get_by_role("status")).to_contain_text("running:")
    expect(here.page.locator("#card")).to_contain_text("SHA-256")
    here.page.get_by_role("button", name="Cancel").click()
    expect(here.page.get_by_role("status")).to_contain_text("cancelled:")
    assert here.complaints == []


def test_a_large_file_is_not_loaded_for_its_picture(visit: Callable[..., Visit], url: str) -> None:
    here = visit(url)
    page = here.page
    script = httpx.get(f"{url}/static/card.js").text
    assert "LARGEST = 64e6" in script and "HEADER = 1e6" in script
    smaller = script.replace("LARGEST = 64e6", "LARGEST = 1e3").replace("HEADER = 1e6", "HEADER = 1e3")
    page.route("**/card.js", lambda route: route.fulfill(body=smaller, content_type="text/javascript"))
    page.reload()
    here.sign_in()
    with page.expect_response(lambda answer: answer.url.endswith("/models/0")) as answer:
        page.get_by_role("button", name="Generate").click()
    assert answer.value.status == 206
    expect(page.locator("#picture")).to_contain_text("Left out: the file is larger than 64 MB.")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download", exact=True).click()
    shown = re.search(r"[0-9a-f]{64}", page.locator("#card").inner_text())
    assert (
        shown is not None and hashlib.sha256(Path(download.value.path()).read_bytes()).hexdigest() == shown[0]
    )
    assert here.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_works_on_a_phone_without_tokens_or_conditions(
    visit: Callable[..., Visit], open_url: str, scheme: str
) -> None:
    here = visit(open_url, viewport=PHONE, color_scheme=scheme, has_touch=True)
    page = here.page
    expect(page.get_by_label("Generator")).to_be_visible()
    expect(page.get_by_label("Token")).to_be_hidden()
    expect(page.get_by_label("Condition")).to_be_hidden()
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("img")).to_have_count(8)
    expect(page.locator("#card")).to_contain_text("none")
    assert here.fits()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 25, 29)"
    assert dark == (scheme == "dark")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename.endswith(".safetensors")
    assert here.complaints == []


def test_nothing_from_elsewhere_is_loaded_or_allowed(url: str) -> None:
    answer = httpx.get(url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    loaded = re.findall(r'(?:src|<link[^>]*href)="([^"]+)"', answer.text)
    assert loaded == ["data:,", "static/page.css", "static/page.js"]
