"""A reader's session in JupyterLab: run the tour from top to bottom; in every notebook with widgets, run what they need, move each of them
and see its picture change."""
import ast, json, os, re, shutil, socket, subprocess, symtable, sys, time, urllib.request
from pathlib import Path
from types import SimpleNamespace
import pytest
sys.path.insert(0, str(Path(__file__).resolve().parent))
import browser as chromium

ROOT = Path(__file__).resolve().parent.parent
TOKEN = 'test'
TOUR = 'study/tour.ipynb'
SECONDS = float(os.environ.get('NAS_NB_LAB_SECONDS', 420))      # the longest a notebook may take in JupyterLab

WIDGET = re.compile(r'\b(explore|interact|interactive|interactive_output|\w+Slider|ToggleButtons|Dropdown)\(')
SKIPPED = re.compile(r'^\s*#\s*\|\s*(slow|cuda|notest|eval:\s*false)', re.M)

def names(source):
    "`(bound, changed, used)`: names that a cell binds; names of things that it changes in part or calls a method of; names that it reads."
    table, tree = symtable.symtable(source, 'cell', 'exec'), ast.parse(source)
    scopes = [table]
    for scope in scopes: scopes += scope.get_children()
    bound = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    used = {s.get_name() for scope in scopes for s in scope.get_symbols() if s.is_referenced() and (scope is table or s.is_global())}
    changed = {n.id for f in tree.body if isinstance(f, ast.FunctionDef) and f.decorator_list
               for n in ast.walk(f.args) if isinstance(n, ast.Name)}
    for node in ast.walk(tree):                                 # a patched class, a part that is set, a method called for itself
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call): node = node.value.func
        elif not isinstance(getattr(node, 'ctx', None), ast.Store): continue
        if isinstance(node, ast.Name): continue
        while isinstance(node, (ast.Attribute, ast.Subscript)): node = node.value
        if isinstance(node, ast.Name): changed.add(node.id)
    return bound, changed, used

def needed(sources):
    "Which of the cells must run for those with widgets to show them: these, and backwards every cell that makes what a later one uses."
    keep, wanted = set(), set()
    for i in reversed(range(len(sources))):
        bound, changed, used = names(sources[i])
        if WIDGET.search(sources[i]) or (bound | changed) & wanted:
            keep.add(i)
            wanted = wanted - bound | used
    return keep

def test_cells_that_a_widget_needs():
    sources = ['import numpy as np', 'a, rows = 1, []', 'rows.append(a)', 'b = 2', 'def f(b): return b + rows[0]', 'print(b)',
               'explore(lambda figure, n: f(n))', 'rows = None']
    assert needed(sources) == {1, 2, 4, 6}

def with_widgets():
    found = []
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in path.parts: continue
        code = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
        if any(map(WIDGET.search, code)):
            found.append(path.relative_to(ROOT/'nbs').as_posix())
    return found

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab on a copy of the notebooks, with folders of its own."
    pytest.importorskip('jupyterlab', reason="JupyterLab is not installed: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp('lab')
    shutil.copytree(ROOT/'nbs', folder/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints', '_*'))
    # what the tests of the notebooks skip is skipped here, and no stored output can pass for a new one
    for path in (folder/'nbs').rglob('*.ipynb'):
        nb = json.loads(path.read_text(encoding='utf-8'))
        code = [cell for cell in nb['cells'] if cell['cell_type'] == 'code']
        for cell in code:
            cell['outputs'], cell['execution_count'], cell['source'] = [], None, ''.join(cell['source'])
            if SKIPPED.search(cell['source']): cell['source'] = 'pass'
        if path != folder/'nbs'/TOUR and any(WIDGET.search(cell['source']) for cell in code):
            keep = needed([cell['source'] for cell in code])
            for i, cell in enumerate(code): cell['source'] = cell['source'] if i in keep else 'pass'
        nb['metadata'].pop('widgets', None)
        path.write_text(json.dumps(nb), encoding='utf-8')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = dict(os.environ, JUPYTER_CONFIG_DIR=str(folder/'config'), JUPYTER_DATA_DIR=str(folder/'data'),
               JUPYTER_RUNTIME_DIR=str(folder/'runtime'), JUPYTERLAB_SETTINGS_DIR=str(folder/'settings'),
               JUPYTERLAB_WORKSPACES_DIR=str(folder/'workspaces'), IPYTHONDIR=str(folder/'ipython'),
               PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), NAS_NB_PROGRESS='0')
    if (ROOT.parent/'shared'/'data').exists(): env.setdefault('NAS_NB_DATA', str(ROOT.parent/'shared'/'data'))
    with (folder/'log').open('w') as log:
        process = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}',
                                    f'--IdentityProvider.token={TOKEN}', f'--ServerApp.root_dir={folder}', '--LabApp.news_url=',
                                    '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate'],
                                   env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    url = f'http://127.0.0.1:{port}'
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f'{url}/api/status?token={TOKEN}').close(); break
            except OSError:
                if process.poll() is not None: pytest.fail((folder/'log').read_text()[-3000:])
                time.sleep(.5)
        yield SimpleNamespace(url=url, folder=folder)
    finally:
        process.terminate(); process.wait(30)

