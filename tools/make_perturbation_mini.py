"""Search the mini space, select by magnitude and by perturbation, and judge every operation of every edge by what it is worth.

    python tools/make_perturbation_mini.py [SEEDS]     5 seeds, about 7 minutes on one core; rows that are already there are kept

perturbation_mini.csv: a row for each supernet, selector and seed.
perturbation_edges.csv: a row for each operation of each edge of the first-order supernets."""
import sys
from pathlib import Path
import pandas as pd
import torch
from make_search_mini import whole_task
from nas_nb.core.run import atomic_write
from nas_nb.search.driver import Budget, run_search
from nas_nb.search.perturbation import BlankArchitecture, Perturbation, discretization_accuracy, op_influence
from nas_nb.search.retrain import accuracy
from nas_nb.search.select import Magnitude
from nas_nb.space.mini import mini_space, mini_truth

SUPERNETS = {'first order': (), 'blank': (BlankArchitecture(),)}
SELECTORS = {'magnitude': Magnitude(), 'perturbation': Perturbation(), 'perturbation, loss': Perturbation('loss'),
             'perturbation, untuned': Perturbation(tune_epochs=0)}

def picks(supernet, seed, state):
    "A row for each selector, all from the same finished search."
    space, truth, kept = mini_space(), mini_truth().set_index('genotype')['mean'], state.snapshot()
    for name, select in SELECTORS.items():
        if (supernet, name) == ('blank', 'magnitude'): continue
        half = state.sources['val'].split
        before, g = accuracy(state.net, half), select(state)
        row = dict(supernet=supernet, selector=name, seed=seed, genotype=space.to_str(g), truth=truth[space.to_str(g)], before=before,
                   evaluations=state.selection.get('evaluations', 0), tuning_steps=state.selection.get('tuning_steps', 0),
                   cut=accuracy(state.net.discretize(g), half))
        state.restore(kept)
        yield row

def edges(seed, state):
    "A row for each operation of each edge: its weight, its influence by accuracy and by loss, and its discretisation accuracy."
    space, weights = mini_space(), state.net.arch['cell'].detach().softmax(-1)
    for row in range(3):
        by = {c: op_influence(state, ('cell', row), c) for c in ('acc', 'loss')}
        for op, name in enumerate(space.op_names):
            yield dict(seed=seed, row=row, op=name, weight=weights[row, op].item(), acc=by['acc'][op].item(), loss=by['loss'][op].item(),
                       cut=discretization_accuracy(state, ('cell', row), op, epochs=0),
                       worth=discretization_accuracy(state, ('cell', row), op))

if __name__ == '__main__':
    torch.set_num_threads(1)
    folder = Path(__file__).resolve().parent.parent/'nbs/search'
    paths = folder/'perturbation_mini.csv', folder/'perturbation_edges.csv'
    tables = [pd.read_csv(path).to_dict('records') if path.exists() else [] for path in paths]
    def write(table, path): atomic_write(path, pd.DataFrame(table).to_csv(index=False, float_format='%.5f'))
    for seed in range(int(sys.argv[1]) if sys.argv[1:] else 5):
        for supernet, plugins in SUPERNETS.items():
            found, judged = (any(r['seed'] == seed and r.get('supernet', supernet) == supernet for r in table) for table in tables)
            if found and (judged or supernet == 'blank'): continue
            state = run_search(mini_space().supernet(seed), whole_task(), budget=Budget(30, 50), plugins=plugins, seed=seed).state
            if not found: tables[0] += picks(supernet, seed, state)
            write(tables[0], paths[0])
            print(pd.DataFrame(tables[0]).tail(4).to_string(), flush=True)
            if supernet == 'blank': continue
            tables[1] += edges(seed, state)
            write(tables[1], paths[1])
