"""The page in headless Chromium, served with a hub that hears a publisher."""

from __future__ import annotations

import threading
import time

import msgspec
import pytest
import uvicorn
from fastapi import FastAPI
from sglang.srt.utils.auth import add_api_key_middleware
from sglang_shift.cost.model import CostModel, Measurement, fit
from sglang_shift.modes import Mode
from sglang_shift.observe import events, routes
from sglang_shift.observe.events import Finished, Publisher, StateEvent, StepEvent
from sglang_shift.observe.hub import Hub
from sglang_shift.tools.servers import free_port
from starlette.middleware.base import BaseHTTPMiddleware

EVIL = "<img src=x onerror='document.title=\"run\"'><script>document.title='run'</script>&amp;"
LONG = "a_very_long_name_without_any_place_to_break_it_" * 8


def calibration() -> dict:
    """TP is faster up to 255 tokens (prefill), and at every size (decode)."""
    measurements = [
        Measurement(phase, mode, tokens, tokens, seconds)
        for phase, sp in (("prefill", 0.002), ("decode", 0.9))
        for mode, at_1, at_511 in ((Mode.TP, 0.001, 0.003), (Mode.SP, sp, sp))
        for tokens, seconds in ((1, at_1), (511, at_511))
    ]
    return {
        "format": 2,
        "measurements": msgspec.to_builtins(measurements),
        "costs": msgspec.to_builtins(fit(measurements)),
    }


class Served:
    """The page at a free port, and a publisher that its hub hears."""

    def __init__(self, api_key: str | None = None) -> None:
        self.publisher = Publisher(0)
        self.hub = Hub()
        self.hub.start()
        self.number = 0
        app = FastAPI()
        routes.install(self.hub, app)
        self.asked: list[tuple[str, str | None]] = []  # addresses and keys
        if api_key:
            add_api_key_middleware(app, api_key=api_key, admin_api_key=None)
        app.add_middleware(BaseHTTPMiddleware, dispatch=self.note)
        self.port = free_port()
        self.server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)

    async def note(self, request, call_next):
        self.asked.append((str(request.url), request.headers.get("Authorization")))
        return await call_next(request)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/shift"

    def state(self, **changes) -> None:
        values = {
            "world_size": 4, "sp_size": 2, "model": "demo", "policy": "calibrated", "policy_text": "the faster mode",
            "calibration": calibration(), "calibration_text": "measured here", "drift": {"tp": 1.04, "sp": 0.5},
            "weight_bytes": 7_000_000, "weight_bytes_beyond_base": 0, "steps": {"tp": 70, "sp": 30},
            "tokens": {"tp": 70, "sp": 9000}, "switches": 12,
        }  # fmt: skip
        self.publisher.send(StateEvent(time=time.time(), **{**values, **changes}))

    def step(self, mode: str, tokens: int, **changes) -> None:
        self.number += 1
        self.publisher.send(StepEvent(
            time.time(), self.number, mode, "prefill" if tokens > 1 else "decode", tokens, tokens - 1, 5, 3, 77,
            **{"seconds": 0.004 * tokens**0.5, "predicted": dict.fromkeys(Mode, 0.004), **changes},
        ))  # fmt: skip

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.hub.stop()
        self.publisher._socket.close()


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setenv(events.ENDPOINT_VARIABLE, f"ipc://{tmp_path}/events")
    served = Served()
    deadline = time.monotonic() + 10
    while not served.hub.ready and time.monotonic() < deadline:
        served.state()
        time.sleep(0.02)
    yield served
    served.stop()


@pytest.fixture
def opened(browser, served):
    def open_page(**options):
        browser.open(served.url, **options)
        browser.wait("document.querySelector('#connection')?.textContent === 'live'")
        return browser

    return open_page


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """Served with an API key."""
    monkeypatch.setenv(events.ENDPOINT_VARIABLE, f"ipc://{tmp_path}/events")
    served = Served(api_key="a secret")
    deadline = time.monotonic() + 10
    while not served.hub.ready and time.monotonic() < deadline:
        served.state()
        time.sleep(0.02)
    yield served
    served.stop()


