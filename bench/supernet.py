"""A full first-order search step of a supernet: the reference loop, our plain path, our fast path,
with the same weights and the same batch, taking turns.

    python bench/supernet.py [--quick] [--json] [--threads 2] [--rounds 3] [--space darts nb201] [--device cuda] [--autocast]

The reference loop is what the public DARTS and NAS-Bench-201 codes do: every operation of every edge called by itself ('none' too),
contiguous memory format, a full backward pass through weights and architecture in both halves of the step, PyTorch's default threads. Ours
is the best of the fast path and, for NAS-Bench-201 and where there is a C++ compiler, the compiled cells and the whole supernet as one
program ('whole') on `--threads` threads, the first on 1 too; the first turn, which compiles, is not counted but printed. One step: loss
on one batch, Adam on the architecture; loss on another batch, clipping, SGD on the weights. All but the whole program are first compared
with the loss and gradients of the reference (tests/test_fast.py and nbs/space/fast.ipynb check that one). The floor is the arithmetic
of all convolutions (forward and the gradients that are needed) at the best rate that any of the library's convolutions reaches here; our
compiled sides do their 3x3 convolutions with fewer multiplications (nas_nb.ops.winograd), so for them it is a scale, not a limit.
Where the time goes: shares of the fast step by kind of library call. Two halves: the same step by two single-threaded data-parallel
processes, half the batch each, gradients averaged (batch norm then sees half the batch; not for 'whole', which would compile once more).
Memory is the peak of a fresh process beyond its start. `--device cuda`: all of it on the GPU, memory as its allocator counts it, without
the halves. `--autocast`: our sides once more in bfloat16, in rows of their own; they are not compared for equality, and the best side is
chosen without them. `--quick` ends in a minute: small supernets, batch 16."""
import argparse, copy, ctypes, json, multiprocessing, os, socket, subprocess, sys, time
import numpy as np, torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from nas_nb.core.run import seeded
from nas_nb.ops.winograd import can_compile
from nas_nb.search.plugin import SearchRecipe
from nas_nb.space.cells import MixedCell, nb201_space
from nas_nb.space.darts import darts_space
from nas_nb.space.fast import accelerate, compile_cells, compile_network

SPACES = {'darts': lambda quick: darts_space((3, 32, 32), 10, C=8 if quick else 16, cells=5 if quick else 8),
          'nb201': lambda quick: nb201_space((3, 32, 32), 10, C=16, stages=3, cells=1 if quick else 5)}

# --- the reference loop ---------------------------------------------------------------------------------------------------------------

def mixed(choice, x, w):
    "The sum over all operations as the public codes write it; 'none' multiplies its input by zero."
    def call(name, op):
        if name != 'none': return op(x)
        return x[:, :, ::op.stride, ::op.stride].mul(0.)
    return sum(wi*call(name, op) for wi, (name, op) in zip(w, choice.ops.items()))

def reference_cell(cell, inputs, w):
    h = list(inputs)
    row = 0
    for target in sorted({t for _, t in cell.edges}):
        sources = [s for s, t in cell.edges if t == target]
        h.append(sum(mixed(cell.choices[row + j], h[s], w[row + j]) for j, s in enumerate(sources)))
        row += len(sources)
    return h

def reference_forward(net, x):
    W = {group: net.arch[group].softmax(-1) for group in net.arch.groups}
    if hasattr(net, 'cells'):
        s0 = s1 = net.stem(x)
        for cell in net.cells:
            h = reference_cell(cell, (cell.preprocess0(s0), cell.preprocess1(s1)), W[cell.group])
            s0, s1 = s1, torch.cat(h[2:], 1)
        return net.head(s1)
    x = net.stem(x)
    for part in net.body: x = reference_cell(part, (x,), W['cell'])[-1] if isinstance(part, MixedCell) else part(x)
    return net.head(x)

# --- the three sides ------------------------------------------------------------------------------------------------------------------

MAKE = {'fast': accelerate, 'compiled': compile_cells, 'whole': compile_network}

