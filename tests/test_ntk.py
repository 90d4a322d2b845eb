"""The tangent kernel as a package: many random architectures against torch.func, memory that is kept, nothing left behind."""
import copy, math, os, subprocess, sys
import pytest, torch, torch.utils.checkpoint
from torch import nn
from torch.func import functional_call, jacrev, vmap
from nas_nb.lens.layer_factors import FactorPlan, sample_gradients
from nas_nb.lens.ntk import NTKSpectrum, kernel_regression, ntk, ntk_matvec, ntk_trace
from nas_nb.lens.ntk_cost import ntk_cost, ntk_many
from nas_nb.space.mini import mini_space

def by_jacobian(model, x1, x2):
    "The kernel by plain Jacobians, independent of the package."
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    rest = {k: t.detach() for k, t in (*model.named_parameters(), *model.named_buffers()) if k not in params}
    def f(p, x): return functional_call(model, {**p, **rest}, (x[None],))[0].reshape(-1)
    a, b = (vmap(jacrev(f), (None, 0))(params, x) for x in (x1, x2))
    return sum(torch.einsum('nok,mpk->nmop', a[k].flatten(2), b[k].flatten(2)) for k in params)

def random_network(seed):
    "A random stack of convolutions, norms and dense layers, some of it frozen, and its input shape."
    g = torch.Generator().manual_seed(seed)
    draw = lambda *options: options[int(torch.randint(len(options), (1,), generator=g))]
    nd, c = draw(1, 2), 4
    conv, norm, pool = ((nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d), (nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d))[nd - 1]
    layers = []
    for _ in range(draw(1, 2, 3)):
        width, groups = draw(4, 8, 16), draw(1, 2, 4)
        layers += [conv(c, width, draw(1, 2, 3), stride=draw(1, 2), padding=draw(1, 2), dilation=draw(1, 2), groups=groups,
                        bias=draw(True, False))]
        layers += [draw(norm(width), nn.GroupNorm(2, width), nn.Identity()), draw(nn.ReLU(inplace=True), nn.Tanh(), nn.GELU())]
        c = width
    layers += [pool(draw(1, 2)), nn.Flatten(), nn.LazyLinear(draw(3, 20)), nn.Tanh(), nn.LazyLinear(draw(1, 3))]
    model = nn.Sequential(*layers).double().eval()
    shape = (4, *(9,)*nd)
    model(torch.zeros(1, *shape, dtype=torch.float64))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)/math.sqrt(max(1, p[0].numel()))
    free = list(model.parameters())
    if draw(True, False): free[0].requires_grad_(False)
    return model, torch.randn(5, *shape, generator=g, dtype=torch.float64), torch.randn(3, *shape, generator=g, dtype=torch.float64)

@pytest.mark.parametrize('seed', range(16))
def test_random_networks(seed):
    model, x, z = random_network(seed)
    assert not FactorPlan(model, x).plain
    for other in (None, z):
        want = by_jacobian(model, x, x if other is None else other)
        scale = float(want.abs().max())
        diag = want.diagonal(dim1=2, dim2=3)
        for outputs, w in (('full', want), ('diag', diag), ('trace', diag.sum(-1))):
            assert (ntk(model, x, other, outputs, method='factored') - w).abs().max() <= 1e-11*scale
            for memory in (200_000, 1_000_000):
                try: assert (ntk(model, x, other, outputs, memory=memory) - w).abs().max() <= 1e-11*scale
                except ValueError as e: assert 'needs at least' in str(e)
    assert ntk_trace(model, x) == pytest.approx(float(torch.einsum('nnoo->', ntk(model, x))), rel=1e-10)
    v = torch.randn(len(z), want.shape[-1], dtype=torch.float64)
    torch.testing.assert_close(ntk_matvec(model, x, v, z), torch.einsum('nmop,mp->no', want, v), rtol=1e-9, atol=1e-9*scale)

def dense(*layers): return nn.Sequential(*layers).double()

def apart(model):
    "A copy in which nothing is overwritten, for autograd, which refuses some of it."
    model = copy.deepcopy(model)
    for m in model.modules():
        if hasattr(m, 'inplace'): m.inplace = False
    return model

