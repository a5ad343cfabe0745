"""The page in a real browser: nothing in it runs or loads, and it can be used."""

import http.server
import os
import re
import shutil
import threading
from pathlib import Path

import msgspec
import pytest

from grpo_harness.report.page import page
from grpo_harness.report.report import Report
from tests.test_page import completion, problem, report
from tests.test_report import RUN, rows

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here: make browser"
    ),
    # Selenium's own: it finds the driver's port by a socket that it leaves to the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

PAYLOADS = [
    "<script>pwned()</script>",
    "</script><script>pwned()</script>",
    "</style><script>pwned()</script>",
    "</pre><script>pwned()</script>",
    "</title><script>pwned()</script>",
    "<img src=x onerror=pwned()>",
    "<img src=URL>",
    "<svg onload=pwned()>",
    "<svg><script>pwned()</script></svg>",
    "<svg><use href=URL#a></use></svg>",
    "<math><a xlink:href=javascript:pwned()>x</a></math>",
    "<body onload=pwned()>",
    "<iframe src=URL></iframe>",
    "<iframe srcdoc='<script>parent.pwned()</script>'></iframe>",
    "<object data=URL></object>",
    "<embed src=URL>",
    "<link rel=stylesheet href=URL>",
    "<link rel=prefetch href=URL>",
    "<style>@import 'URL';</style>",
    "<style>body{background:url(URL)}</style>",
    "<meta http-equiv=refresh content='0;url=URL'>",
    "<base href=URL>",
    "<form action=URL><button autofocus onfocus=pwned()>",
    "<input autofocus onfocus=pwned()>",
    "<details open ontoggle=pwned()>",
    "<video src=URL autoplay onerror=pwned()></video>",
    "<audio src=URL></audio>",
    "<a href=javascript:pwned() id=e0>x</a>",
    "<a href=URL ping=URL>x</a>",
    '" onmouseover=pwned() x="',
    "' onmouseover=pwned() x='",
    '"><img src=x onerror=pwned()>',
    "'><img src=x onerror=pwned()>",
    "<!--><script>pwned()</script>",
    "<![CDATA[<script>pwned()</script>]]>",
    "<template><script>pwned()</script></template>",
    "<noscript><img src=x onerror=pwned()></noscript>",
    "&lt;script&gt;pwned()&lt;/script&gt;",
    "{{ ''.__class__ }}{% raw %}${pwned()}",
    "\ud800<script>pwned()</script>\u202e\x00\x1b[2J",
    "<x onclick=pwned() style=position:fixed;inset:0>",
    "javascript:pwned()",
]