class Side:
    "One way to make a step: a network of its own (a copy of `net`), its optimizers, its number of threads, its precision."
    def __init__(self, kind, net, threads, exchange=None, autocast=False):
        self.kind, self.threads, self.exchange, self.net = kind, threads, exchange, copy.deepcopy(net)
        self.recipe = SearchRecipe(autocast=autocast)
        if kind in MAKE: MAKE[kind](self.net)
        self.net.train()
        self.arch, self.weights = self.net.arch_parameters(), self.net.weight_parameters()
        fused = dict(fused=True) if kind in MAKE else {}
        self.a_opt = torch.optim.Adam(self.arch, 3e-4, (.5, .999), weight_decay=1e-3, **fused)
        self.w_opt = torch.optim.SGD(self.weights, .025, .9, weight_decay=3e-4, **fused)
    def loss(self, batch):
        x, y = batch
        if self.kind in MAKE: x = x.contiguous(memory_format=torch.channels_last)
        if self.kind == 'reference': return cross_entropy(reference_forward(self.net, x), y)
        return cross_entropy(self.recipe.logits(self.net, x, None), y)
    def half(self, batch, wanted, others):
        "Gradients in p.grad: all of them in the reference, else those of `wanted` only."
        if self.kind == 'reference':
            self.net.zero_grad()
            self.loss(batch).backward()
            return
        for p in others: p.requires_grad_(False)
        gradients = torch.autograd.grad(self.loss(batch), wanted)
        for p, g in zip(wanted, self.exchange(gradients) if self.exchange else gradients): p.grad = g
        for p in others: p.requires_grad_(True)
    def step(self, train, val):
        torch.set_num_threads(self.threads)
        self.half(val, self.arch, self.weights)
        self.a_opt.step()
        self.half(train, self.weights, self.arch)
        nn.utils.clip_grad_norm_(self.weights, 5)
        self.w_opt.step()
        self.net.zero_grad(set_to_none=True)

def gradients(side, batch):
    "Loss and gradients, without a trace on statistics."
    state = copy.deepcopy(side.net.state_dict())
    loss = side.loss(batch)
    grads = torch.autograd.grad(loss, [*side.arch, *side.weights])
    buffers = [b.clone() for b in side.net.buffers() if b.is_floating_point()]
    side.net.load_state_dict(state)
    return [loss.detach()], grads, buffers

def disagreement(space, dtype, device, kinds, batch=8):
    """Relative differences of the loss, of all gradients (in norm) and of batch-norm statistics (the largest):
    plain, fast and, where it is one of `kinds`, compiled against the reference in float64.

    In float32 also fast against plain in the same layout: with channels last PyTorch's own batch norm sums in another order,
    and ReLUs near zero flip."""
    with seeded(1): net, x = space.supernet(0).to(device), torch.randn(batch, *space.in_shape).to(device)
    def run(kind, dtype, layout=torch.contiguous_format):
        side = Side(kind, copy.deepcopy(net).to(dtype), torch.get_num_threads())
        side.net.to(memory_format=torch.channels_last if kind in MAKE else layout)
        return gradients(side, (x.to(dtype, memory_format=layout), torch.arange(batch, device=device) % 10))
    def gap(a, b):
        difference = sum((p.double() - q.double()).norm()**2 for p, q in zip(a[1], b[1]))**.5/sum(q.double().norm()**2 for q in b[1])**.5
        statistics = max(float((p.double() - q.double()).norm()/q.double().norm()) for p, q in zip(a[2], b[2]) if q.norm() > 1e-3)
        return dict(loss=abs(float(a[0][0]) - float(b[0][0])), gradients=float(difference), statistics=statistics)
    exact = run('reference', torch.float64)
    yield 'plain, contiguous', gap(run('plain', dtype), exact)
    yield 'plain, channels last', gap(plain := run('plain', dtype, torch.channels_last), exact)
    yield 'fast', gap(fast := run('fast', dtype), exact)
    yield 'fast against plain, channels last', gap(fast, plain)
    if 'compiled' in kinds: yield 'compiled', gap(run('compiled', dtype), exact)

# --- arithmetic -----------------------------------------------------------------------------------------------------------------------

def convolutions(net, x):
    "Every convolution of one plain forward pass: (module, input shape, multiply-adds)."
    seen, hooks = [], []
    def note(m, args, out): seen.append((m, tuple(args[0].shape), out.numel()*m.weight[0].numel()))
    for m in net.modules():
        if isinstance(m, nn.Conv2d): hooks.append(m.register_forward_hook(note))
    with torch.no_grad(): net(x)
    for h in hooks: h.remove()
    return seen

def peak_rate(calls, device, seconds=.3):
    "The best rate in GFLOP/s that a convolution of the list reaches, forward, channels last, over its largest shapes."
    best = 0.
    largest = sorted({(m.weight.shape, m.stride, m.padding, m.dilation, m.groups, shape): macs for m, shape, macs in calls}.items(),
                     key=lambda kv: -kv[1])[:12]
    for (w, stride, padding, dilation, groups, shape), macs in largest:
        w, x = (torch.randn(s, device=device).contiguous(memory_format=torch.channels_last) for s in (w, shape))
        end = time.perf_counter() + seconds/12
        while True:
            start = now(device)
            torch.conv2d(x, w, None, stride, padding, dilation, groups)
            best = max(best, 2e-9*macs/(now(device) - start))
            if time.perf_counter() > end: break
    return best