ONE_OUTPUT = {
    'relu': lambda: dense(nn.Linear(5, 16), nn.ReLU(inplace=True), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 1)),
    'nested, no biases': lambda: dense(nn.Sequential(nn.Linear(5, 8, bias=False), nn.Tanh()), nn.Linear(8, 6, bias=False), nn.GELU(),
                                       nn.Linear(6, 1, bias=False)),
    'one layer': lambda: dense(nn.Linear(5, 1)),
    'no slope between': lambda: dense(nn.Linear(5, 4), nn.Linear(4, 3), nn.Identity(), nn.Dropout(.0), nn.Linear(3, 1)),
    'slopes upon slopes': lambda: dense(nn.Linear(5, 6), nn.Tanh(), nn.Hardtanh(.1, .6, inplace=True), nn.ELU(inplace=True),
                                        nn.Linear(6, 1)),
    'slope first': lambda: dense(nn.Tanh(), nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 1))}

@pytest.mark.parametrize('frozen', ['', '0.weight', '0.bias', '2.'])
@pytest.mark.parametrize('kind', ONE_OUTPUT)
def test_dense_stacks_with_one_output(kind, frozen):
    "The short way for them against Jacobians and against the general way, all kinds of output, one and several strips, nothing changed."
    torch.manual_seed(0)
    model = ONE_OUTPUT[kind]()
    if frozen:
        for k, p in model.named_parameters(): p.requires_grad_(not k.startswith(frozen))
    if not any(p.requires_grad for p in model.parameters()): pytest.skip('nothing left to train')
    x, z = torch.randn(140, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    before = x.clone()
    for a, b in ((x, None), (z, None), (x, z), (z, x)):
        want = by_jacobian(apart(model), a, a if b is None else b)
        scale = float(want.abs().max()) + 1e-300
        for outputs, w in (('full', want), ('diag', want[..., 0]), ('trace', want[..., 0, 0])):
            got = ntk(model, a, b, outputs)
            assert got.shape == w.shape and not got.requires_grad and (got - w).abs().max() <= 1e-11*scale
        assert (sum(ntk(model, a, b, layers=True).values()) - want).abs().max() <= 1e-11*scale
        try: assert (ntk(model, a, b, memory=40_000) - want).abs().max() <= 1e-11*scale
        except ValueError as e: assert 'needs at least' in str(e)
    assert torch.equal(x, before)
    single = ntk(model.float(), x.float(), outputs='trace').double()
    want = by_jacobian(apart(model.double()), x, x)[..., 0, 0]
    assert (single - want).abs().max() <= 1e-5*float(want.abs().max())

def test_dense_stacks_with_one_output_answer_bad_input():
    model, x = ONE_OUTPUT['relu'](), torch.randn(4, 5, dtype=torch.float64)
    bad = x.clone(); bad[2] = math.nan
    with pytest.raises(ValueError, match='sample 2 of x1'): ntk(model, bad)
    with pytest.raises(ValueError, match='sample 2 of x2'): ntk(model, x, bad)
    with pytest.raises(ValueError, match='random in train mode'): ntk(nn.Sequential(model, nn.Dropout(.5), nn.Linear(1, 1).double()), x)
    before = ntk(model, x)
    model[2].register_forward_hook(lambda m, args, h: 2*h)              # no longer what it seems
    assert (ntk(model, x) - by_jacobian(model, x, x)).abs().max() <= 1e-11*before.abs().max() and not torch.allclose(ntk(model, x), before)

STACKS = {
    'pools': (lambda: (nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                       nn.Conv2d(4, 4, 3, stride=2, padding=(1, 2), groups=2), nn.AvgPool2d((2, 3)),
                       nn.Flatten(), nn.Linear(4, 2)), (2, 9, 9)),
    'norms': (lambda: (nn.Conv2d(2, 4, 3, dilation=2), nn.BatchNorm2d(4, affine=False), nn.Hardswish(inplace=True), nn.GroupNorm(2, 4),
                       nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3),
                       nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 3)), (2, 8, 8)),
    'positions stay': (lambda: (nn.Conv1d(2, 4, 3, padding='same'), nn.Tanh(), nn.ELU(inplace=True),
                                nn.Conv1d(4, 2, 2, padding_mode='circular', padding=1)), (2, 6)),
    'three dimensions': (lambda: (nn.Conv3d(1, 3, 2, stride=2), nn.BatchNorm3d(3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
                                  nn.Linear(3, 2)), (1, 5, 4, 4))}

