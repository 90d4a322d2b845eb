"""Binary gates in supernets: one path runs, the others are asked; noise of each sample's own. What a search may count on."""
import pytest
import torch
from torch import nn
from nas_nb.relax.choice import Gumbel
from nas_nb.relax.paths import MODES, BinaryGate
from nas_nb.space.cells import nb201_space
from nas_nb.space.mini import mini_space

SPACES = dict(mini=mini_space, nb201=lambda: nb201_space(in_shape=(1, 12, 12), C=4, stages=2, cells=1))

def draw(net, mode, seed, samples=None):
    return net.arch.weights(BinaryGate(mode), training=True, generator=torch.Generator().manual_seed(seed), samples=samples)

def images(net, batch=8): return net.space.example(batch).to(next(net.parameters()).dtype)

def gradients(net, W):
    x = images(net)
    loss = net(x, W).pow(2).mean()
    params = [*net.arch_parameters(), *net.weight_parameters()]
    return loss.detach(), torch.autograd.grad(loss, params, allow_unused=True)

def unmark(W):
    "The same weights without the mark: every operation runs."
    return {k: w*1. for k, w in W.items()}

@pytest.mark.parametrize('samples', [None, 8])
@pytest.mark.parametrize('space', SPACES)
def test_a_gated_supernet_is_the_plain_one(space, samples):
    "Loss, gradient of the logits and of all that ran, in float64; what did not run has None, where the plain sum has zeros."
    net = SPACES[space]().supernet(0).double().train()
    start = {k: v.clone() for k, v in net.state_dict().items()}
    heard = 0
    for seed in range(4):
        results = []
        for mode, plain in (('full', True), ('full', False), ('recompute', False)):
            net.load_state_dict(start)
            W = draw(net, mode, seed, samples)
            results.append(gradients(net, unmark(W) if plain else W))
        (loss, grads), *gated = results
        heard += bool(grads[0].abs().sum() > 0)
        for other, found in gated:
            torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-12)
            for g, h in zip(grads, found):
                if h is None: assert g is None or not g.any(); continue
                torch.testing.assert_close(h, g, rtol=1e-9, atol=1e-12)
    assert heard >= 2                                # a draw that leads nowhere is the same image for all, and BatchNorm hears nothing

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('space', SPACES)
def test_only_the_path_moves(space, mode):
    "An optimiser with momentum and decay, and BatchNorm's statistics, leave alone what did not run."
    net = SPACES[space]().supernet(0).train()
    optimizer = torch.optim.SGD(net.weight_parameters(), .1, momentum=.9, weight_decay=.1)
    names, (group,) = net.space.op_names, net.arch.groups
    for seed in range(3):
        W = draw(net, mode, seed)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        optimizer.zero_grad(set_to_none=True)
        net(images(net), W).pow(2).mean().backward()
        optimizer.step()
        ran = tuple(f'choices.{row}.ops.{names[i]}.' for row, i in enumerate(W[group].argmax(-1).tolist()))
        moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
        assert moved and all(any(name in k for name in ran) for k in moved if '.choices.' in k)

@pytest.mark.parametrize('mode', ['recompute', 'two'])
def test_a_zero_operation_that_was_drawn_has_a_gradient(mode):
    net = mini_space().supernet(0).double().train()
    with torch.no_grad(): net.arch['cell'][[0, 1, 2], [0, 3, 0]] = 12.            # only the edge 0 -> 2 does something
    W = draw(net, mode, 0)
    assert W['cell'].argmax(-1).tolist() == [0, 3, 0]
    dW = torch.autograd.grad(net(images(net), W).pow(2).mean(), W['cell'])[0]
    heard = W['cell'].paths[1]
    assert dW.isfinite().all() and (dW[heard][:, None] != 0).sum() >= 2 and not dW[~heard].any() and not dW[:, 0].any()
    dense = torch.autograd.grad(net(images(net), unmark(W)).pow(2).mean(), W['cell'])[0]
    torch.testing.assert_close(dW, dense*heard, rtol=1e-9, atol=1e-12)

def test_dropout_hears_what_it_would_have_dropped():
    class Space(type(mini_space())):
        def __init__(self):
            super().__init__()
            plain = dict(self.ops)
            self.ops = {k: (lambda *a, k=k: plain[k](*a) if k == 'none' else nn.Sequential(nn.Dropout(.3), plain[k](*a))) for k in plain}
    net = Space().supernet(0).double().train()
    start, found = {k: v.clone() for k, v in net.state_dict().items()}, []
    with torch.random.fork_rng(devices=[]):
        for mode in ('full', 'recompute'):
            net.load_state_dict(start)
            torch.manual_seed(0)
            found.append(gradients(net, draw(net, mode, 1)))
    (a, ga), (b, gb) = found
    assert torch.equal(a, b)
    for g, h in zip(ga, gb):
        assert (g is None) == (h is None)
        if g is not None: torch.testing.assert_close(g, h, rtol=1e-9, atol=1e-12)