def words(browser, selector: str) -> str:
    return browser.evaluate(f"document.querySelector({selector!r}).textContent")


def fits(browser) -> bool:
    return browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_live_data_arrives(served, opened):
    served.step("tp", 1)
    served.step("sp", 900, switched=True, reason="a prefill of 900 tokens",
                finished=[Finished(900, 5, 0.125, 0.01, 0.5, {Mode.TP: 4, Mode.SP: 1})])  # fmt: skip
    page = opened()
    page.wait("document.querySelector('#b-switches').textContent.includes('a prefill of 900 tokens')")
    assert "demo" in words(page, "#model") and "4 ranks: TP 4 or SP 2 \u00d7 TP 2" in words(page, "#model")
    assert words(page, "#policy") == "calibrated: the faster mode"
    assert words(page, "#t-queue") == "5running" and "3 waiting, 77 prompt tokens" in words(page, "#n-queue")
    assert words(page, "#t-ttft") == "125 ms" and "125 ms" in words(page, "#b-requests")
    assert words(page, "#t-drift") == "0.50\u00d7" and words(page, "#t-switches") == "12"
    assert "SP prefill" in words(page, "#b-steps") and "120 ms" in words(page, "#b-steps")
    assert page.evaluate("document.querySelectorAll('#c-steps path.tp-dot, #c-steps path.sp-dot').length") == 2
    served.state(policy="tokens", policy_text="SP above 64")
    page.wait("document.querySelector('#policy').textContent === 'tokens: SP above 64'", 5)
    page.wait("document.querySelector('#c-modes path.sp-area') !== null", 5)
    assert page.problems == []


def test_the_bound_on_the_gap_between_tokens(served, opened):
    served.state(tbt_target=0.1, tbt_margin=0.8)
    for tokens, seconds in ((600, 0.05), (700, 0.3)):
        served.step("sp", tokens, chunk_room=1024, chunk_budget=0.08, seconds=seconds)
    page = opened()
    page.wait("document.querySelector('#policy').textContent.includes('could fit')")
    words_of_bound = words(page, "#policy").partition("gap between tokens")[2]
    assert words_of_bound == (
        ", at most 100 ms; predicted times may use 80 % of it; the last 2 steps with prompts beside decodes took 649 "
        "prompt tokens (median; 1,024 could fit 80.0 ms), and 50 % of them took longer."
    )
    served.state()
    page.wait("!document.querySelector('#policy').textContent.includes('gap between')", 5)
    assert page.problems == []


def test_gaps_between_tokens(served, opened):
    page = opened()
    assert words(page, "#c-gaps") == "No request got a second token in this time."
    assert page.evaluate("document.querySelector('#l-gaps').hidden")
    served.state(tbt_target=0.1)
    for _ in range(20):
        served.step("tp", 1, gaps=[(0.02, 40)])
    served.step("sp", 600, gaps=[(0.05, 7), (0.25, 1)])
    page.wait("document.querySelector('#c-gaps path.late-bar') !== null", 5)
    assert "p50 21.5 ms, p99 21.5 ms, longest 250 ms of 808 gaps; 0.1\u00a0% were longer" in words(page, "#a-gaps")
    assert "the last 5 minutes" in words(page, "#a-gaps")
    assert "target 100 ms" in words(page, "#c-gaps") and not page.evaluate("document.querySelector('#l-gaps').hidden")
    left, right = (
        page.evaluate(
            f"(b => [b.left, b.right])(document.querySelector('#c-gaps path.{kind}').getBoundingClientRect())"
        )
        for kind in ("gap-bar", "late-bar")
    )
    at = page.evaluate("document.querySelector('#c-gaps path.cross').getBoundingClientRect().x")
    assert left[1] < at < right[0], "the bars of longer gaps are beyond the target"
    page.evaluate("document.querySelector('#c-gaps').scrollIntoView()")
    x, y = page.evaluate(
        "(b => [b.left + 2, b.bottom - 2])(document.querySelector('#c-gaps path.late-bar').getBoundingClientRect())"
    )
    page.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    page.wait("document.querySelector('#c-gaps .tip') !== null", 3)
    assert words(page, "#c-gaps .tip").endswith("1 gaps")
    assert page.problems == []