@pytest.mark.parametrize('kind', STACKS)
def test_back_through_every_layer(kind):
    "The loop through a plain stack against Jacobians: pools, norms, every kind of convolution, layers that overwrite."
    torch.manual_seed(0)
    layers, shape = STACKS[kind]
    model = dense(*layers()).eval()
    for m in model:
        if getattr(m, 'running_var', None) is not None: m.running_var.uniform_(.5, 2); m.running_mean.normal_()
    x, z = torch.randn(5, *shape, dtype=torch.float64), torch.randn(3, *shape, dtype=torch.float64)
    assert FactorPlan(model, x).chain
    for other in (None, z):
        want = by_jacobian(apart(model), x, x if other is None else other)
        for memory in (2**30, 150_000):
            try: assert (ntk(model, x, other, memory=memory) - want).abs().max() <= 1e-11*float(want.abs().max())
            except ValueError as e: assert memory == 150_000 and 'needs at least' in str(e)

@pytest.mark.parametrize('batch', [1, 2, 3, 7])
def test_few_samples(batch):
    model, x, _ = random_network(3)
    x = x.repeat(2, *(1,)*(x.dim() - 1))[:batch]
    torch.testing.assert_close(ntk(model, x), by_jacobian(model, x, x), rtol=1e-10, atol=1e-10)

def test_more_samples_than_a_tile():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    x = torch.randn(600, 4, dtype=torch.float64)
    K = ntk(model, x)
    torch.testing.assert_close(K[590:, :10], by_jacobian(model, x[590:], x[:10]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(K[:10, 590:], by_jacobian(model, x[:10], x[590:]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ntk(model, x, memory=2_600_000), K, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ntk(model, x, outputs='trace'), torch.einsum('nmoo->nm', K), rtol=1e-10, atol=1e-10)

def test_nothing_is_left_behind():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    bad = x.clone(); bad[4] = float('inf')
    with pytest.raises(ValueError, match='sample 4 of x1'): ntk(model, bad)
    with torch.no_grad(): a = ntk(model, x)
    with torch.inference_mode(): b = ntk(model, x)
    with torch.autocast('cpu', torch.bfloat16): c = ntk(model, x)
    assert torch.equal(a, b) and torch.equal(a, c) and a.dtype == torch.float32 and not a.requires_grad
    assert torch.equal(state, torch.get_rng_state()) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not model[0].weight.requires_grad
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules()) and model.training

def test_a_model_that_routes_takes_the_plain_way():
    "Which layers run depends on the samples, one by one or a whole chunk at a time: right, or an error, never wrong."
    class Router(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        def forward(self, x):
            left = (x[:, 0] > 0)[:, None]
            return self.c(torch.where(left, torch.tanh(self.a(x)), torch.tanh(self.b(x))) if bool(left.any()) else torch.tanh(self.b(x)))
    torch.manual_seed(0)
    model, x = Router().double(), torch.randn(6, 3, dtype=torch.float64)
    x[:3, 0] = -x[:3, 0].abs(); x[3:, 0] = x[3:, 0].abs()
    ps, rows = list(model.parameters()), []
    for n in range(6):
        for o in range(2):
            grads = torch.autograd.grad(model(x[n:n + 1])[0, o], ps, allow_unused=True)
            rows.append(torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(ps, grads)]))
    J = torch.stack(rows).view(6, 2, -1)
    torch.testing.assert_close(ntk(model, x), torch.einsum('nok,mpk->nmop', J, J), rtol=1e-10, atol=1e-10)

def test_checkpoint_and_custom_functions():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): ctx.save_for_backward(x); return x*x
        @staticmethod
        def backward(ctx, g): return 2*ctx.saved_tensors[0]*g
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        def forward(self, x):
            h = torch.utils.checkpoint.checkpoint(lambda h: torch.tanh(self.a(h)), Square.apply(x), use_reentrant=False)
            return self.b(h)
    torch.manual_seed(0)
    model, x = Odd().double(), torch.randn(4, 3, dtype=torch.float64)
    simple = nn.Sequential(model.a, nn.Tanh(), model.b)
    torch.testing.assert_close(ntk(model, x), by_jacobian(simple, x*x, x*x), rtol=1e-10, atol=1e-10)

