"""One step of a search on the mini space with each hypergradient, against exact second order (DARTS by double backward).

    python bench/hypergrad.py [--quick] [--json]

A step is all that the driver does for one batch: the architecture's update, the weights' update and, for the split method, the copy's.
The searches take turns in one process, a step each; ratio is the median over turns of the peer's time to ours, > 1 where we are faster."""
import argparse, json, time
import numpy as np, torch
from nas_nb.search.driver import Budget, run_search
from nas_nb.search.hypergrad import FirstOrder, Unrolled
from nas_nb.search.implicit import Implicit
from nas_nb.search.rarts import Split
from nas_nb.space.mini import mini_space, mini_task

METHODS = {'first order': FirstOrder, 'split': Split, 'split, jacobi': lambda: Split(order='jacobi'), 'unrolled fd': Unrolled,
           'implicit, 5 terms': Implicit, 'implicit, identity': lambda: Implicit('identity', alpha=.1)}

def step(s):
    start = time.perf_counter()
    s.begin_step()
    for update in s.steps: update(s)
    return 1e3*(time.perf_counter() - start)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true'); parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    torch.set_num_threads(1)
    states = {name: run_search(mini_space().supernet(0), mini_task(), hyper=hyper(), budget=Budget(1, 50)).state
              for name, hyper in (METHODS | {'peer': lambda: Unrolled('exact')}).items()}
    for s in states.values(): s.net.train(); s.step = 1
    n = 12 if args.quick else 60
    times = np.array([[step(s) for s in states.values()] for _ in range(n)])
    if not args.json: print(f'{"name":<20}{"ours":>10}{"peer":>10}{"ratio":>8}  unit')
    for i, name in enumerate(METHODS):
        mine, theirs = np.median(times[:, i]), np.median(times[:, -1])
        ratio = float(np.median(times[:, -1]/times[:, i]))
        row = {'name': name, 'ours': round(mine, 2), 'peer': round(theirs, 2), 'ratio': round(ratio, 2), 'unit': 'ms', 'n': n}
        print(json.dumps(row) if args.json else f'{name:<20}{row["ours"]:>10}{row["peer"]:>10}{row["ratio"]:>8}  ms')

if __name__ == '__main__': main()
