"""T convolutions 3x3 of one map with C channels, the batch norm of each and its weight, as in the edges of a NAS-Bench-201 node:
our kernels against PyTorch's (oneDNN) convolution and batch norm, channels last, taking turns.

    python bench/winograd.py [--quick] [--json] [--threads 2] [--batch 64] [--rounds 15]

'forward': the maps; 'architecture': forward, then the gradient in the input and the weights; 'weights':
forward, then the gradient in the input and the filters. The library's side is run edge by edge and as one convolution with T*C outputs,
and the faster one counts. Least times; 'error' is relative to float64, of the forward pass."""
import argparse, json, time
import torch
from torch.nn import functional as F
from nas_nb.ops.winograd import normalised_convs

SHAPES = ((16, 32), (32, 16), (64, 8))

def separate(x, ws, factors):
    return [F.batch_norm(F.conv2d(x, w, padding=1), None, None, f.repeat(len(w)), None, True) for w, f in zip(ws, factors)]

def joint(x, ws, factors):
    y = F.conv2d(x, torch.cat(ws), padding=1)
    return F.batch_norm(y, None, None, factors.repeat_interleave(x.shape[1]), None, True).chunk(len(ws), 1)

def ours(x, ws, factors): return normalised_convs(x, ws, factors)[0]

SIDES = {'ours': ours, 'separate': separate, 'joint': joint}

def work(side, kind, x, ws, factors, grads):
    wanted = {'forward': (), 'architecture': (x, factors), 'weights': (x, *ws)}[kind]
    for t in (x, factors, *ws): t.requires_grad_(False)
    for t in wanted: t.requires_grad_(True)
    maps = side(x, ws, factors)
    if wanted: torch.autograd.grad(maps, wanted, grads)

def data(C, size, T, batch):
    g = torch.Generator().manual_seed(0)
    def some(*shape): return torch.randn(*shape, generator=g).contiguous(memory_format=torch.channels_last)
    return some(batch, C, size, size), [some(C, C, 3, 3)/(3*C**.5) for _ in range(T)], torch.rand(T, generator=g), [
        some(batch, C, size, size) for _ in range(T)]

@torch.no_grad()
def error(side, x, ws, factors, grads):
    exact = separate(x.double(), [w.double() for w in ws], factors.double())
    return max(float((a - b).norm()/b.norm()) for a, b in zip(side(x, ws, factors), exact))

def rows(args):
    for C, size in SHAPES:
        for T in (1, 3) if args.quick else (1, 2, 3):
            args_of = data(C, size, T, args.batch)
            for kind in ('forward', 'architecture', 'weights'):
                times = {name: [] for name in SIDES}
                for turn in range(args.rounds + 1):
                    for name, side in SIDES.items():
                        start = time.perf_counter()
                        work(side, kind, *args_of)
                        if turn: times[name].append(time.perf_counter() - start)
                best = {name: min(t) for name, t in times.items()}
                peer = min(('separate', 'joint'), key=best.get)
                yield dict(name=f'{kind}, C {C}, {size} x {size}, T {T}, batch {args.batch}', kind=kind, C=C, size=size, T=T, batch=args.batch,
                           ours=best['ours'], peer=best[peer], ratio=best[peer]/best['ours'], unit='s', n=args.rounds, against=peer)
            yield dict(name=f'error, C {C}, T {T}', C=C, T=T, ours=error(ours, *args_of), peer=error(separate, *args_of), unit='relative')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='one and three edges, five rounds')
    p.add_argument('--json', action='store_true', help='one JSON object a line')
    p.add_argument('--threads', type=int, default=torch.get_num_threads(), help="threads of all sides (PyTorch's default)")
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--rounds', type=int, default=15, help='turns of every side')
    args = p.parse_args()
    if args.quick: args.rounds = min(args.rounds, 5)
    torch.set_num_threads(args.threads)
    for row in rows(args):
        print(json.dumps(row) if args.json else '  '.join(f'{k} {v:.3g}' if isinstance(v, float) else f'{v}' for k, v in row.items()
                                                            if k not in ('kind', 'C', 'size', 'T', 'batch')), flush=True)

if __name__ == '__main__': main()