def test_spectrum_and_regression_of_one_kernel():
    model, x, z = random_network(5)
    K, Kt = ntk(model, x), ntk(model, z, x)
    s = NTKSpectrum(K)
    assert s.trace == pytest.approx(ntk_trace(model, x), rel=1e-9) and (s.eigenvalues[:-1] >= s.eigenvalues[1:]).all() and s.condition >= 1
    y = torch.randn(len(x), K.shape[-1], dtype=torch.float64)
    assert kernel_regression(K, y, Kt, ridge=1.).shape == (len(z), K.shape[-1])
    G = torch.cat([g.flatten(2) for g in sample_gradients(model, x).values()], 2).flatten(0, 1)
    H = torch.cat([g.flatten(2) for g in sample_gradients(model, z).values()], 2).flatten(0, 1)
    w = G.T @ torch.linalg.solve(G @ G.T + torch.eye(len(G), dtype=torch.float64), y.flatten())
    torch.testing.assert_close(kernel_regression(K, y, Kt, ridge=1.).flatten(), H @ w, rtol=1e-8, atol=1e-8)

def test_memory_is_kept():
    "Peak memory of the process beyond the result stays near what was allowed (a fresh process; Linux)."
    if not os.path.exists('/proc/self/clear_refs'): pytest.skip('needs /proc')
    code = '''
import torch; from torch import nn; from nas_nb.lens.ntk import ntk
torch.set_num_threads(1)
status = lambda key: int(next(l for l in open('/proc/self/status') if l.startswith(key)).split()[1])/1024
model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
                      nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
x = torch.randn(48, 3, 32, 32); ntk(model, x[:2])
try: open('/proc/self/clear_refs', 'w').write('5')
except OSError: print(-1); raise SystemExit
before = status('VmRSS'); ntk(model, x, memory=32*2**20); print(status('VmHWM') - before)
'''
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=root)
    used = float(done.stdout)
    if used < 0: pytest.skip('the high-water mark cannot be reset here')
    assert used < 1.5*32 + 8, used

@pytest.mark.parametrize('seed', range(0, 16, 3))
def test_three_methods_one_kernel(seed):
    model, x, z = random_network(seed)
    for other in (None, z):
        want = ntk(model, x, other, method='jacobian')
        equal = want.diagonal(dim1=2, dim2=3)
        for outputs, kernel in dict(full=want, diag=equal, trace=equal.sum(-1)).items():
            for memory in (2**30, 2_000_000):
                got = ntk(model, x, other, outputs, method='ntvp', memory=memory)
                torch.testing.assert_close(got, kernel, rtol=1e-9, atol=1e-10*float(want.abs().max()))

