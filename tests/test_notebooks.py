"""Every notebook's own tests, one pytest case a notebook, each in a process of its own.

`nbdev_test` reuses its workers, so a dtype, a seed or a cached module that one notebook leaves behind reaches the next.
Here the heavy imports are done once, and each notebook runs in a fork of that: clean state, no second torch import.
Environment: NAS_NB_LIMIT seconds a notebook (default 120), NAS_NB_FLAGS flags to run that are skipped otherwise ('slow')."""
import multiprocessing as mp, os, sys
from pathlib import Path
import pytest
import torch, numpy, sklearn, pandas   # noqa: F401  imported before the fork, never used here: no thread pool, no CUDA context
import matplotlib
matplotlib.use('Agg')
config = pytest.importorskip('nbdev.config')
from nbdev.doclinks import nbglob

ROOT = Path(__file__).resolve().parent.parent
LIMIT = float(os.environ.get('NAS_NB_LIMIT', 120))
FLAGS = os.environ.get('NAS_NB_FLAGS', '').split()

def notebooks():
    before = os.getcwd(); os.chdir(ROOT)
    try: return sorted(Path(p).resolve().relative_to(ROOT) for p in nbglob(ROOT/'nbs', as_path=True))
    finally: os.chdir(before)

def _run(path, log):
    f = open(log, 'w'); os.dup2(f.fileno(), 1); os.dup2(f.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(os.dup(1), 'w')
    os.environ['NAS_NB_PROGRESS'] = '0'
    torch.set_num_threads(1)
    os.chdir(ROOT)
    from nbdev.test import test_nb
    skip = config.get_config().tst_flags.split()
    os.chdir((ROOT/path).parent)
    ok, _ = test_nb(ROOT/path, skip_flags=skip, force_flags=FLAGS, basepath=ROOT)
    sys.stdout.flush(); os._exit(0 if ok else 1)

@pytest.mark.parametrize('path', notebooks(), ids=str)
def test_notebook(path, tmp_path):
    log = tmp_path/'log'
    process = mp.get_context('fork').Process(target=_run, args=(path, log))
    process.start(); process.join(LIMIT)
    if process.is_alive():
        process.kill(); process.join(); pytest.fail(f'{path}: more than {LIMIT:.0f} s', pytrace=False)
    if process.exitcode: pytest.fail(log.read_text()[-6000:] or f'exit code {process.exitcode}', pytrace=False)
