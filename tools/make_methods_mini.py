"""Search the mini space with every method of the registry: what was found beside its truth, the gap and the time:
nbs/search/methods_mini.csv.

    python tools/make_methods_mini.py [seeds]    about 25 minutes on one core for 3 seeds; rows that are already there are kept

Every method has 240 steps in batches of 50, the 800 training images split 400/400 (on one level: whole),
and the driver's recipe but for what its row changes. Seconds are those of the processor, selection included, on one thread."""
import sys, time
from pathlib import Path
from make_search_mini import fill, whole_task
from nas_nb.search.driver import Budget, run_search
from nas_nb.search.registry import METHODS, method_settings
from nas_nb.search.schedules import supernet_gap
from nas_nb.space.mini import mini_space, mini_truth

def one(name, seed):
    space, truth = mini_space(), mini_truth().set_index('genotype')['mean']
    budget = Budget(15 if METHODS[name].level == 'one' else 30, 50)      # one level has twice the steps in an epoch
    start = time.process_time()
    found = run_search(space.supernet(seed), whole_task(), **method_settings(name, space, budget), seed=seed)
    seconds, g = time.process_time() - start, space.to_str(found.genotype)
    supernet, cut = supernet_gap(found.state, found.genotype)
    return dict(setting=name, seed=seed, genotype=g, truth=float(truth[g]), regret=float(truth.max() - truth[g]), supernet=supernet,
                cut=cut, gap=supernet - cut, seconds=seconds)

if __name__ == '__main__':
    fill(Path(__file__).resolve().parent.parent/'nbs/search/methods_mini.csv', METHODS, one, int(sys.argv[1]) if len(sys.argv) > 1 else 3)