def test_a_mean_that_only_some_samples_take():
    "Sensitivities are products of head and position for the first samples, and not for later ones: the short cut must notice."
    class Late(nn.Module):
        def __init__(self): super().__init__(); self.body, self.head = nn.Conv1d(2, 4, 3, padding=1), nn.Linear(4, 3)
        def forward(self, x):
            h = torch.tanh(self.body(x))
            mixed = h.flip(1)*h.roll(1, 1)                              # channels interact where the sample says so
            return self.head(torch.where((x[:, :1, :1] > 0), mixed, h).mean(2))
    torch.manual_seed(0)
    model, x = Late().double(), torch.randn(40, 2, 9, dtype=torch.float64)
    x[:, 0, 0] = -x[:, 0, 0].abs(); x[30:, 0, 0] = 1
    assert FactorPlan(model, x).channelwise == {'body.weight', 'body.bias'}
    want = by_jacobian(model, x, x)
    for outputs, w in (('full', want), ('trace', torch.einsum('nmoo->nm', want)), ('diag', want.diagonal(dim1=2, dim2=3))):
        torch.testing.assert_close(ntk(model, x, outputs=outputs), w, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(ntk(model, x[:30], outputs=outputs), w[:30, :30], rtol=1e-9, atol=1e-10)
    assert ntk_trace(model, x) == pytest.approx(float(torch.einsum('nnoo->', want)), rel=1e-9)

def test_many_outputs_without_a_rule_go_by_products():
    "A plain parameter and many outputs: `auto` takes kernel-vector products for it, and the sum is right."
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w, self.b = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 60)), nn.Linear(60, 40)
        def forward(self, x): return self.b(torch.tanh(torch.tanh(self.a(x)) @ self.w))
    torch.manual_seed(0)
    model, x = Scaled().double(), torch.randn(5, 4, dtype=torch.float64)
    want = by_jacobian(model, x, x)
    for outputs, w in (('full', want), ('trace', torch.einsum('nmoo->nm', want))):
        torch.testing.assert_close(ntk(model, x, outputs=outputs), w, rtol=1e-9, atol=1e-9)
    parts = ntk(model, x, layers=True)
    assert not any(p.requires_grad for p in parts.values())
    assert set(parts) == {'a.weight', 'a.bias', 'w', 'b.weight', 'b.bias'}
    torch.testing.assert_close(sum(parts.values()), want, rtol=1e-9, atol=1e-9)

def test_many_networks_are_the_loop():
    nets = [random_network(3)[0] for _ in range(3)]
    x = random_network(3)[1]
    for i, m in enumerate(nets):
        for p in m.parameters(): p.data = p.data*(1 + .1*i)
    for outputs in ('full', 'diag', 'trace'):
        one_by_one = torch.stack([ntk(m, x, outputs=outputs) for m in nets])
        torch.testing.assert_close(ntk_many(nets, x, outputs), one_by_one, rtol=1e-9, atol=1e-9)
    def attend(): return nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True)
    attention = [nn.Sequential(attend(), nn.Flatten(), nn.Linear(40, 2)).double().eval() for _ in range(2)]
    y = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(ntk_many(attention, y), torch.stack([ntk(m, y) for m in attention]), rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize('kind', ['log_cond', 'trace'])
def test_a_cost_of_relaxed_weights(kind):
    "The gradient of the cost of a mini supernet in its relaxed weights, against central differences, in float64."
    net = mini_space().supernet(seed=0).double().eval()
    x = torch.randn(4, 1, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    W = {g: net.arch[g].detach().softmax(-1).requires_grad_() for g in net.arch.groups}
    cost = ntk_cost(net, x, kind, args=(W,))
    grads = dict(zip(W, torch.autograd.grad(cost, list(W.values()))))
    for g in W:
        for i in ((0, 0), (1, 3), (2, 2)):
            def at(h):
                moved = {k: w.detach().clone() for k, w in W.items()}
                moved[g][i] += h
                return ntk_cost(net, x, kind, args=(moved,)).item()
            assert float(grads[g][i]) == pytest.approx((at(1e-5) - at(-1e-5))/2e-5, rel=1e-4, abs=1e-6*(1 + abs(float(cost.detach()))))
    own = ntk_cost(net, x, kind)
    assert own.item() == pytest.approx(cost.item(), rel=1e-9)
    own.backward()
    assert all(p.grad is not None for p in net.arch_parameters()) and all(p.grad is None for p in net.weight_parameters())

def small_stack():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
                          nn.Sequential(nn.Conv2d(4, 4, 3, stride=2), nn.Tanh()),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5), nn.Linear(5, 2)).double().eval()
    return model, torch.randn(4, 2, 7, 7, dtype=torch.float64)

class Doubled(nn.Linear):
    "A class of its own."
    def forward(self, x): return 2*super().forward(x)

class Exponential(nn.Module):
    def forward(self, w): return w.exp()

