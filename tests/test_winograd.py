"""The convolution kernels beyond their notebook: other processors, compilers that fail, two runs that compile at once."""
import os, subprocess, sys
import pytest
from nas_nb.ops.winograd import can_compile, winograd_lanes

needs_kernels = pytest.mark.skipif(not can_compile() or not winograd_lanes(), reason='no C++ compiler, or one that fails')

CHECK = '''
import torch
from torch.nn import functional as F
from nas_nb.ops.winograd import normalised_convs, winograd_lanes
for dtype, far in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
    C = 3*winograd_lanes(dtype)
    g = torch.Generator().manual_seed(0)
    x, *ws = (torch.randn(*s, generator=g, dtype=dtype, requires_grad=True) for s in ((3, C, 9, 6), (C, C, 3, 3), (C, C, 3, 3)))
    factors = torch.rand(2, generator=g, dtype=dtype, requires_grad=True)
    maps = normalised_convs(x, ws, factors)[0]
    want = [F.batch_norm(F.conv2d(x, w, padding=1), None, None, f.repeat(C), None, True) for w, f in zip(ws, factors)]
    results = [[*out, *torch.autograd.grad(sum(y.pow(4).sum() for y in out), [x, factors, *ws])] for out in (maps, want)]
    assert max(float(((a - b).norm()/b.norm()).detach()) for a, b in zip(*results)) < far, dtype
print(winograd_lanes(), flush=True)
'''

def start(code, folder, **env):
    return subprocess.Popen([sys.executable, '-W', 'ignore::DeprecationWarning', '-c', code], env=os.environ | env | dict(XDG_CACHE_HOME=str(folder)),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def result(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.split()[0], err

@needs_kernels
@pytest.mark.parametrize('capability', ['avx2', 'default'])
def test_narrower_vectors(capability, tmp_path):
    "What a processor without AVX-512, and one without AVX2, would compile."
    lanes, err = result(start(CHECK, tmp_path, ATEN_CPU_CAPABILITY=capability))
    assert int(lanes) <= winograd_lanes() and not err

@needs_kernels
def test_two_runs_compile_at_once(tmp_path):
    runs = [start(CHECK, tmp_path, OMP_NUM_THREADS=n) for n in '13']
    assert [result(run)[0] for run in runs] == [str(winograd_lanes())]*2
    assert len(list((tmp_path/'nas_nb').iterdir())) == 1                  # one library, nothing half done

@pytest.mark.parametrize('compiler', ['false', ''])
def test_without_a_compiler_there_are_no_kernels(compiler, tmp_path):
    "One that fails gives a warning and leaves nothing; none at all gives none."
    lanes, err = result(start('from nas_nb.ops.winograd import winograd_lanes; print(winograd_lanes(), flush=True)', tmp_path,
                              **(dict(CXX=compiler) if compiler else dict(CXX='', PATH=''))))
    assert lanes == '0' and ('failed' in err) == bool(compiler)
    assert not list(tmp_path.rglob('*.so'))

@needs_kernels
def test_a_broken_library_is_not_fatal(tmp_path):
    result(start(CHECK, tmp_path))
    file, = (tmp_path/'nas_nb').iterdir()
    file.write_bytes(b'not a library')
    lanes, err = result(start('from nas_nb.ops.winograd import winograd_lanes; print(winograd_lanes(), flush=True)', tmp_path))
    assert lanes == '0' and file.name in err
