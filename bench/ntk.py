"""The empirical tangent kernel against PyTorch's tutorial (torch.func), TorchNTK and neural-tangents, taking turns.

    python bench/ntk.py [--quick] [--json] [--threads 2] [--neural-tangents PYTHON]

Each row checks that both give the same kernel (relative difference, in float32 and once in float64) and gives the ratio of medians, > 1
where layer factors are faster or smaller. Where the tutorial's two Jacobians do not fit `--room` GB its rows are taken in chunks of
samples. Memory is the peak of the process beyond the start of the call, each side in a process of its own. Operations are those of
`ntk_flops`, and their share of the speed of a matrix product measured in the same run. TorchNTK's two methods are written anew from its
published source: its explicit one leaves out the biases. neural-tangents needs an environment of its own (`pip install
neural-tangents==0.6.5 jax==0.4.25 jaxlib==0.4.25 'numpy<2' 'scipy<1.13'`), whose Python `--neural-tangents` names; it answers from there
when asked, in turns with ours. Rows `many_*` set `ntk_many` against a loop over `ntk`, for narrow networks of NAS-Bench-201, 16 samples,
summed over outputs. `--quick` ends in a minute, with fewer samples."""
import argparse, json, math, os, subprocess, sys, tempfile, time
import numpy as np, torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from nas_nb.lens.ntk import ntk
from nas_nb.lens.ntk_cost import ntk_flops, ntk_many
from nas_nb.space.cells import nb201_space

def mlp(): return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
def conv():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
                         nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
def single(): return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
MODELS = {'mlp': (mlp, (784,)), 'conv': (conv, (3, 32, 32)), 'single': (single, (64,))}

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
    if step >= len(x): return tutorial(model, x, x)
    return torch.cat([torch.cat([tutorial(model, a, b) for b in x.split(step)], 1) for a in x.split(step)])

def explicit(model, x):
    "TorchNTK's explicit method: inputs and sensitivities of dense layers by hand, columns are samples; weights only, no biases."
    layers = [m for m in model if isinstance(m, nn.Linear)]
    with torch.no_grad():
        inputs, slopes = [x.T], []
        for layer in layers[:-1]:
            h = layer(inputs[-1].T).T
            inputs.append(torch.relu(h)); slopes.append((h > 0).to(h.dtype))
        S, parts = torch.ones(1, 1), []
        for l in range(len(layers) - 1, -1, -1):
            parts.append((S.T @ S)*(inputs[l].T @ inputs[l]))
            if l: S = slopes[l - 1]*(S.T @ layers[l].weight).T
        return torch.stack(parts).sum(0)

def by_autograd(model, x):
    "TorchNTK's autograd method: for each parameter a backward pass of every sample through the graph of the whole batch."
    y, total = model(x)[:, 0], 0
    params = list(model.parameters())
    for p in params: p.requires_grad_(False)
    for p in params:
        p.requires_grad_(True)
        rows = []
        for n in range(len(y)):
            model.zero_grad()
            y[n].backward(create_graph=True)
            rows.append(p.grad.detach().reshape(-1).clone())
        J = torch.stack(rows)
        total = total + J @ J.T
        p.requires_grad_(False)
    for p in params: p.requires_grad_(True); p.grad = None
    return total

WORKER = """
import sys, time, numpy as np, jax, neural_tangents as nt
data = np.load(sys.argv[1]); x = data['x']; params = [(data[f'w{i}'], data[f'b{i}']) for i in range(3)]
def apply_fn(params, x, **_):
    for i, (w, b) in enumerate(params):
        x = x @ w + b
        if i < 2: x = jax.nn.relu(x)
    return x
kernel = jax.jit(nt.empirical_ntk_fn(apply_fn, trace_axes=(), vmap_axes=0, implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES))
def timed():
    start = time.perf_counter(); K = kernel(x, None, params).block_until_ready()
    return K, 1e3*(time.perf_counter() - start)
K, first = timed(); np.save(sys.argv[2], np.asarray(K)); print(first, flush=True)
for line in sys.stdin: print(timed()[1], flush=True)
"""

