"""Search the mini space with every method of the registry: what was found beside its truth, the gap and the time
(nbs/search/methods_mini.csv), and by how much a process grows while it searches (methods_memory.csv; Linux only).

    python tools/make_methods_mini.py [seeds]    about 30 minutes on one core for 3 seeds; rows that are already there are kept

Every method has 240 steps in batches of 50, the 800 training images split 400/400 (on one level: whole),
and the driver's recipe but for what its row changes. Seconds are those of the processor, selection included, on one thread.
Memory: a process of its own for each method, which first searches in batches of 10 (so that everything is loaded), then in
batches of 200; the largest resident size during the second search, less that before it."""
import json, os, sys, time
from dataclasses import replace
from pathlib import Path
from make_search_mini import fill, whole_task
from nas_nb.search.driver import Budget, run_search
from nas_nb.search.registry import METHODS, method_settings
from nas_nb.search.schedules import supernet_gap
from nas_nb.space.mini import mini_space, mini_truth

NBS = Path(__file__).resolve().parent.parent/'nbs/search'

def one(name, seed):
    space, truth = mini_space(), mini_truth().set_index('genotype')['mean']
    budget = Budget(15 if METHODS[name].level == 'one' else 30, 50)      # one level has twice the steps in an epoch
    start = time.process_time()
    found = run_search(space.supernet(seed), whole_task(), **method_settings(name, space, budget), seed=seed)
    seconds, g = time.process_time() - start, space.to_str(found.genotype)
    supernet, cut = supernet_gap(found.state, found.genotype)
    return dict(setting=name, seed=seed, genotype=g, truth=float(truth[g]), regret=float(truth.max() - truth[g]), supernet=supernet,
                cut=cut, gap=supernet - cut, seconds=seconds)

def resident(key):
    "A line of /proc/self/status in MB: VmRSS now, VmHWM at the most."
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])/1024

def grown(name):
    "MB by which this process grows at the most during a search in batches of 200."
    def search(batch):
        epochs = 4 if name == 'sd-darts' else 2                          # its teachers are the first three epochs
        how = method_settings(name, mini_space(), Budget(epochs, batch))
        task = whole_task()
        if batch == 10: task = replace(task, train=task.train.subset(range(40)))
        run_search(mini_space().supernet(0), task, **how)
    search(10)
    Path('/proc/self/clear_refs').write_text('5')                        # VmHWM begins anew
    before = resident('VmRSS')
    search(200)
    return resident('VmHWM') - before

def memory(name, seed):
    "`grown` in a fork of this process, which itself computes nothing."
    read, write = os.pipe()
    if not (pid := os.fork()):
        os.write(write, json.dumps(grown(name)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe: megabytes = json.load(pipe)
    os.waitpid(pid, 0)
    return dict(setting=name, seed=seed, megabytes=megabytes)

if __name__ == '__main__':
    fill(NBS/'methods_memory.csv', METHODS, memory, 1)
    fill(NBS/'methods_mini.csv', METHODS, one, int(sys.argv[1]) if len(sys.argv) > 1 else 3)
