"""Is a latency the same when it is measured again? Interleaved measurement with a canary against one timer after the other.

    python bench/measure.py [--quick] [--json]

Random cells are timed in two independent passes, by `nas_nb.cost.measure.measure` and by `torch.utils.benchmark.Timer.blocked_autorange`
(the peer, median of its blocks) with the same total time. The figure is the mean relative difference between the two passes of one method;
ratio > 1 where ours is steadier. What an interleaved measurement gains shows on a machine that is not quiet."""
import argparse, json, time
import numpy as np, torch
from torch.utils.benchmark import Timer
from nas_nb.cost.collect import sample_genotypes
from nas_nb.cost.measure import measure
from nas_nb.space.pooled import pooled_space

def ours(networks, x, seed):
    return np.array([latency.ms for latency in measure(networks, x, seed=seed, rounds=30).values()])

def peer(networks, x, seconds):
    out = []
    with torch.inference_mode():
        for network in networks.values():
            network.eval()
            timer = Timer('network(x)', globals=dict(network=network, x=x), num_threads=1)
            out.append(1000*timer.blocked_autorange(min_run_time=seconds/len(networks)).median)
    return np.array(out)

def difference(a, b): return float(np.mean(np.abs(a - b)/((a + b)/2)))

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true'); parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    repeats, n = (2, 20) if args.quick else (6, 40)
    space = pooled_space()
    networks = {space.to_str(g): space.build(g) for g in sample_genotypes(space, n)}
    x, rows = space.example(1), []
    for r in range(repeats):                      # the two methods take turns, so both meet the same machine
        start = time.perf_counter()
        first, second = ours(networks, x, 2*r), ours(networks, x, 2*r + 1)
        seconds = (time.perf_counter() - start)/2
        rows.append((difference(first, second), difference(peer(networks, x, seconds), peer(networks, x, seconds))))
    mine, theirs = np.median(np.array(rows), axis=0)
    row = {'name': 'repeatability', 'ours': round(100*mine, 3), 'peer': round(100*theirs, 3), 'ratio': round(theirs/mine, 2),
           'unit': '% between passes', 'n': repeats}
    table = (f'{"name":<16}{"ours":>10}{"peer":>10}{"ratio":>8}  unit\n'
             f'{row["name"]:<16}{row["ours"]:>10}{row["peer"]:>10}{row["ratio"]:>8}  {row["unit"]} (median of {repeats})')
    print(json.dumps(row) if args.json else table)

if __name__ == '__main__': main()