KINDS = {'convolution': ('mkldnn_convolution', 'convolution_backward', 'conv2d', '_conv_depthwise2d', 'nas_nb::winograd',
                         'nas_nb::winograd_filters'),
         'batch norm': ('native_batch_norm', 'native_batch_norm_backward'),
         'pooling': ('max_pool2d_with_indices', 'max_pool2d_with_indices_backward', 'avg_pool2d', 'avg_pool2d_backward'),
         'copies': ('cat', 'copy_', 'clone', 'constant_pad_nd', 'fill_'),
         'sums and products': ('add', 'add_', 'addcmul', 'mul', 'mul_', 'sum')}

def where_time_goes(side, data):
    "Shares of one step by kind of library call, each without what it calls."
    activity, on_gpu = torch.profiler.ProfilerActivity, data[0][0].is_cuda
    with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA]*on_gpu) as profile: side.step(*data)
    own = {e.key.removeprefix('aten::'): e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in profile.key_averages()}
    shares = {kind: sum(own.get(name, 0) for name in names)/sum(own.values()) for kind, names in KINDS.items()}
    return shares | {'rest': 1 - sum(shares.values())}

# --- memory -----------------------------------------------------------------------------------------------------------------------------

def status(key): return int(next(line for line in open('/proc/self/status') if line.startswith(key)).split()[1])/1024

def batches(space, batch, device='cpu'):
    with seeded(2): made = [(torch.randn(batch, *space.in_shape), torch.randint(0, 10, (batch,))) for _ in range(2)]
    return [(x.to(device), y.to(device)) for x, y in made]

def measure_peak(name, kind, batch, quick, threads, device):
    space = SPACES[name](quick)
    side, small, full = Side(kind, space.supernet(0).to(device), threads), batches(space, 2, device), batches(space, batch, device)
    side.step(*(full if kind in ('compiled', 'whole') else small))      # libraries load, and programs are written, before the count starts
    side.net.zero_grad(set_to_none=True)
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.step(*full)
        return print((torch.cuda.max_memory_allocated() - before)/2**20)
    ctypes.CDLL(None).malloc_trim(0)                                    # what the first step left with the allocator goes back
    open('/proc/self/clear_refs', 'w').write('5')
    before = status('VmRSS')
    side.step(*full)
    print(status('VmHWM') - before)

def peak(name, kind, batch, args):
    command = [sys.executable, os.path.abspath(__file__), '--peak', f'{name},{kind},{batch}', '--threads', str(args.threads),
               '--device', args.device] + ['--quick']*args.quick
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

# --- the table --------------------------------------------------------------------------------------------------------------------------

def now(device):
    "Seconds on a clock, after all that `device` was given is done."
    if device == 'cuda': torch.cuda.synchronize()
    return time.perf_counter()

def race(sides, data, rounds):
    "Medians in seconds of the sides' steps, taking turns, and the seconds of a first turn, which compiles and does not count."
    times = {label: [] for label in sides}
    device = data[0][0].device.type
    for turn in range(rounds + 1):
        for label, side in sides.items():
            start = now(device)
            side.step(*data)
            times[label].append(now(device) - start)
    return {label: float(np.median(t[1:])) for label, t in times.items()}, {label: t[0] for label, t in times.items()}

def half(rank, port, name, kind, quick, batch, rounds, times):
    """One of two data-parallel processes: steps on half a batch with one thread, begun together; gradients are averaged by gloo.

    As in every data-parallel run, batch norm sees the half of its own process."""
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    space = SPACES[name](quick)
    side, data = Side(kind, space.supernet(0), 1, exchange=average), batches(space, batch)
    mine = [(x[rank::2], y[rank::2]) for x, y in data]
    for turn in range(rounds + 1):
        distributed.barrier()
        start = time.perf_counter()
        side.step(*mine)
        if turn: times.put((turn, time.perf_counter() - start))
    distributed.destroy_process_group()

def average(gradients):
    "The mean of each gradient over the processes, in one exchange."
    flat = torch.cat([g.reshape(-1) for g in gradients])
    distributed.all_reduce(flat)
    return [part.view_as(g) for part, g in zip((flat/2).split([g.numel() for g in gradients]), gradients)]

