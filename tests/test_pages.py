"""The built book as a reader meets it: nothing from outside, nothing broken; in the dark, on a phone and by keyboard too.

The pages are served from this machine under a path prefix, as a project site is, to a browser that can reach nothing else.
"""

import io
import json
import re
import shutil
import threading
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import yaml
from assets import AXE, ROOT, WIDGETS

HTML = ROOT / "_build" / "html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
HEAVIEST = 1_500_000  # bytes of a page with its own pictures
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
OUTSIDE = "pages work without a network: let tools/assets.py fetch the file at build time and serve it from book/_assets"

toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
PAGES = [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"]), "genindex", "search"]

pytestmark = pytest.mark.skipif(not (HTML / "index.html").exists(), reason="the book is not built: run make book")
in_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not both installed")


# Without a browser: what the files themselves say.


class Parsed(HTMLParser):
    """The ids of a page, the addresses it links to, and those it loads."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.pictures: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found["id"]} if found.get("id") else set()
        if tag == "a":
            self.ids |= {found["name"]} if found.get("name") else set()
            self.links += [found["href"]] if found.get("href") else []
        elif tag == "link":
            self.loads += [found["href"]] if found.get("rel") in {"stylesheet", "icon", "preload", "modulepreload"} else []
        elif found.get("src"):
            self.loads.append(found["src"])
            self.pictures += [found["src"]] if tag == "img" else []


@cache
def parsed(path: Path) -> Parsed:
    return Parsed(path.read_text(encoding="utf-8"))


def target(page: Path, address: str) -> Path:
    """The file that a relative address on a page means."""
    path = unquote(urlsplit(urljoin(page.relative_to(HTML).as_posix(), address)).path)
    return HTML / path / "index.html" if (HTML / path).is_dir() else HTML / path


def broken(page: Path) -> list[str]:
    """Links and loads of a page that lead nowhere, out of the site (loads), or to the top of the server."""
    here, faults = parsed(page), []
    for address in here.loads:
        if urlsplit(address).netloc:
            faults.append(f"loads {address}: {OUTSIDE}")
    for address in [*here.links, *here.loads]:
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            continue
        if address.startswith("/"):
            faults.append(f"{address} starts at the top of the server: write it relative to the page")
            continue
        file = page if not parts.path else target(page, address)
        if not file.exists():
            faults.append(f"{address} leads to no file")
        elif parts.fragment and file.suffix == ".html" and unquote(parts.fragment) not in parsed(file).ids:
            faults.append(f"{address}: no such place on {file.relative_to(HTML)}")
    return faults


def test_links_lead_somewhere():
    faults = {
        page.relative_to(HTML).as_posix(): broken(page)
        for page in sorted(HTML.rglob("*.html"))
        if "_static" not in page.parts
    }
    assert len(faults) > len(PAGES)
    assert not any(faults.values()), "\n".join(f"{page}: {fault}" for page, found in faults.items() for fault in found)


@pytest.mark.parametrize("name", PAGES)
def test_weight(name):
    """HTML and its own pictures stay light; scripts and styles are shared by all pages and kept by the browser."""
    page = HTML / f"{name}.html"
    own = {target(page, address) for address in parsed(page).pictures if not urlsplit(address).scheme}
    size = page.stat().st_size + sum(path.stat().st_size for path in own)
    assert size < HEAVIEST, f"{name} weighs {size / 1e6:.2f} MB: fewer or smaller pictures, at most {HEAVIEST / 1e6} MB"


@pytest.mark.parametrize("name", PAGES)
def test_tables_that_cells_display_are_tables(name):
    """Not paragraphs of bars and dashes, which is what plain Markdown makes of them."""
    prose = re.sub(r"<(script|pre)\b.*?</\1>", "", (HTML / f"{name}.html").read_text(encoding="utf-8"), flags=re.S)
    assert not re.search(r"\|\s*[-—]+\s*\|", prose), f"{name}: a table of a cell is not rendered"


def test_widget_scripts_are_in_the_site():
    for path in WIDGETS.rglob("*.*"):
        assert (HTML / "_static" / "widgets" / path.relative_to(WIDGETS)).exists(), f"{path.name} is missing: run make book"
    assert len(list(WIDGETS.rglob("*.woff2"))) == 6


# In the browser.


class Quiet(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder that is served, and the address of the book in it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "prefix").mkdir()
    for entry in HTML.iterdir():
        (folder / "prefix" / entry.name).symlink_to(entry)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder / "prefix", f"http://127.0.0.1:{server.server_port}/prefix/"
    server.shutdown()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "force-device-scale-factor=1",
        "window-size=1280,900",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


def ask(browser, check: str, *arguments) -> list:
    """The answer of one of the checks in pages.js about the open page."""
    script = (
        (Path(__file__).parent / "pages.js").read_text(encoding="utf-8")
        + """
        const done = arguments[arguments.length - 1], [name, ...given] = [...arguments].slice(0, -1);
        Promise.resolve(checks[name](...given)).then(done, (error) => done([`${name} failed: ${error}`]));"""
    )
    return browser.execute_async_script(script, check, *arguments)


def visit(browser, base: str, page: str) -> list[str]:
    """Open a page and wait until it is drawn; what the browser says against it."""
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(base + page)
    faults = ask(browser, "ready", WIDGET_VIEW)
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            address = message["params"]["request"]["url"]
            if not address.startswith((base, "data:", "blob:", "chrome:")):
                faults.append(f"asks for {address}: {OUTSIDE}")
        elif message["method"] == "Network.responseReceived" and message["params"]["response"]["status"] >= 400:
            faults.append(f"status {message['params']['response']['status']} for {message['params']['response']['url']}")
    faults += [f"console: {e['message']}" for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    return faults


def scan(browser, theme: str, *rules: str) -> list[str]:
    """Serious and critical faults that the accessibility checker finds."""
    only = {"runOnly": list(rules)} if rules else {}
    return [f"{theme}, {fault}" for fault in ask(browser, "scan", only)]


def phone(browser, width: int = 390, height: int = 844) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def set_theme(browser, theme: str) -> None:
    browser.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)


@in_browser
@pytest.mark.parametrize("name", PAGES)
def test_page(browser, site, name):
    faults = visit(browser, site[1], f"{name}.html") + ask(browser, "maths")
    set_theme(browser, "dark")
    faults += ask(browser, "dimmed")
    try:
        phone(browser)
        faults += ask(browser, "wide")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_script(AXE.read_text(encoding="utf-8"))
    faults += scan(browser, "dark", "color-contrast")
    set_theme(browser, "light")
    faults += scan(browser, "light")
    assert not faults, f"{name}:\n" + "\n".join(faults)


@in_browser
def test_first_address_is_the_landing_page(browser, site):
    assert '<link rel="icon" href="_static/' in (HTML / "index.html").read_text(encoding="utf-8"), "see tools/odlbook.py"
    assert visit(browser, site[1], "") == []
    assert browser.current_url == f"{site[1]}{toc['root']}.html"


@in_browser
def test_outside_script_is_seen(browser, site):
    """One line that loads a script from elsewhere, and both the file check and the browser say so, and what to do."""
    line = '<script src="https://scripts.example.org/plot.js"></script>'
    text = (HTML / f"{toc['root']}.html").read_text(encoding="utf-8").replace("</head>", f"{line}</head>")
    tampered = site[0] / "tampered" / "page.html"
    tampered.parent.mkdir(exist_ok=True)
    tampered.write_text(text, encoding="utf-8")
    faults = visit(browser, site[1], "tampered/page.html")
    assert f"asks for https://scripts.example.org/plot.js: {OUTSIDE}" in faults
    assert [a for a in Parsed(text).loads if urlsplit(a).netloc] == ["https://scripts.example.org/plot.js"]


@in_browser
def test_search_finds(browser, site):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def results(word: str) -> list[str]:
        assert visit(browser, site[1], f"search.html?q={word}") == []
        WebDriverWait(browser, 60).until(
            lambda b: re.search("Search finished|did not match", b.find_element(By.ID, "search-results").text)
        )
        return [link.get_attribute("href") for link in browser.find_elements(By.CSS_SELECTOR, "#search-results li a")]

    found = results("deconvolution")
    assert any("padnet/deconvolution.html" in address for address in found), f"search for deconvolution finds {found}"
    assert results("qxzvbn") == []


@in_browser
def test_dark_mode_keeps_grey_values(browser, site):
    """The switch in the header turns the page dark, and the pixels of a figure stay as they are."""
    from PIL import Image, ImageStat
    from selenium.webdriver.common.by import By

    def gray(png: bytes):
        return Image.open(io.BytesIO(png)).convert("L")

    visit(browser, site[1], "book/foundations/inverse-problems.html")
    figure = browser.find_element(By.CSS_SELECTOR, "article .cell_output img")
    shots = {}
    for _ in range(3):
        theme = browser.execute_script("return document.documentElement.dataset.theme")
        if theme not in shots:
            browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", figure)
            shots[theme] = gray(figure.screenshot_as_png), gray(browser.get_screenshot_as_png())
        browser.execute_script("document.querySelector('.theme-switch-button').click()")
    assert set(shots) == {"light", "dark"}
    assert shots["light"][0].tobytes() == shots["dark"][0].tobytes(), "the figure looks different in dark mode"
    means = {theme: ImageStat.Stat(whole).mean[0] for theme, (_, whole) in shots.items()}
    assert means["dark"] < means["light"] - 20  # the page itself did change


@in_browser
def test_sliders_move_by_keyboard(browser, site):
    """On every page with widgets each handle answers to the arrow keys: another picture, another text; and back."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    live = [name for name in PAGES if WIDGET_VIEW in (HTML / f"{name}.html").read_text(encoding="utf-8")]
    assert len(live) >= 5, f"widgets on {live} only: the chapters lost theirs, or the build did"

    def changes(key: str, handle, before: list) -> list:
        """What is shown once the key has changed it."""
        handle.send_keys(key)
        WebDriverWait(browser, 20, 0.05).until(lambda b: ask(b, "shown") != before, "the picture stays as it was")
        return ask(browser, "shown")

    for name in live:
        assert visit(browser, site[1], f"{name}.html") == []
        handles = browser.find_elements(By.CSS_SELECTOR, "article [role=slider]")
        buttons = browser.find_elements(By.CSS_SELECTOR, "article .widget-toggle-buttons button:nth-of-type(2)")
        assert handles or buttons, f"{name}: widgets that no key moves"
        for number, handle in enumerate(handles + buttons, start=1):
            before = ask(browser, "shown")
            after = changes(Keys.ARROW_RIGHT if handle in handles else Keys.ENTER, handle, before)
            for old, new in zip(before, after, strict=True):
                assert old == new or (old[0] != new[0] and old[1] != new[1]), f"{name}: control {number} changes one of two"
            if handle in handles:
                assert changes(Keys.ARROW_LEFT, handle, after) == before, f"{name}: control {number} does not come back"
