"""The Triton kernels without a GPU: the interpreter's verdict, what they refuse, and which path a call takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genkit.attention import kernels
from genkit.attention.kernels import ops, serving, tiles

pytest.importorskip("triton")
HERE = Path(__file__).parent


def test_interpreted_kernels_are_dense_attention():
    """In a process of its own: Triton reads TRITON_INTERPRET when the kernels are imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "kernels_interpreted.py")]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def qkv(*, dtype=torch.float32, D=16, E=None):
    return torch.zeros(2, 3, 5, D, dtype=dtype), torch.zeros(2, 3, 7, D, dtype=dtype), torch.zeros(2, 3, 7, E or D, dtype=dtype)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (qkv(), "run on CUDA devices, and these tensors are on cpu.* attend_jvp choose a way that serves them"),
        (qkv(dtype=torch.float64), "float16, bfloat16 and float32, and q is float64"),
        (
            qkv(D=264, dtype=torch.float16),
            r"attend_probe take head dimensions up to 256 in float16, and q \(2, 3, 5, 264\) has 264",
        ),
        (qkv(D=72), r"head dimensions up to 64 in float32, and q \(2, 3, 5, 72\) has 72"),
        (qkv(E=24), r"as wide as queries, and q \(2, 3, 5, 16\) has 16, v \(2, 3, 7, 24\) 24"),
    ],
)
def test_what_the_kernels_do_not_serve_is_said(given, said):
    with pytest.raises(ValueError, match=said):
        kernels.attend_probe(*given)


def test_forward_mode_is_served_up_to_128():
    given = qkv(D=160, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"kernels of attend_jvp take head dimensions up to 128 in float16"):
        kernels.attend_jvp(*given, *given)
    given = qkv()
    with pytest.raises(ValueError, match="run on CUDA devices, and these tensors are on cpu"):
        kernels.attend_jvp(*given, *given)


def test_wrong_shapes_are_named():
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"H is 2 and 3 in q .*\(2, 2, 5, 16\)"):
        kernels.attend_probe(q[:, :2], k, v)
    with pytest.raises(ValueError, match=r"mask has the wrong rank: its shape is \(2, 5, 7\)"):
        kernels.attend_probe(q, k, v, mask=torch.zeros(2, 5, 7))
    with pytest.raises(ValueError, match="mask requires a gradient"):
        kernels.attend_probe(q, k, v, mask=torch.zeros(5, 7, requires_grad=True))
    with pytest.raises(ValueError, match="one floating dtype, but q is float16"):
        kernels.attend_probe(q.half(), k, v)
    with pytest.raises(ValueError, match="Key 7 is out of range: there are S = 7"):
        kernels.attend_probe(q, k, v, [0, 7])
    with pytest.raises(ValueError, match=r"keys are \(J,\) or \(B, J\) with B = 2, not \(3, 1\)"):
        ops.attend_probe(q, k, v, None, torch.zeros(3, 1, dtype=torch.long), 1.0)
    with pytest.raises(ValueError, match=r"tangent of k must be like k"):
        kernels.attend_jvp(q, k, v, q, q, v)


def test_shapes_are_known_without_running():
    """Fake implementations: what tracing sees, on any device."""
    with torch.device("meta"):
        q, k, v = qkv(dtype=torch.bfloat16)
        out, lse, entropy, heat = ops.attend_probe(q, k, v, None, torch.zeros(2, 4, dtype=torch.long), 1.0)
        primal, tangent, _ = ops.attend_jvp(q, k, v, q, k, v, None, 1.0)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype, entropy.shape) == ((2, 3, 5), torch.float32, (2, 3, 5))
    assert (heat.shape, heat.dtype) == ((2, 5, 4), torch.float32)
    assert primal.shape == tangent.shape == q.shape


def test_every_device_and_head_dimension_has_a_tile():
    for kernel in tiles.TABLE:
        most = tiles.HEAD_DIM_MAX["attend_jvp" if kernel == "tangent_forward" else "attend_probe"]
        for capability in (80, 86, 89, 90, 100, 103, 110, 120, 121):
            for itemsize, widest in most.items():
                for head_dim in {1, 40, 64, min(65, widest), min(160, widest), widest}:
                    tile = tiles.tile(kernel, capability, head_dim, itemsize)
                    assert min(tile.block_l, tile.block_s) >= 16
    with pytest.raises(ValueError, match=r"compute capability 7.5: 8.0 to 12.x are served"):
        tiles.tile("probe_forward", 75, 64, 2)


class OnGpu:
    """Seen from a machine without a GPU: a tensor on one."""

    shape, dtype, device, is_cuda = (1, 1, 1, 64), torch.float16, torch.device("cuda"), True


def test_without_triton_the_message_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert (
        serving.unserved("attend_probe", OnGpu(), OnGpu())
        == "The kernels need Triton, which is not installed (pip install triton)."
    )


def test_devices_that_are_served(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert serving.unserved("attend_probe", OnGpu(), OnGpu()) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert (
        serving.unserved("attend_probe", OnGpu(), OnGpu())
        == "The kernels take compute capability 8.0 to 12.x, and this device has 7.5."
    )
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert serving.unserved("attend_probe", OnGpu(), OnGpu()) == "The kernels run on CUDA devices, and these tensors are on rocm."
