"""The house rules: the package is what the notebooks export, notebooks are clean and small, pages and README are complete."""
import os, re, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import nbformat, pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p.relative_to(ROOT) for p in (ROOT/'nbs').rglob('*.ipynb') if not any(q.startswith(('.', '_')) for q in p.parts[-3:]))
MODULES = sorted(p.relative_to(ROOT) for p in (ROOT/'nas_nb').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))
WINGS = ('core', 'relax', 'ops', 'lens', 'train', 'space', 'cost', 'search')

def cells(path, kind='code'): return [c for c in nbformat.read(ROOT/path, 4).cells if c.cell_type == kind]
def exported(cell): return bool(re.match(r'\s*#\s*\|\s*exporti?\b', cell.source))

@pytest.fixture(scope='module')
def fresh_export(tmp_path_factory):
    "A copy of the tree in which the package was exported anew and the notebooks were cleaned."
    pytest.importorskip('nbdev')
    copy = tmp_path_factory.mktemp('export')/'nas_nb_copy'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', '.venv*', '_docs', '_proc', 'runs', 'build', '*.egg-info',
                                                              '__pycache__', 'node_modules'))
    for init in (copy/'nas_nb').rglob('*.py'):
        if init.name != '__init__.py': init.unlink()
    env = {**os.environ, 'PYTHONPATH': str(copy)}
    for command in ('nbdev_export', 'nbdev_clean'):
        program = Path(sys.executable).parent/command
        done = subprocess.run([program if program.exists() else command], cwd=copy, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return copy

def test_package_is_what_the_notebooks_export(fresh_export):
    theirs = {p.relative_to(fresh_export) for p in (fresh_export/'nas_nb').rglob('*.py')}
    ours = {p.relative_to(ROOT) for p in (ROOT/'nas_nb').rglob('*.py')}
    assert ours == theirs, f'without a notebook: {sorted(map(str, ours - theirs))}; not exported: {sorted(map(str, theirs - ours))}'
    different = [str(p) for p in sorted(ours) if (ROOT/p).read_text() != (fresh_export/p).read_text()]
    assert not different, f'run `make export`: {different}'

def test_notebooks_are_clean(fresh_export):
    different = [str(p) for p in NOTEBOOKS if (ROOT/p).read_text() != (fresh_export/p).read_text()]
    assert not different, f'run `make export`: {different}'

def test_every_wing_has_its_folder():
    assert NOTEBOOKS and MODULES
    for p in MODULES: assert p.parts[1] in WINGS, p

@pytest.mark.parametrize('path', MODULES, ids=str)
def test_imports_point_upwards(path):
    "A wing imports only wings that stand above it, and no private names from another wing."
    wing = path.parts[1]
    for line in (ROOT/path).read_text().splitlines():
        if m := re.match(r'\s*from \.\.(\w+)(?:\.\w+)? import (.*)', line):
            assert WINGS.index(m[1]) < WINGS.index(wing), f'{path}: {line.strip()}'
            private = [n for n in re.findall(r'(?<!as )\b_\w+', m[2].split('#')[0])]
            assert not private, f'{path}: private names {private}'

@pytest.mark.parametrize('path', NOTEBOOKS, ids=str)
def test_notebook_shape(path):
    nb = nbformat.read(ROOT/path, 4)
    assert (ROOT/path).stat().st_size < 400_000, 'a notebook stays under 400 KB'
    first = nb.cells[0]
    assert first.cell_type == 'markdown' and re.match(r'# \S.*\n+> \S', first.source), 'the first cell is a title and one sentence under it'
    long = [len(c.source.splitlines()) for c in cells(path) if exported(c) and len(c.source.splitlines()) > 40]
    assert not long, f'exported cells of {long} lines'
    assert any(c.outputs for c in cells(path)), 'outputs are stored'
    assert all(c.id for c in nb.cells)
    errors = [o for c in cells(path) for o in c.outputs if o.output_type == 'error']
    assert not errors, 'a stored output is an error'

@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.parts[1] in WINGS], ids=str)
def test_notebook_exports_to_the_module_of_its_name(path):
    exp = [m[1] for c in cells(path) if (m := re.match(r'#\| default_exp (\S+)', c.source))]
    assert exp == [f'{path.parts[1]}.{path.stem}'], exp

def test_texts_name_no_machine_and_no_registry():
    files = [p for p in subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True).stdout.split('\n')
             if p.endswith(('.py', '.ipynb', '.md', '.txt', '.ini', '.toml', '.yml', '.cfg', '.csv', '.json'))
             or p in ('Makefile', '.ci/run')]
    if not files: pytest.skip('not a git checkout')
    pattern = re.compile(r'/(?:home|root|work)/\w|/opt/pypi|index-url|find-links|0x[0-9a-f]{10,}')
    found = [f'{p}: {m[0]}' for p in files if (ROOT/p).exists() and (m := pattern.search((ROOT/p).read_text(errors='ignore')))
             and p != 'tests/test_house.py']
    assert not found, found

def test_import_is_light():
    "`import nas_nb` imports neither torch nor an extra."
    code = ('import sys, nas_nb; heavy = {"torch", "datasets", "onnx", "onnxruntime", "dask", "ray", "matplotlib"} & set(sys.modules); '
            'assert not heavy, heavy')
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)

def test_modules_import_no_extra():
    names = [str(p.with_suffix('')).replace(os.sep, '.') for p in MODULES]
    code = (f'import importlib, sys, pandas\nof_pandas = set(sys.modules)     # pandas imports pyarrow by itself where it is installed\n'
            f'for n in {names!r}: importlib.import_module(n)\nextra = {{"datasets", "onnx", "onnxruntime", "onnxscript", "dask", '
            f'"distributed", "ray", "nbdev", "entmax", "pyarrow"}} & (set(sys.modules) - of_pandas)\nassert not extra, extra')
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)

def test_every_notebook_is_in_the_sidebar():
    text = (ROOT/'nbs'/'sidebar.yml').read_text()
    missing = [str(p) for p in NOTEBOOKS if str(p.relative_to('nbs')) not in text]
    assert not missing, missing

def test_readme_is_made_from_the_index():
    import importlib.util
    spec = importlib.util.spec_from_file_location('readme', ROOT/'tools'/'readme.py')
    readme = importlib.util.module_from_spec(spec); spec.loader.exec_module(readme)
    assert (ROOT/'README.md').read_text() == readme.make()[0], 'run `make readme`'

def test_metadata_agrees_with_the_pins():
    from packaging.requirements import Requirement
    parser = ConfigParser(delimiters=['=']); parser.read(ROOT/'settings.ini')
    pins = dict(line.split('==') for line in (ROOT/'requirements-tested.txt').read_text().splitlines() if '==' in line
                and not line.startswith('#'))
    pins = {k.lower(): v for k, v in pins.items()}
    for key in ('requirements', 'export_requirements', 'sparse_requirements', 'cluster_requirements', 'dev_requirements',
                'docs_requirements'):
        for text in parser['DEFAULT'][key].split():
            r = Requirement(text)
            assert r.name.lower() in pins, f'{r.name} is asked for and not pinned'
            assert pins[r.name.lower()] in r.specifier, f'{text} does not admit the tested {pins[r.name.lower()]}'
