"""The built docs site: read as files, then opened in headless Chromium as a reader would."""
import functools, http.server, json, re, subprocess, sys, threading
from pathlib import Path
import pytest
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent/'tools')]
import browser as chromium

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT/'_docs'
yaml = pytest.importorskip('yaml', reason="the docs packages are not installed: pip install -e '.[docs]'")
import docs_pages, readme

PAGES = [p.removesuffix('.ipynb') + '.html' for _, paths in docs_pages.read_sidebar(draft=True) for p in paths]

def has(page, pattern):
    path = ROOT/'nbs'/page.replace('.html', '.ipynb')
    if not path.exists(): return False
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return any(re.search(pattern, ''.join(c['source']) if c['cell_type'] == 'markdown' else json.dumps(c['outputs'])) for c in cells
               if c['cell_type'] == 'markdown' or not re.search(r'#\s*\|\s*(hide|exporti)', ''.join(c['source'])))

def newest(*folders):
    files = [f for folder in folders for f in (folder.rglob('*') if folder.is_dir() else [folder]) if f.is_file()]
    return max(f.stat().st_mtime for f in files if '_build' not in f.parts and '_src' not in f.parts and '__pycache__' not in f.parts
               and 'checkpoints' not in str(f))

@pytest.fixture(scope='module')
def built():
    "Whether the site was built now: it is, unless it is newer than all that it is made of."
    pytest.importorskip('myst_nb', reason="the docs packages are not installed: pip install -e '.[docs]'")
    made_of = [ROOT/'nbs', ROOT/'docs', ROOT/'nas_nb', ROOT/'settings.ini', ROOT/'tools'/'docs_pages.py', ROOT/'tools'/'build_docs.py']
    old = not (SITE/'index.html').exists() or (SITE/'index.html').stat().st_mtime < newest(*made_of)
    if old:
        build = subprocess.run([sys.executable, str(ROOT/'tools'/'build_docs.py')], capture_output=True, text=True)
        if build.returncode: pytest.fail(f'the site cannot be built:\n{build.stdout[-1000:]}\n{build.stderr[-3000:]}', pytrace=False)
    return old

@pytest.fixture(scope='module')
def site(built): return SITE

@pytest.fixture(scope='module')
def base(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()

@pytest.fixture(scope='module')
def window():
    api, program = chromium.playwright(), chromium.executable()
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=program, args=chromium.ARGS)
        yield b
        b.close()

@pytest.fixture
def page(window):
    p = chromium.watch(window.new_page(viewport={'width': 1300, 'height': 1000}))
    yield p
    p.close()

# --- without a browser

def test_sidebar_lists_every_notebook_once():
    docs_pages.read_sidebar()

def test_papers_table():
    papers = docs_pages.read_papers()
    assert list(papers) == list(range(1, 120))
    assert all(row['title'] and row['place'] for row in papers.values())
    assert all(re.fullmatch(r'(\d{4}\.\d{4,5})?', row['arxiv']) for row in papers.values())

def test_papers_are_cited_with_their_own_number():
    "A link `[paper N](https://arxiv.org/abs/...)` names the paper that stands under N."
    papers = docs_pages.read_papers()
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            text = ''.join(cell['source'])
            for number, url in re.findall(r'\[[^\]]*\bpaper (\d+)\b[^\]]*\]\((?:https?://arxiv\.org/\w+/)(\d{4}\.\d{4,5})', text):
                assert int(number) in papers, f'{path.name}: paper {number}'
                known = papers[int(number)]['arxiv']
                assert known in ('', url), f'{path.name}: paper {number} is arXiv {known}, the link says {url}'

def test_links_of_words():
    symbol = docs_pages.Symbol('nas_nb.core.plot', 'plot_cell', 'function')
    words = docs_pages.Words({'nas_nb.core.plot': [symbol]}, {40: {}})
    assert words('see `plot_cell` and `other`') == 'see {py:obj}`plot_cell <nas_nb.core.plot.plot_cell>` and `other`'
    assert words('# `plot_cell`\n```python\n`plot_cell`\n```') == '# `plot_cell`\n```python\n`plot_cell`\n```'
    cited = words('[paper 40](https://arxiv.org/abs/1806.09055), paper 40, a paper 41')
    assert cited == '[paper 40](/papers/040.md), [paper 40](/papers/040.md), a paper 41'

def test_widgets_become_stills():
    picture = {'output_type': 'display_data', 'data': {'image/png': 'AAAA'}, 'metadata': {}}
    state = {'top': {'model_name': 'VBoxModel', 'state': {'children': ['IPY_MODEL_slider', 'IPY_MODEL_out']}},
             'slider': {'model_name': 'FloatSliderModel', 'state': {'description': 'step size ξ', 'value': .5}},
             'out': {'model_name': 'OutputModel', 'state': {'outputs': [picture]}}}
    view = {'output_type': 'display_data', 'metadata': {},
            'data': {'text/plain': 'VBox(...)', 'application/vnd.jupyter.widget-view+json': {'model_id': 'top'}}}
    line, still = docs_pages.outputs_of({'outputs': [view]}, state, 'alt')
    assert '<b>step size ξ</b> = 0.5' in line['data']['text/html'] and 'Jupyter' in line['data']['text/html']
    assert still['data'] == {'image/png': 'AAAA'}

