"""Kernels of infinite width and the discriminators made of them: dtypes, devices, the registry, scikit-learn's clone,
nothing left behind."""
import math
import pytest, torch
from sklearn.base import clone
from torch import nn
from nas_nb.lens.ntk_gan import EmpiricalKernel, GeneratorFlow, infinite_kernel, kernel_discriminator, particle_flow, sinkhorn_divergence
from nas_nb.lens.ntk_infinite import (DUAL_ACTIVATIONS, DeepKernelClassifier, DualActivation, HermiteActivation, InfiniteNet,
                                      deep_nngp, finite_network, infinite_ntk, nngp, optimal_activation, quadrature_dual)

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'))]

def points(n, d=3, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('act', [*DUAL_ACTIVATIONS, HermiteActivation([0, .5, .5])], ids=str)
def test_float32_agrees_with_float64_and_keeps_its_dtype(act, device):
    spec, x, z = InfiniteNet(act, 2, 1.2, .3), points(5), points(4, seed=1)
    for kernel in (nngp, infinite_ntk):
        K = kernel(x.float().to(device), z.float().to(device), spec)
        assert K.dtype == torch.float32 and K.device.type == device
        assert torch.allclose(K.double().cpu(), kernel(x, z, spec), rtol=1e-4, atol=1e-4)

def test_own_activation_by_name(monkeypatch):
    square = DualActivation('square', torch.square, lambda a, b, c: a*b + 2*c*c, lambda a, b, c: 4*c)
    monkeypatch.setitem(DUAL_ACTIVATIONS, 'square', square)
    x = points(4)
    assert torch.allclose(infinite_ntk(x, None, InfiniteNet('square')), infinite_ntk(x, None, InfiniteNet(torch.square)), rtol=1e-9)

def test_quadrature_gradient_at_equal_points():
    x = points(3).requires_grad_()
    grads = [torch.autograd.grad(infinite_ntk(x, None, InfiniteNet(a)).sum(), x)[0] for a in ('gelu', lambda t: nn.functional.gelu(t))]
    assert torch.allclose(*grads, rtol=1e-4)

def test_zero_variance():
    zero = torch.zeros(1, dtype=torch.float64)
    assert float(quadrature_dual(torch.cos, zero, zero, zero)) == pytest.approx(1)
    assert float(quadrature_dual(torch.relu, zero, zero, zero, kinks=(0.,))) == 0

def test_depth_of_a_thousand_layers_and_no_layer():
    rho = torch.tensor([-.9, 0., .5, 1 - 1e-12, 1.])
    sign, log = deep_nngp(rho, HermiteActivation([0, 0, 1.]), 1000)
    assert log[2] == pytest.approx(2.**1000*math.log(.5)) and log[4] == 0 and sign[0] == 1 and log[1] == -math.inf
    sign, log = deep_nngp(rho, optimal_activation(2), 5000)
    assert not log.isnan().any() and log[2] < -3000
    assert torch.allclose(torch.mul(*[f(t) for f, t in zip((torch.sign, torch.exp), deep_nngp(rho, 'erf', 0))]), rho.double())

def test_classifier_is_cloned_and_takes_any_labels():
    x = nn.functional.normalize(points(40), dim=1)
    y = [('left', 'middle', 'right')[int(v > -.3) + int(v > .3)] for v in x[:, 0]]
    first, second = (clone(DeepKernelClassifier('erf', depth=5)).fit(x, y) for _ in range(2))
    assert list(first.predict(x)) == y and (first.decision_function(x) == second.decision_function(x)).all()
    assert first.decision_function(x).shape == (40, 3) and first.score(x, y) == 1
    with pytest.raises(ValueError, match='3'): first.predict(x[:, :2]/x[:, :2].norm(dim=1, keepdim=True))

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('loss', ['ipm', 'lsgan', 'vanilla'])
def test_flow_repeats_and_leaves_its_input(loss, device):
    fake, real = points(9, dtype=torch.float32).to(device), points(8, seed=1, dtype=torch.float32).to(device)
    before = fake.clone()
    a, b = (particle_flow(fake, real, infinite_kernel(), loss, 10., 3, batch=5, seed=2) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(fake, before) and not fake.requires_grad and a.device.type == device
    assert not torch.equal(a, particle_flow(fake, real, infinite_kernel(), loss, 10., 3, batch=5, seed=3))

def test_empirical_kernel_leaves_the_network_alone():
    net = finite_network(InfiniteNet('relu', 1, 1., 1.), 3, 8)
    net[0].linear.weight.requires_grad_(False)
    f = kernel_discriminator(EmpiricalKernel(net), points(5, dtype=torch.float32), points(4, seed=1, dtype=torch.float32), 'lsgan')
    f(points(6, dtype=torch.float32).requires_grad_()).sum().backward()
    assert all(p.grad is None for p in net.parameters()) and [p.requires_grad for p in net.parameters()] == [False, True]

def test_generator_step_reports_its_objective():
    gen, z, real = nn.Linear(2, 3), points(6, 2, dtype=torch.float32), points(7, dtype=torch.float32)
    fake = gen(z).detach()
    value = GeneratorFlow(gen, infinite_kernel()).step(z, real)
    assert value == pytest.approx(float(kernel_discriminator(infinite_kernel(), fake, real)(fake).mean()), rel=1e-4)
    assert not torch.equal(gen(z), fake)

def test_sinkhorn_is_symmetric_and_positive():
    x, y = points(20), points(15, seed=1) + .5
    assert sinkhorn_divergence(x, y) == pytest.approx(sinkhorn_divergence(y, x), rel=1e-3) and sinkhorn_divergence(x, y) > 0
