"""The page in a real browser, where this machine has one: keyboard, streams, themes, and text that wants to be HTML."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import uvicorn

from tests.serving.browser import Browser, find_browser
from tests.serving.conftest import TOKEN, Server
from tests.serving.fakes import NASTY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="there is no Chromium on this machine"),
]


class Site:
    """The service on a port of its own."""

    def __init__(self, service: Server) -> None:
        self.service = service
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            self.port = chosen.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}/"
        self.start()

    def start(self) -> None:
        self._server = uvicorn.Server(
            uvicorn.Config(
                self.service.app, host="127.0.0.1", port=self.port, log_level="error", timeout_graceful_shutdown=1
            )
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert time.monotonic() < deadline, "uvicorn did not start"
            time.sleep(0.05)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=30)


@pytest.fixture
def site(make_server: Callable[..., Server]) -> Iterator[Site]:
    found = Site(make_server(show_harmful=True))
    yield found
    found.stop()


@pytest.fixture(scope="module")
def shared_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = find_browser()
    assert binary is not None
    found = Browser(binary, tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


@pytest.fixture
def browser(shared_browser: Browser) -> Iterator[Browser]:
    shared_browser.violations.clear()
    yield shared_browser
    assert shared_browser.violations == []
    shared_browser.open("about:blank")


def log_in(browser: Browser, site: Site) -> None:
    browser.open(site.address)
    browser.wait("!document.getElementById('login').hidden && document.activeElement.id === 'token'")
    browser.type(TOKEN)
    browser.press("Enter")
    browser.wait("!document.getElementById('content').hidden")


def tab_to(browser: Browser, selector: str) -> None:
    """Walks there with the Tab key alone."""
    for _ in range(80):
        browser.press("Tab")
        if browser.run(f"document.activeElement.matches({selector!r})"):
            return
    raise AssertionError(f"{selector} cannot be reached by keyboard")


def test_an_evaluation_from_start_to_samples_by_keyboard_alone(browser: Browser, site: Site) -> None:
    browser.prefer("light")
    log_in(browser, site)
    assert browser.run("sessionStorage.getItem('raycomplete.token')") == TOKEN
    assert browser.run("localStorage.length") == 0
    tab_to(browser, "#open-form")
    browser.press("Enter")
    browser.type(NASTY)
    tab_to(browser, "#new-save")
    browser.press(" ")
    browser.press("Tab")
    browser.press("Enter")
    browser.wait("document.getElementById('detail-state').textContent === 'queued'")
    site.service.work_meanwhile()
    browser.wait("document.getElementById('detail-state').textContent === 'succeeded'")
    browser.wait("document.querySelectorAll('#results svg .line').length === 3")
    assert browser.run("document.querySelectorAll('#results tr[data-attack]').length") == 3
    assert browser.run("document.querySelector('#results .price').textContent").startswith("student refuses 90.0 %")
    tab_to(browser, "#sample-load")
    browser.press("Enter")
    browser.wait("document.querySelectorAll('#sample-list li').length === 18")
    assert not browser.run("document.body.innerText.includes('SECRET')"), "harmful text stays hidden until asked for"
    tab_to(browser, "#sample-harmful")
    browser.press(" ")
    browser.wait("document.body.innerText.includes('SECRET')")
    # Labels and completions that are markup stay text.
    assert browser.run("document.getElementById('detail-title').textContent") == NASTY
    assert NASTY in browser.run("document.querySelector('#sample-list pre').textContent")
    assert browser.run("document.querySelectorAll('main img, main script').length") == 0
    assert browser.run("document.body.dataset.hacked === undefined")


def test_progress_is_live_and_survives_a_lost_connection(browser: Browser, site: Site) -> None:
    site.service.runner._backend.unit_s = 0.4  # type: ignore[attr-defined]
    browser.prefer("dark")
    identity = site.service.submit(label="slow", roles=["base", "student"])
    log_in(browser, site)
    browser.run(f"open({identity!r}, true)")
    site.service.work_meanwhile()
    browser.wait("document.querySelector('#progress progress')?.value >= 1")
    site.stop()
    browser.wait("document.getElementById('status').textContent.includes('trying again')")
    site.start()
    browser.wait("document.getElementById('detail-state').textContent === 'succeeded'")


def test_both_themes_follow_the_system_and_the_button(browser: Browser, site: Site) -> None:
    identity = site.service.submit(label="nightly")
    site.service.submit(label="refuse")
    site.service.work()
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        if scheme == "light":
            log_in(browser, site)
            browser.run(f"open({identity!r})")
            browser.wait("document.querySelectorAll('#results svg .line').length === 3")
        browser.wait(f"document.documentElement.dataset.theme === {scheme!r}")
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.run("document.getElementById('theme').click()")
    assert browser.run("document.documentElement.dataset.theme") == "light"
    assert browser.run("getComputedStyle(document.body).backgroundColor") != ground
    browser.prefer("dark", width=390, height=2400)
    page = "document.documentElement"
    assert browser.run(f"{page}.scrollWidth <= {page}.clientWidth"), "a phone needs no sideways scrolling"
    browser.wait("document.querySelector('#results .chart svg').viewBox.baseVal.width < 400")  # drawn anew
    inside = "[...document.querySelectorAll('#content .scroll, #results .chart')]"
    assert browser.run(f"{inside}.every((part) => part.scrollWidth <= part.clientWidth + 1)"), "nor do its tables"


def test_a_wrong_token_asks_again(browser: Browser, site: Site) -> None:
    browser.open(site.address)
    browser.wait("!document.getElementById('login').hidden")
    browser.type("not the token at all")
    browser.press("Enter")
    browser.wait("document.getElementById('login-problem').textContent !== ''")
    assert browser.run("document.getElementById('content').hidden")