def neural_tangents(python, model, x, rounds, threads):
    "Medians in ms of ours and theirs in the steady state, theirs with its first call (compilation), and the relative difference."
    with tempfile.TemporaryDirectory() as folder:
        linear = [m for m in model if isinstance(m, nn.Linear)]
        arrays = {f'{k}{i}': getattr(m, n).detach().numpy().T for i, m in enumerate(linear) for k, n in (('w', 'weight'), ('b', 'bias'))}
        np.savez(f'{folder}/in.npz', x=x.numpy(), **arrays)
        flags = f'--xla_cpu_multi_thread_eigen={"true" if threads > 1 else "false"} intra_op_parallelism_threads={threads}'
        env = {**os.environ, 'XLA_FLAGS': flags, 'OMP_NUM_THREADS': str(threads), 'JAX_PLATFORMS': 'cpu'}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        with subprocess.Popen([python, '-c', WORKER, f'{folder}/in.npz', f'{folder}/out.npy'], env=env, **pipes) as peer:
            first, K, times = float(peer.stdout.readline()), ntk(model, x), ([], [])
            theirs = torch.from_numpy(np.load(f'{folder}/out.npy'))
            for _ in range(rounds):
                start = time.perf_counter(); ntk(model, x); times[0].append(1e3*(time.perf_counter() - start))
                peer.stdin.write('go\n'); peer.stdin.flush(); times[1].append(float(peer.stdout.readline()))
            peer.stdin.close()
    return *(float(np.median(t)) for t in times), first, float((K - theirs).abs().max()/K.abs().max())

def product_speed():
    "Operations per ms of a float32 matrix product of 1024 x 1024, the best of 20."
    a, best = torch.randn(1024, 1024), math.inf
    for _ in range(20): start = time.perf_counter(); a @ a; best = min(best, time.perf_counter() - start)
    return 2*1024**3/best/1e3

def work(model, x, took, peak):
    "Operations in billions, ours and the tutorial's (two Jacobians, a full product), and our share of a matrix product's speed."
    ours, theirs = ntk_flops(model, x), ntk_flops(model, x, method='jacobian')
    return dict(gflop=ours['total']/1e9, gflop_tutorial=2*theirs['total']/1e9, share_of_peak=ours['total']/took/peak)

def alternate(ours, peer, rounds, peer_rounds):
    "Medians in ms and the largest relative difference of results; who is first changes from round to round."
    a, b = ours(), None
    times, sides = ([], []), [(0, ours), (1, peer)]
    for i in range(rounds):
        for k, f in sides[::1 if i % 2 else -1]:
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

def many(same, count=20):
    "Narrow NAS-Bench-201 networks on 16 small images: `count` initialisations of one cell, or as many random cells."
    space, generator = nb201_space(in_shape=(3, 16, 16), C=4, cells=1), np.random.default_rng(0)
    cells = [space.sample(generator) for _ in range(count)]
    torch.manual_seed(0)
    return [space.build(cells[0] if same else g, i).eval() for i, g in enumerate(cells)], torch.randn(16, 3, 16, 16)