def test_the_crossovers_are_those_of_the_cost_model(served, opened):
    page = opened()
    assert words(page, "#a-prefill") == "TP up to 256 tokens, SP from 257 tokens on."
    assert words(page, "#a-decode") == "TP is faster at every size."
    assert "SP from 257" in words(page, "#c-prefill")
    for phase in ("prefill", "decode"):
        model = msgspec.convert(calibration()["costs"], CostModel)
        from_python = [[t, m.value] for t, m in model.crossovers(phase)]
        assert page.evaluate(f"crossovers(data.calibration.costs.curves.{phase})") == from_python


def test_empty_states(served, opened):
    served.state(calibration=None, calibration_text="", drift={}, switches=0)
    page = opened()
    page.wait("document.querySelector('#a-calibration').textContent === 'Nothing has been calibrated.'", 5)
    for selector, expected in (
        ("#b-requests", "No request has finished yet."), ("#b-switches", "The mode has not changed yet."),
        ("#b-steps", "No step has been timed yet."), ("#c-modes", "No step ran in this time."),
        ("#c-steps", "No step has been timed yet."), ("#t-share", "\u2013"),
    ):  # fmt: skip
        assert expected in words(page, selector)
    assert page.problems == []


def test_html_in_data_is_text(served, opened):
    for _ in range(3):
        served.state(policy=EVIL, policy_text=EVIL, model=EVIL, calibration_text=EVIL)
        served.step("sp", 5, switched=True, reason=EVIL)
    page = opened()
    page.wait("document.querySelector('#b-switches td.reason') !== null")
    for selector in ("#policy", "#model", "#b-switches td.reason", "#a-calibration"):
        assert EVIL in words(page, selector)
    assert page.evaluate("document.querySelectorAll('img, script').length") == 1
    assert page.evaluate("document.title") == f"{EVIL} \u2013 Shift Parallelism" and page.problems == []


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_overflows(served, opened, width):
    served.state(policy=LONG, policy_text=LONG, model=LONG, calibration_text=LONG)
    for tokens in (1, 7, 500, 8000):
        served.step("sp" if tokens > 9 else "tp", tokens, switched=True, reason=LONG, seconds=12345.6 / tokens,
                    finished=[Finished(100_000, 100_000, 1234.5, 123.4, 12345.6, {Mode.TP: 4})])  # fmt: skip
    page = opened(width=width, height=740)
    page.wait("document.querySelectorAll('#b-switches td.reason').length === 4")
    assert fits(page)
    outside = (
        "[...document.querySelectorAll('.card')].filter(c => c.scrollWidth > c.clientWidth).map(c => c.textContent)"
    )
    assert page.evaluate(outside) == []
    assert page.problems == []


def test_dark_and_light(opened):
    def brightness(dark: bool) -> tuple[int, int]:
        page = opened(dark=dark)
        colours = page.evaluate(
            "[['body', 'backgroundColor'], ['h1', 'color']]"
            ".map(([q, p]) => +getComputedStyle(document.querySelector(q))[p].match(/\\d+/)[0])"
        )
        return tuple(colours)

    (dark_page, dark_ink), (light_page, light_ink) = brightness(True), brightness(False)
    assert max(dark_page, light_ink) < 50 and min(light_page, dark_ink) > 200


