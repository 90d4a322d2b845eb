"""The empirical tangent kernel against the Jacobian contraction of PyTorch's tutorial (torch.func), in one process, taking turns.

    python bench/ntk.py [--quick] [--json] [--threads 2]

Each row checks that both give the same kernel (relative difference, in float32 and once in float64) and gives the ratio of medians, > 1 where layer factors are
faster or smaller. Where the tutorial's two Jacobians do not fit `--room` GB its rows are taken in chunks of samples. Memory is the peak of the process beyond the
start of the call, each side in a process of its own. `--quick` ends in a minute, with fewer samples in the first row."""
import argparse, json, os, subprocess, sys, time
import numpy as np, torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from nas_nb.lens.ntk import ntk

def mlp(): return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
def conv():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
MODELS = {'mlp': (mlp, (784,)), 'conv': (conv, (3, 32, 32))}

def make(name, n, dtype=torch.float32):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    return build().to(dtype).eval(), torch.randn(n, *shape, dtype=dtype)

def tutorial(model, x1, x2):
    "pytorch.org/tutorials/intermediate/neural_tangent_kernels, 'full': both Jacobians, then one product for each parameter."
    params = {k: v.detach() for k, v in model.named_parameters()}
    def fnet_single(params, x): return functional_call(model, params, (x.unsqueeze(0),)).squeeze(0)
    jac1 = [j.flatten(2) for j in vmap(jacrev(fnet_single), (None, 0))(params, x1).values()]
    jac2 = [j.flatten(2) for j in vmap(jacrev(fnet_single), (None, 0))(params, x2).values()]
    return torch.stack([torch.einsum('Naf,Mbf->NMab', j1, j2) for j1, j2 in zip(jac1, jac2)]).sum(0)

def tutorial_chunked(model, x, room):
    "The same in blocks of samples, where two Jacobians of all samples would take more than `room` bytes."
    size = sum(p.numel() for p in model.parameters())*10*x.element_size()
    step = max(1, min(len(x), int(room/(3*size))))
    return torch.cat([torch.cat([tutorial(model, a, b) for b in x.split(step)], 1) for a in x.split(step)]) if step < len(x) else tutorial(model, x, x)

def alternate(ours, peer, rounds, peer_rounds):
    "Medians in ms and the largest relative difference of results."
    a, b = ours(), None
    times = ([], [])
    for i in range(rounds):
        for k, f in enumerate((ours, peer)):
            if k == 1 and i >= peer_rounds: continue
            start = time.perf_counter(); out = f(); times[k].append(1e3*(time.perf_counter() - start))
            if k: b = out
    return *(float(np.median(t)) for t in times), float((a - b).abs().max()/b.abs().max())

def peak(who, name, n, threads, outputs='full'):
    "Peak memory in MB of one call, beyond the start of the call, in a fresh process."
    command = [sys.executable, os.path.abspath(__file__), '--peak', who, name, str(n), outputs, '--threads', str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

def measure_peak(who, name, n, outputs):
    def status(key): return int(next(line for line in open('/proc/self/status') if line.startswith(key)).split()[1])/1024
    model, x = make(name, n)
    small = x[:2]
    ntk(model, small) if who == 'ours' else tutorial(model, small, small)        # libraries load before the count starts
    try: open('/proc/self/clear_refs', 'w').write('5')                           # the high-water mark starts here
    except OSError: pass
    before = status('VmRSS')
    ntk(model, x, outputs=outputs) if who == 'ours' else tutorial(model, x, x)
    print(status('VmHWM') - before)

def rows(args):
    n = 24 if args.quick else 128
    model, x = make('mlp', n)
    ours, peer, off = alternate(lambda: ntk(model, x), lambda: tutorial_chunked(model, x, args.room*2**30), 5, 1 if args.quick else 2)
    yield dict(name=f'mlp_784_512_512_10_n{n}_full', ours=ours, peer=peer, ratio=peer/ours, unit='ms', n=5, difference=off)
    n = 32 if args.quick else 64
    model, x = make('conv', n)
    ours, peer, off = alternate(lambda: ntk(model, x), lambda: tutorial(model, x, x), 5 if args.quick else 9, 3)
    yield dict(name=f'conv_16_32_64_n{n}_full', ours=ours, peer=peer, ratio=peer/ours, unit='ms', n=5, difference=off)
    a, b = (peak(who, 'conv', 64, args.threads) for who in ('ours', 'peer'))
    yield dict(name='conv_16_32_64_n64_peak', ours=a, peer=b, ratio=b/a, unit='MB', n=1)
    for name, k in (('mlp', 6), ('conv', 6)):
        model, x = make(name, k, torch.float64)
        got, want = ntk(model, x), tutorial(model, x, x)
        yield dict(name=f'{name}_float64_difference', ours=float((got - want).abs().max()/want.abs().max()), unit='relative', n=k)
    model, x = make('mlp', 2000)
    start = time.perf_counter(); ntk(model, x, outputs='trace'); took = time.perf_counter() - start
    yield dict(name='mlp_n2000_trace_time', ours=1e3*took, unit='ms', n=1)
    yield dict(name='mlp_n2000_trace_peak', ours=peak('ours', 'mlp', 2000, args.threads, 'trace'), peer=1024, unit='MB', n=1, note='peer: the 1 GB allowed')

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true'); parser.add_argument('--json', action='store_true')
    parser.add_argument('--threads', type=int, default=2); parser.add_argument('--room', type=float, default=12, help='GB for the tutorial')
    parser.add_argument('--peak', nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak: return measure_peak(args.peak[0], args.peak[1], int(args.peak[2]), args.peak[3])
    if not args.json: print(f'{"name":<32}{"ours":>12}{"peer":>12}{"ratio":>9}  unit      difference')
    for row in rows(args):
        row = {k: float(f'{v:.4g}') if isinstance(v, float) else v for k, v in row.items()}
        if args.json: print(json.dumps(row), flush=True)
        else: print(f'{row["name"]:<32}{row["ours"]:>12}{row.get("peer", ""):>12}{row.get("ratio", ""):>9}  {row["unit"]:<10}{row.get("difference", "")}', flush=True)

if __name__ == '__main__': main()