def two_halves(name, kind, quick, batch, rounds):
    """Median seconds until the slower of two single-threaded processes has made a step,
    with half the batch each and their gradients averaged."""
    context, port = multiprocessing.get_context('spawn'), free_port()
    times = context.Queue()
    workers = [context.Process(target=half, args=(rank, port, name, kind, quick, batch, rounds, times)) for rank in range(2)]
    for w in workers: w.start()
    slowest = {}
    for _ in range(2*rounds):
        turn, seconds = times.get(timeout=900)
        slowest[turn] = max(seconds, slowest.get(turn, 0.))
    for w in workers: w.join()
    return float(np.median(list(slowest.values())))

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def rows(args):
    for name in args.space:
        space = SPACES[name](args.quick)
        kinds = ('fast', 'compiled', 'whole') if name == 'nb201' and not args.quick and can_compile() else ('fast',)
        for dtype in (torch.float64, torch.float32):
            for what, gaps in disagreement(space, dtype, args.device, kinds):
                yield dict(name=f'{name} disagreement {str(dtype)[6:]}: {what}', **gaps, unit='relative')
        for batch in (16,) if args.quick else (16, 64):
            with seeded(0): net = space.supernet(0).to(args.device)
            data, tried = batches(space, batch, args.device), sorted({1, args.threads})
            sides = {'reference': Side('reference', net, args.threads), 'plain': Side('plain', net, args.threads)}
            sides |= {f'{kind}, {t} threads': Side(kind, net, t) for kind in kinds for t in (tried if kind == 'fast' else tried[-1:])}
            halved = {f'{kind}, autocast': Side(kind, net, args.threads, autocast=True) for kind in kinds*args.autocast}
            seconds, first = race(sides | halved, data, args.rounds)
            for label in halved:
                mine = seconds.pop(label)
                for peer in ('reference', 'plain'):
                    yield dict(name=f'{name} autocast, batch {batch}', ours=mine, peer=seconds[peer], ratio=seconds[peer]/mine, unit='s',
                               n=args.rounds, against=peer, side=label)
            for kind in kinds[1:]:
                yield dict(name=f'{name} compilation, {kind}, batch {batch}', seconds=first[f'{kind}, {tried[-1]} threads'], unit='s')
            for label in seconds:
                if label not in ('reference', 'plain'): yield dict(name=f'{name} {label}, batch {batch}', seconds=seconds[label], unit='s')
            best = min((label for label in seconds if label not in ('reference', 'plain')), key=seconds.get)
            for peer in ('reference', 'plain'):
                yield dict(name=f'{name} step, batch {batch}', ours=seconds[best], peer=seconds[peer], ratio=seconds[peer]/seconds[best],
                           unit='s', n=args.rounds, against=peer, side=best)
            if not args.quick and args.device == 'cpu':
                for kind in kinds[:2]:
                    halves = two_halves(name, kind, args.quick, batch, args.rounds)
                    together = min(seconds[k] for k in seconds if k.startswith(kind))
                    yield dict(name=f'{name} two data-parallel halves, batch {batch}', ours=halves, peer=together,
                               ratio=together/halves, unit='s', n=args.rounds, against=f'{kind}, one process',
                               plain=seconds['plain']/halves, reference=seconds['reference']/halves)
            torch.set_num_threads(sides[best].threads)
            calls = convolutions(net, data[0][0])
            work, rate = 2e-9*sum(macs for _, _, macs in calls)*5, peak_rate(calls, args.device)   # 2 forward, 2 of x, 1 of weights
            yield dict(name=f'{name} floor, batch {batch}', GFLOP=work, GFLOPs=rate, seconds=work/rate,
                       share=work/rate/seconds[best], unit='s')
            yield dict(name=f'{name} time, batch {batch}', **where_time_goes(sides[best], data), unit='share')
            if not args.quick:
                ours = sides[best].kind
                memory = {kind: peak(name, kind, batch, args) for kind in ('reference', 'plain', ours)}
                for peer in ('reference', 'plain'):
                    yield dict(name=f'{name} memory, batch {batch}', ours=memory[ours], peer=memory[peer], ratio=memory[peer]/memory[ours],
                               unit='MB', n=1, against=peer, side=ours)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='small supernets, batch 16: under a minute')
    p.add_argument('--json', action='store_true', help='one JSON object a line')
    p.add_argument('--threads', type=int, default=torch.get_num_threads(),
                   help="threads of the reference and the plain path (PyTorch's default)")
    p.add_argument('--rounds', type=int, default=3, help='turns of every side')
    p.add_argument('--space', nargs='+', choices=SPACES, default=list(SPACES), help='which supernets')
    p.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='where all sides compute')
    p.add_argument('--autocast', action='store_true', help='our sides also in bfloat16')
    p.add_argument('--peak', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.peak:
        name, kind, batch = args.peak.split(',')
        return measure_peak(name, kind, int(batch), args.quick, args.threads, args.device)
    for row in rows(args):
        if args.json: print(json.dumps(row), flush=True)
        else:
            print('  '.join(f'{k} {v:.4g}' if isinstance(v, float) else str(v) if k in ('name', 'unit', 'side') else f'{k} {v}'
                            for k, v in row.items()), flush=True)

if __name__ == '__main__': main()