def test_range_and_hover(served, opened):
    served.step("tp", 1)
    page = opened()
    page.evaluate("[...document.querySelectorAll('#range button')].find(b => b.textContent === '1 min').click()")
    assert page.evaluate("document.querySelector('#range [aria-pressed=true]').textContent") == "1 min"
    assert "\u221260 s" in words(page, "#c-queue")
    x, y = page.evaluate("(b => [b.right - 20, b.y + 30])(document.querySelector('#c-queue').getBoundingClientRect())")
    page.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    page.wait("document.querySelector('#c-queue .tip') !== null", 3)
    assert "waiting" in words(page, "#c-queue .tip")


def test_it_says_when_the_server_goes_away(served, opened):
    page = opened()
    served.server.should_exit = True
    page.wait("!document.querySelector('#problem').hidden")
    assert "cannot be reached" in words(page, "#problem") and "is old" in words(page, "#problem")
    page.wait("document.querySelector('#problem').textContent.includes('Next try in 2 s')", 5)
    assert words(page, "#connection") == "not connected"


def test_it_waits_for_the_first_state(tmp_path, monkeypatch, browser):
    monkeypatch.setenv(events.ENDPOINT_VARIABLE, f"ipc://{tmp_path}/events")
    served = Served()
    try:
        browser.open(served.url)
        browser.wait("document.querySelector('#problem')?.hidden === false")
        assert routes.NOT_READY in words(browser, "#problem")
        browser.wait("document.querySelector('#problem').textContent.includes('Next try')")
        while not served.hub.ready:
            served.state()
            time.sleep(0.02)
        browser.wait("document.querySelector('#connection').textContent === 'live'", 5)
    finally:
        browser.command("Page.navigate", url="about:blank")
        served.stop()


def enter(page, key: str) -> None:
    """As a person does: type, and press Enter."""
    page.evaluate("document.querySelector('#key-input').focus()")
    page.command("Input.insertText", text=key)
    for kind in ("keyDown", "keyUp"):
        page.command("Input.dispatchKeyEvent", type=kind, key="Enter", windowsVirtualKeyCode=13, text="\r")


@pytest.mark.parametrize(("width", "dark"), [(360, False), (1280, True)])
def test_it_asks_for_the_key(locked, browser, width, dark):
    browser.open(locked.url, width=width, dark=dark)
    browser.wait("document.querySelector('#key')?.hidden === false")
    assert words(browser, "#problem") == "The server wants an API key." and words(browser, "#connection") == "no access"
    assert browser.evaluate("document.activeElement.id") == "key-input" and fits(browser)
    assert browser.evaluate("document.querySelector('#main').hidden"), "there is nothing to show"
    polls = len(locked.asked)
    for wrong, answer in (("wrong", "does not take this API key"), ("schl\u00fcssel", "is plain ASCII")):
        enter(browser, wrong)
        browser.wait(f"document.querySelector('#problem').textContent.includes('{answer}')")
        assert not browser.evaluate("document.querySelector('#key').hidden")
        browser.evaluate("document.querySelector('#key-input').value = ''")
    assert len(locked.asked) == polls + 1, "it must not go on asking with a key that is wrong"
    enter(browser, "a secret")
    browser.wait("document.querySelector('#connection').textContent === 'live'")
    assert browser.evaluate("document.querySelector('#key').hidden") and "demo" in words(browser, "#model")
    assert not browser.evaluate("document.querySelector('#main').hidden") and fits(browser)
    browser.wait("document.querySelector('#problem').hidden")

    assert browser.evaluate("location.href") == locked.url and not any("secret" in url for url, _ in locked.asked)
    assert {key for _, key in locked.asked} == {"Bearer wrong", "Bearer a secret", None}
    kept = browser.evaluate("[localStorage.length, sessionStorage.length, document.cookie, history.state]")
    assert kept == [0, 0, "", None]
    assert "secret" not in browser.evaluate("document.documentElement.outerHTML")
    assert browser.evaluate("document.querySelector('#key-input').value") == ""
    browser.command("Page.reload")
    browser.wait("document.querySelector('#key')?.hidden === false")


def test_no_key_is_asked_for_where_there_is_none(opened):
    assert opened().evaluate("document.querySelector('#key').hidden")