def test_memory_of_a_supernet_is_that_of_one_network():
    net = nb201_space(in_shape=(1, 12, 12), C=8, stages=1, cells=2).supernet(0).train()
    def kept(W):
        seen = {}
        def pack(t):
            if not isinstance(t, nn.Parameter): seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): y = net(images(net), W)
        return sum(seen.values()), y
    with torch.no_grad(): net.arch['cell'].zero_()[:, 3] = 9.                      # 3x3 convolutions on all edges
    gated, one = draw(net, 'recompute', 0), {'cell': torch.eye(5)[[3]*6]}
    assert torch.equal(gated['cell'].detach(), one['cell'])
    assert kept(gated)[0] < 1.75*kept(one)[0] and kept(unmark(gated))[0] > 2*kept(gated)[0]      # the path's gate keeps the path's output

def test_noise_of_each_samples_own():
    "A batch with a draw for each sample is the samples one by one with their draws."
    net = mini_space().supernet(0).eval()
    W = net.arch.weights(Gumbel(hard=True), generator=torch.Generator().manual_seed(0), samples=8)
    assert len({tuple(w.argmax(-1).tolist()) for w in W['cell']}) > 3
    x = images(net)
    together = net(x, W)
    for i in range(8): torch.testing.assert_close(net(x[i:i+1], {'cell': W['cell'][i]})[0], together[i], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="'cell'"): net(x[:5], W)

def test_every_registered_space_runs_gated():
    "In float64, over three draws: loss and gradients of all logits and of all that ran are those of the plain sum."
    from test_contracts import SPACES as registered
    for name, make in registered.items():
        net = make().supernet(0).double().train()
        x, start, heard = net.space.example(6), {k: v.clone() for k, v in net.state_dict().items()}, 0.
        if x.is_floating_point(): x = x.double()
        for seed in range(3):
            found = []
            for mode, plain in (('full', True), ('full', False), ('recompute', False)):
                net.load_state_dict(start)
                W = draw(net, mode, seed)
                loss = net(x, unmark(W) if plain else W).pow(2).mean()
                found.append((loss.detach(), torch.autograd.grad(loss, [*net.arch_parameters(), *net.weight_parameters()],
                                                                 allow_unused=True)))
            (loss, grads), *gated = found
            heard += sum(float(g.abs().sum()) for g in grads[:len(net.arch_parameters())] if g is not None)
            for other, theirs in gated:
                torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-12, msg=name)
                for g, h in zip(grads, theirs):
                    if g is None or h is None: assert all(v is None or not v.any() for v in (g, h)), name; continue
                    torch.testing.assert_close(h, g, rtol=1e-8, atol=1e-12, msg=name)
        assert heard > 0, name

def test_the_fast_supernet_runs_gates_as_the_plain_one():
    from nas_nb.space.fast import accelerate
    plain, quick = SPACES['nb201']().supernet(0).double().train(), accelerate(SPACES['nb201']().supernet(0).double().train())
    for seed in range(3):
        (a, ga), (b, gb) = (gradients(net, draw(net, 'recompute', seed)) for net in (plain, quick))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        for g, h in zip(ga, gb):
            assert (g is None) == (h is None)
            if g is not None: torch.testing.assert_close(h, g, rtol=1e-8, atol=1e-12)

def test_pairs_settle_where_operations_are_forbidden():
    "A space whose rows allow different operations: forbidden ones are never drawn nor heard, and a search moves no other probability."
    from nas_nb.core.data import load_task
    from nas_nb.search.driver import Budget, Plugin, run_search
    from nas_nb.space.darts import robust_space
    space = robust_space('s1', (1, 8, 8), 10, C=2, cells=3)
    class Look(Plugin):
        def epoch_start(self, s): self.old = {k: s.net.arch[k].detach().softmax(-1) for k in s.net.arch.groups}
        def after_a(self, s):
            for k, old in self.old.items():
                heard, new = s.W[k].paths[1], s.net.arch[k].detach().softmax(-1)
                assert not (heard & (old == 0)).any() and (old - new)[~heard].abs().max() < 3e-7 and not torch.equal(old, new)
            self.epoch_start(s)
    run_search(space.supernet(0), load_task('digits', limit=80), relax=BinaryGate('two'), budget=Budget(2, 16), plugins=[Look()])