def rows(args):
    peak_speed = product_speed()
    yield dict(name='matrix_product_peak', ours=peak_speed/1e6, unit='GFLOP/s', n=20)
    n = 24 if args.quick else 128
    model, x = make('mlp', n)
    ours, peer, off = alternate(lambda: ntk(model, x), lambda: tutorial_chunked(model, x, args.room*2**30), 5, 1 if args.quick else 2)
    yield dict(name=f'mlp_784_512_512_10_n{n}_full', ours=ours, peer=peer, ratio=peer/ours, unit='ms', n=5, difference=off,
               **work(model, x, ours, peak_speed))
    if args.neural_tangents:
        ours, peer, first, off = neural_tangents(args.neural_tangents, model, x, 5 if args.quick else 15, args.threads)
        yield dict(name=f'mlp_n{n}_neural_tangents', ours=ours, peer=peer, ratio=peer/ours, unit='ms', n=15, difference=off)
        yield dict(name=f'mlp_n{n}_neural_tangents_first', ours=ours, peer=first, ratio=first/ours, unit='ms', n=1)
    else: print('neural-tangents: skipped, --neural-tangents names the Python of an environment that has it', file=sys.stderr)
    model, x = make('single', 128 if args.quick else 256)
    weights = lambda: sum(v for k, v in ntk(model, x, outputs='trace', layers=True).items() if k.endswith('weight'))
    off = float((weights() - explicit(model, x)).abs().max()/explicit(model, x).abs().max())
    ours, peer, _ = alternate(lambda: ntk(model, x, outputs='trace'), lambda: explicit(model, x), 401, 401)
    yield dict(name=f'single_n{len(x)}_torchntk_explicit', ours=ours, peer=peer, ratio=peer/ours, unit='ms', n=401, difference=off,
               note='ours with biases; difference: of the weights alone')
    ours, peer, off = alternate(lambda: ntk(model, x, outputs='trace'), lambda: by_autograd(model, x), 5, 1)
    yield dict(name=f'single_n{len(x)}_torchntk_autograd', ours=ours, peer=peer, ratio=peer/ours, unit='ms', n=5, difference=off,
               **work(model, x, ours, peak_speed))
    n = 32 if args.quick else 64
    model, x = make('conv', n)
    ours, peer, off = alternate(lambda: ntk(model, x), lambda: tutorial(model, x, x), *(5 if args.quick else 11,)*2)
    yield dict(name=f'conv_16_32_64_n{n}_full', ours=ours, peer=peer, ratio=peer/ours, unit='ms', n=11, difference=off,
               **work(model, x, ours, peak_speed))
    a, b = (peak(who, 'conv', 64, args.threads) for who in ('ours', 'peer'))
    yield dict(name='conv_16_32_64_n64_peak', ours=a, peer=b, ratio=b/a, unit='MB', n=1)
    for same in (True, False):
        models, x = many(same, 6 if args.quick else 20)
        loop = lambda: torch.stack([ntk(m, x, outputs='trace') for m in models])
        ours, peer, off = alternate(lambda: ntk_many(models, x, 'trace'), loop, 3, 3)
        yield dict(name=f'many_{len(models)}_{"draws_of_a_cell" if same else "random_cells"}', ours=ours, peer=peer, ratio=peer/ours,
                   unit='ms', n=3, difference=off, note='peer: a loop over ntk')
    for name, k in (('mlp', 6), ('conv', 6)):
        model, x = make(name, k, torch.float64)
        got, want = ntk(model, x), tutorial(model, x, x)
        yield dict(name=f'{name}_float64_difference', ours=float((got - want).abs().max()/want.abs().max()), unit='relative', n=k)
    model, x = make('mlp', 2000)
    start = time.perf_counter(); ntk(model, x, outputs='trace'); took = time.perf_counter() - start
    yield dict(name='mlp_n2000_trace_time', ours=1e3*took, unit='ms', n=1)
    yield dict(name='mlp_n2000_trace_peak', ours=peak('ours', 'mlp', 2000, args.threads, 'trace'), peer=1024, unit='MB', n=1,
               note='peer: the 1 GB allowed')

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true'); parser.add_argument('--json', action='store_true')
    parser.add_argument('--threads', type=int, default=2); parser.add_argument('--room', type=float, default=12, help='GB for the tutorial')
    parser.add_argument('--neural-tangents', metavar='PYTHON', help='Python of an environment with neural-tangents')
    parser.add_argument('--peak', nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak: return measure_peak(args.peak[0], args.peak[1], int(args.peak[2]), args.peak[3])
    if not args.json: print(f'{"name":<32}{"ours":>12}{"peer":>12}{"ratio":>9}  unit      difference')
    for row in rows(args):
        row = {k: float(f'{v:.4g}') if isinstance(v, float) else v for k, v in row.items()}
        if args.json: print(json.dumps(row), flush=True)
        else:
            line = f'{row["name"]:<32}{row["ours"]:>12}{row.get("peer", ""):>12}{row.get("ratio", ""):>9}  {row["unit"]:<10}'
            if 'gflop' in row: row['note'] = f'{row["gflop"]} GFLOP, tutorial {row["gflop_tutorial"]}; {row["share_of_peak"]:.0%} of peak'
            print(line + f'{row.get("difference", "")}  {row.get("note", "")}', flush=True)

if __name__ == '__main__': main()
