"Fixtures for tests in a real browser: pages served over http, every foreign request refused, every error collected."
import os,re,shutil,threading
from functools import partial
from http.server import SimpleHTTPRequestHandler,ThreadingHTTPServer
import pytest

def missing(why):
    "Skip for want of a browser, or fail where `CAPSULE_ROUTING_BROWSER=1` promises one, as in CI"
    if os.environ.get('CAPSULE_ROUTING_BROWSER')=='1': pytest.fail(f'CAPSULE_ROUTING_BROWSER=1, but {why}')
    pytest.skip(why)

class Quiet(SimpleHTTPRequestHandler):
    "Files below `/site/`, as a project's pages lie below a folder of their host: a link from the host's root is a broken one"
    def translate_path(self, path): return super().translate_path(path.removeprefix('/site'))
    def do_GET(self):
        if self.path=='/favicon.ico': self.send_response(204); self.end_headers()
        elif self.path.startswith('/site/'): super().do_GET()
        else: self.send_error(404)
    def log_message(self, *args): pass

@pytest.fixture(scope='session')
def serve():
    "`serve(folder)`: its address while the tests run, ending in `/`"
    servers = {}
    def start(folder):
        folder = str(folder)
        if folder not in servers:
            s = servers[folder] = ThreadingHTTPServer(('127.0.0.1',0), partial(Quiet, directory=folder))
            threading.Thread(target=s.serve_forever, daemon=True).start()
        return f'http://127.0.0.1:{servers[folder].server_port}/site/'
    yield start
    for s in servers.values(): s.shutdown(); s.server_close()

@pytest.fixture(scope='module') # Playwright keeps an event loop running: not longer than one module
def chromium():
    "The machine's own Chromium, headless"
    try: from playwright.sync_api import sync_playwright
    except ImportError: missing('playwright is not installed')
    path = next(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome'))), None)
    if not path: missing('no Chromium on PATH')
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=['--no-sandbox','--disable-dev-shm-usage'])
        yield browser
        browser.close()

@pytest.fixture
def open_page(chromium):
    """`open_page(url, width=1280, height=800, dark=False, wait='load')`: a page that reaches nothing but its own server, or its own file.
    The test fails at its end if a page asked for anything foreign or reported an error; `page.problems` is that list meanwhile."""
    pages = []
    def start(url, width=1280, height=800, dark=False, scale=2, wait='load', **kw):
        url = str(url)
        own = re.match(r'https?://[^/]+/', url)
        own = own[0] if own else url.split('#')[0] # a page on disk may read nothing but itself
        context = chromium.new_context(viewport=dict(width=width, height=height), device_scale_factor=scale,
                                       color_scheme='dark' if dark else 'light', reduced_motion='reduce', **kw)
        context.set_default_timeout(90_000) # other work may slow a machine tenfold
        page = context.new_page()
        page.problems = problems = []
        def route(r):
            if r.request.url.startswith((own,'data:','blob:')): r.continue_()
            else: problems.append(f'foreign request: {r.request.url}'); r.abort()
        context.route('**/*', route)
        page.on('console', lambda m: m.type=='error' and problems.append(f'console: {m.text}'))
        page.on('pageerror', lambda e: problems.append(f'exception: {e}'))
        page.on('response', lambda r: r.status>=400 and problems.append(f'{r.status}: {r.url}'))
        page.goto(url, wait_until=wait)
        pages.append(page)
        return page
    yield start
    problems = [f'{p.url}: {o}' for p in pages for o in p.problems]
    for p in pages: p.context.close()
    assert not problems, '\n'.join(problems)