@pytest.fixture
def page():
    api, program = chromium.playwright(), chromium.executable()
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=program, args=chromium.ARGS)
        page = b.new_page(viewport={'width': 1400, 'height': 6000})     # high: JupyterLab draws only the cells that are near the screen
        page.faults = []
        page.on('request', lambda r: None if chromium.local(r.url) or r.url.startswith('ws') and '127.0.0.1' in r.url
                else page.faults.append(f'leaves this machine: {r.url}'))
        yield page
        b.close()

def ran(path):
    "Whether the notebook that JupyterLab saved has a number at every cell of code."
    try: cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    except ValueError: return False
    return all(c.get('execution_count') for c in cells if c['cell_type'] == 'code' and ''.join(c['source']).strip())

def run_all(page, lab, name):
    "Open a notebook, run all cells, and wait until the last one has run."
    page.goto(f'{lab.url}/lab/tree/nbs/{name}?token={TOKEN}&reset', timeout=120_000)
    page.wait_for_selector('.jp-Notebook .jp-CodeCell', timeout=120_000)
    page.add_locator_handler(page.locator('.jp-Dialog .jp-mod-accept'), lambda button: button.click())    # 'Select Kernel', should Lab ask
    page.get_by_text('Python 3 (ipykernel) | Idle').wait_for(timeout=120_000)
    page.locator('.lm-MenuBar-itemLabel', has_text=re.compile('^Run$')).click()
    page.locator('.lm-Menu-itemLabel', has_text=re.compile('^Run All Cells$')).click()
    try: page.get_by_text('Python 3 (ipykernel) | Busy').wait_for(timeout=10_000)
    except Exception: pass                                              # it may have been shorter than one look
    end, still = time.time() + SECONDS, 0
    while still < 3:                                                    # idle three times in a row
        assert time.time() < end, f'{name}: more than {SECONDS:.0f} s'
        idle = page.get_by_text('Python 3 (ipykernel) | Idle').count() and not page.locator('.jp-InputPrompt', has_text='[*]').count()
        still = still + 1 if idle else 0
        page.wait_for_timeout(500)
    page.keyboard.press('Control+s')
    path = lab.folder/'nbs'/name
    while not (saved := ran(path)) and time.time() < end: page.wait_for_timeout(500)
    assert saved, f'{name}: some cells have not run'
    error = page.locator('.jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]')
    assert not error.count(), f'{name}: {error.first.inner_text()[:2000]}'

def seen(page):
    "What stands below the widgets: the text and the pictures of their outputs."
    return page.evaluate('''() => [...document.querySelectorAll(
                                  '.jp-Notebook :is(.jupyter-widgets-output-area, .widget-output, .widget-image, .widget-html-content)')]
                               .map(e => e.innerText + (e.tagName == 'IMG' ? e.src :
                                                                [...e.querySelectorAll('img')].map(i => i.src).join()))''')

def move(page, i):
    "Move the i-th control of the page by one step, by keyboard."
    control = page.locator('.jp-Notebook :is(.widget-slider .noUi-handle, .widget-dropdown select, '
                           '.widget-toggle-buttons button:not(.mod-active), .widget-checkbox input)').nth(i)
    control.scroll_into_view_if_needed()
    tag = control.evaluate('e => e.tagName')
    if tag == 'SELECT': control.select_option(index=(control.evaluate('e => e.selectedIndex') + 1) % control.locator('option').count())
    elif tag == 'DIV':
        control.focus()
        at_end = control.get_attribute('aria-valuenow') == control.get_attribute('aria-valuemax')
        for _ in range(2): control.press('ArrowLeft' if at_end else 'ArrowRight')
    else: control.click()

def test_tour_runs_from_top_to_bottom(lab, page):
    if not (ROOT/'nbs'/TOUR).exists(): pytest.skip('no tour yet')
    run_all(page, lab, TOUR)
    assert not page.faults, page.faults

@pytest.mark.parametrize('name', with_widgets() or [pytest.param('', marks=pytest.mark.skip(reason='no notebook has a widget'))])
def test_widgets_change_the_picture(lab, page, name):
    run_all(page, lab, name)
    controls = page.locator('.jp-Notebook :is(.widget-slider .noUi-handle, .widget-dropdown select, '
                            '.widget-toggle-buttons button:not(.mod-active), .widget-checkbox input)')
    controls.first.wait_for(timeout=60_000)
    for i in range(controls.count()):
        end = time.time() + 60
        while not (before := ''.join(seen(page))) and time.time() < end: page.wait_for_timeout(200)
        assert before, f'{name}: there is nothing to see below the controls'
        move(page, i)
        end = time.time() + 60
        while ''.join(seen(page)) == before:
            assert time.time() < end, f'{name}: control {i} changes nothing'
            page.wait_for_timeout(200)
        page.wait_for_timeout(1000)          # let the picture settle before the next control
    assert not page.faults, page.faults