def test_readme_is_that_of_the_index():
    if not (ROOT/'nbs'/'index.ipynb').exists(): pytest.skip('no index yet')
    text, images = readme.make()
    assert (ROOT/'README.md').read_text(encoding='utf-8') == text, 'README.md is not that of nbs/index.ipynb: python tools/readme.py'
    for name, data in images.items(): assert (ROOT/name).read_bytes() == data, name

def test_no_dead_links_and_nothing_from_elsewhere(built):
    "A build ends with this check, and fails."
    import build_docs
    assert built or not build_docs.dead_links(SITE)

def test_every_exported_name_has_an_entry(site):
    modules = [n.module for n in (docs_pages.Notebook(p.replace('.html', '.ipynb')) for p in PAGES) if n.module]
    for module, symbols in docs_pages.read_package(modules).items():
        text = (site/'api'/f'{module}.html').read_text(encoding='utf-8')
        for s in symbols: assert f'id="{s.full}"' in text, s.full
        assert all(s.doc for s in symbols if s.kind in ('function', 'class')), [s.full for s in symbols if s.kind != 'data' and not s.doc]

def test_every_paper_has_a_page(site):
    assert len(list((site/'papers').glob('[01]*.html'))) == 119
    table = (site/'papers'/'index.html').read_text(encoding='utf-8')
    assert len(re.findall(r'href="\d{3}\.html"', table)) == 119
    assert len(re.findall(r'(?:planned|cited)</p></td>|working</strong>', table)) >= 119

# --- with a browser

def check_page(page, base, name):
    page.goto(f'{base}/{name}')
    assert page.locator('article h1').count() == 1
    if has(name, r'\$[^$]+\$'):
        page.locator('mjx-container svg').first.wait_for(state='attached', timeout=20_000)
        assert not page.locator('mjx-merror, [data-mjx-error]').count(), 'a formula that cannot be read'
    if has(name, r'"image/png"'):
        pictures = page.locator('div.cell_output img')
        assert pictures.count()
        for i in range(pictures.count()):
            pictures.nth(i).scroll_into_view_if_needed()
            assert pictures.nth(i).evaluate('async i => { await i.decode(); return i.naturalWidth }') > 40
            assert len(pictures.nth(i).get_attribute('alt')) > 8
    assert page.evaluate('document.documentElement.scrollWidth <= window.innerWidth'), 'scrolls sideways'
    assert not page.faults, page.faults

@pytest.mark.parametrize('name', PAGES)
def test_notebook_page(page, base, name): check_page(page, base, name)

@pytest.mark.parametrize('name', ['index.html', *[p for p in PAGES if p != 'index.html'], 'api/index.html', 'papers/index.html',
                                  'papers/001.html', 'search.html'])
def test_narrow_screen(page, base, name):
    "400 pixels wide: nothing makes the page scroll sideways."
    page.set_viewport_size({'width': 400, 'height': 800})
    page.goto(f'{base}/{name}')
    if has(name, r'\$[^$]+\$'): page.locator('mjx-container svg').first.wait_for(state='attached', timeout=20_000)
    wide = page.evaluate('document.documentElement.scrollWidth')
    assert wide <= 400, f'{wide} pixels'
    assert not page.faults, page.faults

def test_front_page_leads_on(page, base):
    page.goto(f'{base}/index.html')
    assert page.locator('.sidebar-tree a').count() >= len(PAGES) - 1
    page.locator('.related-pages a.next-page').click()
    assert page.locator('article h1').count() == 1 and not page.url.endswith('index.html')
    page.locator('.related-pages a.prev-page').click()
    page.wait_for_url(f'{base}/**')
    assert not page.faults, page.faults

def test_search_finds_a_class(page, base):
    page.goto(f'{base}/index.html')
    name = 'LatencyPredictor' if (ROOT/'nas_nb'/'cost'/'predictor.py').exists() else 'Softmax'
    page.locator('input[name=q]').first.fill(name)
    page.keyboard.press('Enter')
    hit = page.locator('#search-results a', has_text=name).first
    hit.wait_for(timeout=20_000)
    hit.click()
    page.wait_for_load_state()
    assert name in page.locator('article').inner_text() and not page.faults, page.faults

def test_reference_leads_to_the_notebook_and_to_the_code(page, base):
    page.goto(f'{base}/api/nas_nb.core.plot.html#nas_nb.core.plot.plot_cell')
    entry = page.locator('dl.py:has(> dt[id="nas_nb.core.plot.plot_cell"])')
    assert 'ax=None' in entry.locator('dt').first.inner_text()
    entry.locator('a.where').click()
    page.wait_for_url('**/core/plot.html#plot_cell')
    assert page.locator('[id="plot_cell"]').count() == 1
    page.go_back()
    entry.locator('.viewcode-link').first.click()
    page.wait_for_url('**/_modules/nas_nb/core/plot.html#**')
    assert 'def plot_cell' in page.locator('article').inner_text() and not page.faults, page.faults

def test_dark_mode(page, base):
    page.goto(f'{base}/core/plot.html')
    light = page.evaluate('getComputedStyle(document.body).backgroundColor')
    page.evaluate("localStorage.setItem('theme', 'dark')")
    page.reload()
    assert page.evaluate('getComputedStyle(document.body).backgroundColor') != light
    assert page.locator('button.theme-toggle').count() and not page.faults, page.faults
