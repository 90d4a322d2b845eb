"""The exact expected latency of a relaxed cell and its gradient: contraction of the joint table against plain enumeration.

    python bench/expected_latency.py [--quick] [--json]

Both compute the expectation over all 15,625 cells of the space and its gradient in the choice weights, in one
process, taking turns; results are compared. The plain way (the peer) multiplies out the probability of every
cell from its six choices and sums. ratio > 1 where the contraction is faster."""
import argparse, json, time
import numpy as np, torch
from nas_nb.cost.collect import sample_genotypes
from nas_nb.cost.predictor import PredictorCost, fit_predictor
from nas_nb.space.pooled import pooled_space

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true'); parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    torch.set_num_threads(1)
    space = pooled_space()
    genotypes = sample_genotypes(space, 60)
    rng = np.random.default_rng(0)
    fit = fit_predictor(space, genotypes, [.1 + .05*len(g.canonical().cells[0].edges)*rng.uniform(.98, 1.02) for g in genotypes])
    cost = PredictorCost(fit, space, mode='exact')
    table = cost.table(torch.empty(0)).flatten()
    choices = torch.cartesian_prod(*[torch.arange(5)]*6)
    def plain(w): return (torch.stack([w[row][choices[:, row]] for row in range(6)]).prod(0)*table).sum()
    def timed(f):
        w = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).softmax(-1).requires_grad_()
        start = time.perf_counter(); value = f(w); value.backward()
        return 1e3*(time.perf_counter() - start), value.detach(), w.grad
    fast, slow = lambda w: cost({'cell': w}), plain
    (_, a, ga), (_, b, gb) = timed(fast), timed(slow)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6); torch.testing.assert_close(ga, gb, rtol=1e-3, atol=1e-5)
    n = 50 if args.quick else 300
    times = np.array([(timed(fast)[0], timed(slow)[0]) for _ in range(n)])
    mine, theirs = np.median(times, axis=0)
    row = {'name': 'expected_latency', 'ours': round(mine, 4), 'peer': round(theirs, 4),
           'ratio': round(float(np.median(times[:, 1]/times[:, 0])), 2), 'unit': 'ms', 'n': n}
    table = (f'{"name":<18}{"ours":>10}{"peer":>10}{"ratio":>8}  unit\n'
             f'{row["name"]:<18}{row["ours"]:>10}{row["peer"]:>10}{row["ratio"]:>8}  {row["unit"]}')
    print(json.dumps(row) if args.json else table)

if __name__ == '__main__': main()
