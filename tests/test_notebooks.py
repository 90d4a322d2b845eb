"""Every notebook's own tests, one pytest case a notebook, each in a process of its own.

`nbdev_test` reuses its workers, so a dtype, a seed or a cached module that one notebook leaves behind reaches the next.
Here a server does the heavy imports once and nothing else, and each notebook runs in a fork of it: no second torch import, and
nothing that other tests of this process have left (a limit of the compiler, a number of threads) reaches a notebook.
Environment: NAS_NB_LIMIT seconds a notebook (default 120), NAS_NB_FLAGS flags to run that are skipped otherwise ('slow')."""
import multiprocessing as mp, os, sys
from pathlib import Path
import pytest
config = pytest.importorskip('nbdev.config')
from nbdev.doclinks import nbglob

ROOT = Path(__file__).resolve().parent.parent
LIMIT = float(os.environ.get('NAS_NB_LIMIT', 120))
FLAGS = os.environ.get('NAS_NB_FLAGS', '').split()

SERVER = mp.get_context('forkserver')
SERVER.set_forkserver_preload(['torch', 'numpy', 'sklearn', 'pandas', 'matplotlib.pyplot', 'nbdev.test'])   # imported, never used there

def notebooks():
    before = os.getcwd(); os.chdir(ROOT)
    try: return sorted(Path(p).resolve().relative_to(ROOT) for p in nbglob(ROOT/'nbs', as_path=True))
    finally: os.chdir(before)

def _run(path, log):
    f = open(log, 'w'); os.dup2(f.fileno(), 1); os.dup2(f.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(os.dup(1), 'w')
    os.environ |= {'NAS_NB_PROGRESS': '0', 'MPLBACKEND': 'Agg'}
    import matplotlib, torch
    from nbdev.test import test_nb
    matplotlib.use('Agg')
    torch.set_num_threads(1)
    os.chdir(ROOT)
    skip = config.get_config().tst_flags.split()
    os.chdir((ROOT/path).parent)
    ok, _ = test_nb(ROOT/path, skip_flags=skip, force_flags=FLAGS, basepath=ROOT)
    sys.stdout.flush(); os._exit(0 if ok else 1)

@pytest.mark.parametrize('path', notebooks(), ids=str)
def test_notebook(path, tmp_path):
    log = tmp_path/'log'
    process = SERVER.Process(target=_run, args=(path, log))
    process.start(); process.join(LIMIT)
    if process.is_alive():
        process.kill(); process.join(); pytest.fail(f'{path}: more than {LIMIT:.0f} s', pytrace=False)
    if process.exitcode: pytest.fail(log.read_text()[-6000:] or f'exit code {process.exitcode}', pytrace=False)