@pytest.fixture(scope="module")
def hits():
    """A server on loopback, and the paths that were asked of it."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<p>hit</p>")

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/hit", asked
        server.shutdown()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A function that starts a browser; all are closed at the end."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    started = []

    def start(*, script=True, size="1280,900"):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in (
            "--headless=new",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--window-size={size}",
            f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        if not script:
            prefs = {"profile.managed_default_content_settings.javascript": 2}
            options.add_experimental_option("prefs", prefs)
        started.append(webdriver.Chrome(options=options, service=Service(DRIVER)))
        return started[-1]

    yield start
    for browser in started:
        browser.quit()


@pytest.fixture(scope="module")
def browser(chromium):
    return chromium()


def shown(browser, text: str, folder: Path):
    """Open a page."""
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    browser.get(path.as_uri())
    return browser


def hostile(text):
    own = problem(text, right=1, texts=(text, text + "x"), prompt=text)
    own.completions[0].rewards[text] = None
    changes = {"base": text, "trained": [text], "baselines": text}
    found = report([own, problem(right=0)], text, text, "FAIL", **changes)
    found.failed[text], found.notices[:] = text, [text]
    found.settings, found.environment = {text: {text: text}}, {"python": text}
    for key in found.checks:
        found.checks[key] = {**found.checks[key], "title": text, "reason": text}
    return found


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_runs_or_asks_for_anything(payload, browser, hits, tmp_path):
    url, asked = hits
    text = payload.replace("URL", url)
    browser.get("about:blank")
    browser.get_log("browser")
    shown(browser, page(hostile(text)), tmp_path)
    browser.execute_script(
        "window.ran = 0; window.pwned = () => { window.ran += 1; };"
        "for (const d of document.querySelectorAll('details')) d.open = true;"
        "for (const e of document.querySelectorAll('main *')) {"
        "  for (const name of ['mouseover', 'click', 'focus'])"
        "    if (e.tagName !== 'A' && e.tagName !== 'SUMMARY') e.dispatchEvent(new Event(name)); }"
        "const f = document.getElementById('f-text'); f.value = arguments[0];"
        "f.dispatchEvent(new Event('input', {bubbles: true}));",
        "gcd",
    )
    browser.execute_async_script("setTimeout(arguments[0], 250)")
    assert browser.execute_script("return window.ran") == 0
    assert asked == []
    # Not even a try that the page's policy blocked.
    assert browser.get_log("browser") == []
    assert browser.current_url.endswith("report.html") or "#" in browser.current_url
    kept = "".join(c if c.isprintable() else "" for c in text if not 0xD800 <= ord(c) < 0xE000)
    said = browser.execute_script("return document.getElementById('completions').textContent")
    assert re.sub(r"\\[ux]\w+", "", said).count(kept.replace("\u202e", "")) >= 3


def many():
    """A run with problems that lost, gained and stayed."""
    found = report([problem(f"gcd-{i}", right=(0, 4, 4)[i % 3]) for i in range(30)], verdict="FAIL")
    for row in rows("p", "sort", "PASS"):
        found.add(row)
    found.problems["p", "sort"] = [
        msgspec.structs.replace(
            problem(f"sort-{i}"), completions=[completion("needle" if i == 7 else "1 2")] * 4
        )
        for i in range(10)
    ]
    return found


def visible(browser):
    """Return the ids of the problems that are shown."""
    return browser.execute_script(
        "return [...document.querySelectorAll('details.p')]"
        ".filter((p) => !p.hidden && !p.parentElement.hidden)"
        ".map((p) => p.firstElementChild.firstChild.textContent.trim())"
    )


def choose(browser, name, value):
    browser.execute_script(
        "const f = document.getElementById(arguments[0]); f.value = arguments[1];"
        "f.dispatchEvent(new Event('input', {bubbles: true}));",
        name,
        value,
    )
    browser.execute_async_script("setTimeout(arguments[0], 300)")


def test_completions_are_filtered_and_sorted(browser, tmp_path):
    shown(browser, page(many()), tmp_path)
    lost = [f"gcd-{i}" for i in range(0, 30, 3)]
    assert len(visible(browser)) == 40
    choose(browser, "f-outcome", "wrong")
    assert visible(browser) == lost
    choose(browser, "f-outcome", "")
    choose(browser, "f-text", "NEEDLE")
    assert visible(browser) == ["sort-7"]
    choose(browser, "f-text", "")
    choose(browser, "f-task", "gcd")
    assert len(visible(browser)) == 30
    choose(browser, "f-order", "drop")
    assert visible(browser)[:10] == lost
    choose(browser, "f-order", "0")
    assert visible(browser)[:3] == ["gcd-0", "gcd-1", "gcd-2"]
    choose(browser, "f-task", "")
    choose(browser, "f-flip", "lost")
    assert visible(browser) == lost


def test_without_script_all_is_there_to_be_opened(chromium, tmp_path):
    from selenium.webdriver.common.by import By

    browser = shown(chromium(script=False), page(many()), tmp_path)
    assert not browser.find_element(By.ID, "filter").is_displayed()
    part = browser.find_element(By.CSS_SELECTOR, "details.e > summary")
    part.click()
    browser.find_element(By.CSS_SELECTOR, "details.p > summary").click()
    assert "wrong × 4" in browser.find_element(By.CSS_SELECTOR, "details.p li").text


def test_the_keyboard_reaches_and_opens_everything(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    shown(browser, page(many()), tmp_path)
    body, reached = browser.find_element(By.TAG_NAME, "body"), []
    for _ in range(60):
        (body if not reached else browser.switch_to.active_element).send_keys(Keys.TAB)
        at = browser.switch_to.active_element
        reached.append(at.tag_name)
        if at.tag_name == "summary" and "problems" in at.text:
            break
    assert reached[0] == "a", "the skip link comes first"
    assert {"summary", "select", "input"} <= set(reached)
    at.send_keys(Keys.ENTER)
    part = browser.find_element(By.CSS_SELECTOR, "details.e")
    assert part.get_attribute("open") is not None


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_no_wider_than_the_screen(width, chromium, tmp_path):
    browser = chromium(size=f"{width},844")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    found = hostile("a" * 300)
    shown(browser, page(found), tmp_path)
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true;")
    widest = browser.execute_script("return document.documentElement.scrollWidth")
    assert widest <= width


def test_a_link_opens_what_it_leads_to(browser, tmp_path):
    from selenium.webdriver.common.by import By

    shown(browser, page(many()), tmp_path)
    link = browser.find_element(By.LINK_TEXT, "All completions of gcd")
    browser.execute_script("arguments[0].click()", link)
    browser.execute_async_script("setTimeout(arguments[0], 200)")
    assert browser.find_element(By.ID, "e0-c").get_attribute("open") is not None


def test_an_empty_report_is_a_page(browser, tmp_path):
    shown(browser, page(Report(RUN)), tmp_path)
    assert browser.title == "UNPROVEN: p - grpo-harness"
