"""A headless Chromium for the tests of the site and of JupyterLab, and a watch on what its pages ask for and complain about."""
import os, shutil
import pytest

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')
ARGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
        '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage']
NO_BROWSER = f'no browser: install chromium, or name one in NAS_NB_BROWSER (looked for {", ".join(NAMES)})'

def playwright():
    return pytest.importorskip('playwright.sync_api', reason="playwright is not installed: pip install -e '.[docs]'")

def executable():
    found = os.environ.get('NAS_NB_BROWSER') or next(filter(None, map(shutil.which, NAMES)), None)
    if not found: pytest.skip(NO_BROWSER)
    return found

def local(url):
    return url.startswith(('data:', 'blob:', 'about:')) or url.split('//')[-1].split('/')[0].split(':')[0] in ('127.0.0.1', 'localhost')

def watch(page):
    "Collect in `page.faults` every request that leaves this machine or fails, every error on the console and in a script."
    page.faults = []
    page.on('request', lambda r: None if local(r.url) else page.faults.append(f'leaves this machine: {r.url}'))
    # a request that the page's own navigation cut off is no fault
    page.on('requestfailed', lambda r: None if 'ERR_ABORTED' in (r.failure or '')
            else page.faults.append(f'request failed: {r.url} ({r.failure})'))
    page.on('response', lambda r: page.faults.append(f'status {r.status}: {r.url}') if r.status >= 400
            and not r.url.endswith('favicon.ico') else None)
    page.on('pageerror', lambda e: page.faults.append(f'script error: {e}'))
    page.on('console', lambda m: page.faults.append(f'console: {m.text}') if m.type == 'error' and 'favicon' not in m.text else None)
    return page
