"""Run notebooks in a real kernel and store their outputs and widget state.

    python tools/run_nb.py nbs/relax/choice.ipynb [--flags slow]

Cells that the tests skip (flags in settings.ini, `eval: false`) are skipped here too and keep their stored output."""
import hashlib, os, re, time
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from fastcore.script import call_parse, Param
from nbdev.config import get_config
from nbdev.clean import nbdev_clean

def skipped(source, flags):
    "Whether a code cell is left out: one of its directives is in `flags`, or it says `eval: false`."
    directives = dict(re.findall(r'^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)$', source, re.M))
    return directives.get('eval', '').strip().lower() == 'false' or bool(flags & directives.keys())

def steady_ids(nb, stem):
    "Give widget models ids that stay the same from run to run, so that a second run changes nothing."
    state = nb.metadata.get('widgets', {}).get('application/vnd.jupyter.widget-state+json', {}).get('state', {})
    text = nbformat.writes(nb)
    for i, key in enumerate(state): text = text.replace(key, hashlib.md5(f'{stem}-{i}'.encode()).hexdigest())
    return nbformat.reads(text, 4)

def run(path, flags, timeout):
    nb = nbformat.read(path, 4)
    for cell in nb.cells:
        if cell.cell_type == 'code' and skipped(cell.source, flags): cell.metadata['tags'] = ['skip-execution']
    NotebookClient(nb, timeout=timeout, kernel_name='python3', store_widget_state=True,
                   resources={'metadata': {'path': str(path.parent)}}).execute()
    for cell in nb.cells: cell.metadata.pop('tags', None)
    partial = path.with_suffix('.tmp~')
    nbformat.write(steady_ids(nb, path.stem), partial)
    os.replace(partial, path)
    nbdev_clean.__wrapped__(fname=str(path))

@call_parse
def main(paths: Param('Notebooks', str, nargs='+'),
         flags: str = '',      # Flags normally skipped that run now, e.g. 'slow'
         timeout: int = 900):  # Seconds a cell
    "Run notebooks and store their outputs"
    os.environ.setdefault('NAS_NB_PROGRESS', '0')
    os.environ['PYTHONPATH'] = os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get('PYTHONPATH', '')])
    off = set(get_config().tst_flags.split()) - set(flags.split())
    for path in map(Path, paths):
        start = time.time()
        run(path, off, timeout)
        print(f'{path}: {time.time() - start:.1f} s')