def _edit_weights(m): m[0].weight.data.mul_(3.)
def _edit_stride(m): m[3][0].stride = (1, 1)
def _edit_layer(m): m[6] = nn.Linear(4, 5).double()
def _edit_more(m): m.insert(1, nn.Conv2d(4, 4, 1).double())
def _edit_frozen(m): m[0].weight.requires_grad_(False); m[6].bias.requires_grad_(False)
def _edit_last(m): m[7].requires_grad_(False)
def _edit_hook(m): m[6].register_forward_hook(lambda mod, args, h: h*h)
def _edit_outer_hook(m): m[3].register_forward_pre_hook(lambda mod, args: (args[0]*2,))
def _edit_own_hook(m): m.register_forward_hook(lambda mod, args, h: torch.sin(h))
def _edit_forward(m): m[6].forward = lambda x: torch.nn.functional.linear(x, m[6].weight.tanh(), m[6].bias)
def _edit_class(m): m[6] = Doubled(4, 5).double()
def _edit_parametrised(m): nn.utils.parametrize.register_parametrization(m[6], 'weight', Exponential())
def _edit_tied(m): m.insert(7, nn.Linear(5, 5).double()); m.insert(8, nn.Linear(5, 5).double()); m[8].weight = m[7].weight

@pytest.mark.parametrize('edit', [f for k, f in sorted(globals().items()) if k.startswith('_edit_')], ids=lambda f: f.__name__[6:])
def test_a_stack_that_is_changed_between_calls(edit):
    "Nothing of an earlier call is remembered: what was proved by structure is proved again."
    model, x = small_stack()
    before = ntk(model, x)
    torch.testing.assert_close(before, by_jacobian(model, x, x), rtol=1e-12, atol=1e-12*float(before.abs().max()))
    edit(model)
    after = ntk(model, x)
    want = by_jacobian(model, x, x)
    torch.testing.assert_close(after, want, rtol=1e-11, atol=1e-12*float(want.abs().max()))
    assert (after - before).abs().max() > 1e-6*before.abs().max()

def test_a_stack_whose_mode_changes():
    model, x = small_stack()
    K = ntk(model, x)
    model.train()
    with pytest.raises(ValueError, match="'1' .BatchNorm2d. is in train mode"): ntk(model, x)
    torch.testing.assert_close(ntk(model.eval(), x), K, rtol=0, atol=0)
    model.insert(3, nn.Dropout(.5)); model.eval()
    torch.testing.assert_close(ntk(model, x), K, rtol=1e-12, atol=1e-12)
    model[3].train()
    with pytest.raises(ValueError, match='random'): ntk(model, x)

def test_the_structure_says_what_the_trial_says():
    "Random stacks, as they are and inside a module that hides them: one kernel, one set of ruled and channelwise parameters."
    class Hidden(nn.Module):
        def __init__(self, stack): super().__init__(); self.stack = stack
        def forward(self, x): return self.stack(x)
    for seed in range(8):
        model, x, _ = random_network(seed)
        a, b = FactorPlan(model, x), FactorPlan(Hidden(model), x)
        plain = lambda names: {k.removeprefix('stack.') for k in names}
        assert a.chain and not b.chain and set(a.ruled) == plain(b.ruled) and a.outputs == b.outputs and a.signature == b.signature
        convs = {k for k in model.state_dict() if isinstance(model.get_submodule(k.split('.')[0]), (nn.Conv1d, nn.Conv2d))}
        assert a.channelwise == plain(b.channelwise) & convs              # a dense layer has no positions to save
        torch.testing.assert_close(ntk(model, x), ntk(Hidden(model), x), rtol=1e-12, atol=1e-12)

def test_stacks_the_structure_does_not_prove():
    "A convolution without a batch axis, a softmax over samples, a layer that runs twice: not by structure."
    first = nn.Linear(4, 4)
    assert not FactorPlan(nn.Sequential(first, nn.Tanh(), first), torch.randn(3, 4)).chain
    assert not FactorPlan(nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)), torch.randn(3, 4)).chain
    assert FactorPlan(nn.Sequential(first, nn.Softmax(1)), torch.randn(3, 4)).ruled == ['0.weight', '0.bias']
    with pytest.raises(ValueError, match='other samples'): FactorPlan(nn.Sequential(nn.Linear(4, 4), nn.Softmax(0)), torch.randn(3, 4))
    with pytest.raises((RuntimeError, TypeError, ValueError)): ntk(nn.Sequential(nn.Conv2d(3, 3, 3)), torch.randn(3, 5, 5))
