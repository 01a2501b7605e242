"""Chunks and recomputed gradients change how the update works, never what it does."""

import pytest
import torch

import train.step.dead as dead
import train.step.selection as selection
import train.step.update as update
from train.step.backend import CPU, Machine, choose_backend, costs, gpu_costs
from train.step.dense import dense_gradients
from train.step.sparse_acts import SparseActs
from train.step.step import StepSettings, StepState, TrainStep

D_IN, D_OUT, D_SAE, BATCH = 12, 10, 48, 32
SETTINGS = StepSettings(
    group_sizes=(6, 10, 12, 20), k=5, k_aux=7, dead_after_tokens=64, target_variance=10.0, precision="fp32"
)


def make_state() -> StepState:
    g = torch.Generator().manual_seed(0)
    b_enc = torch.zeros(D_SAE)
    b_enc[::2] = -3.0
    return StepState.create(
        W_enc=torch.randn(D_SAE, D_IN, generator=g),
        b_enc=b_enc,
        W_dec=torch.nn.functional.normalize(torch.randn(D_SAE, D_OUT, generator=g), dim=1),
        b_dec=torch.zeros(D_OUT),
    )


def trained(backend: str, clip_norm: float = 0.05) -> StepState:
    state = make_state()
    settings = StepSettings(
        **{
            **{f: getattr(SETTINGS, f) for f in SETTINGS.__dataclass_fields__},
            "backend": backend,
            "clip_norm": clip_norm,
        }
    )
    step = TrainStep(settings, state, "cpu")
    g = torch.Generator().manual_seed(1)
    for _ in range(8):
        step(torch.randn(BATCH, D_IN, generator=g), torch.randn(BATCH, D_OUT, generator=g), lr=1e-2)
    return state


@pytest.mark.parametrize("chunk", [10, 130, 1 << 20])
def test_recomputing_gradients_gives_the_same_bits_as_keeping_them(monkeypatch, chunk):
    monkeypatch.setattr(update, "CHUNK_ELEMENTS", chunk)
    kept = trained("sparse").tensors()
    monkeypatch.setattr(update, "KEPT_GRADIENT_BYTES", 0)
    again = trained("sparse").tensors()
    for name, tensor in kept.items():
        assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_chunks_and_tiles_change_rounding_only(monkeypatch, backend):
    whole = trained(backend).tensors()
    monkeypatch.setattr(update, "CHUNK_ELEMENTS", 35)
    monkeypatch.setattr(selection, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(dead, "TILE_ELEMENTS", 3 * BATCH)
    pieces = trained(backend).tensors()
    for name, tensor in whole.items():
        torch.testing.assert_close(pieces[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("n_dead", [1, 3, 7, 8, 30])
def test_dead_entries_equal_one_topk_over_the_dead_columns(monkeypatch, n_dead):
    monkeypatch.setattr(dead, "TILE_ELEMENTS", 4 * BATCH)
    g = torch.Generator().manual_seed(2)
    state, x = make_state(), torch.randn(BATCH, D_IN, generator=g)
    latents = torch.randperm(D_SAE, generator=g)[:n_dead].sort().values
    pre = torch.addmm(state.b_enc, x, state.W_enc.T)
    masked = torch.full_like(pre, -torch.inf).index_copy(1, latents, pre[:, latents])
    want = masked.topk(min(7, n_dead), dim=1).indices.sort(dim=1).values
    got = dead.select_dead(x, state.W_enc, state.b_enc, latents, 7)
    assert torch.equal(got.latents.view(BATCH, -1).sort(dim=1).values.long(), want)
    assert torch.equal(got.rows, torch.arange(BATCH).repeat_interleave(want.shape[1]).int())
    torch.testing.assert_close(got.acts, pre[got.rows.long(), got.latents.long()])


def test_cost_model_is_its_written_formula_and_picks_the_cheaper():
    both = costs(CPU, d_in=3, d_out=5, d_sae=7, k=2, batch=11)
    assert both["dense"] == pytest.approx((3 * 5 + 3) * 2 * 11 * 7 / CPU.gemm_flops)
    assert both["sparse"] == pytest.approx((3 * 5 + 3) * 4 * 11 * 2 / CPU.gather_bytes)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    wide = {"low": None, "d_in": 640, "d_out": 640, "k": 64, "batch": 2048}
    assert choose_backend(cpu, d_sae=10240, **wide) == "sparse"
    assert choose_backend(cpu, d_sae=64, **wide) == "dense"
    gemma = {"low": torch.bfloat16, "d_in": 2304, "d_out": 2304, "k": 96, "batch": 4096}
    assert choose_backend(cuda, d_sae=18432, **gemma) == "dense"
    assert choose_backend(cuda, d_sae=131072, **gemma) == "sparse"
    # a T4 has no bf16 matrix units
    for low in (None, torch.float16):
        assert choose_backend(cuda, d_sae=18432, **{**gemma, "low": low}) == "sparse"


def test_cost_model_of_a_gpu_is_its_written_formula():
    machine = Machine(gemm_flops=3.0, gather_bytes=7.0, fp32_flops=2.0, copy_bytes=5.0)
    sizes = {"d_in": 3, "d_out": 5, "d_sae": 70, "k": 2, "batch": 11}
    both, plain = gpu_costs(machine, **sizes, low=True), costs(machine, **sizes)
    again, dead = 4 * 3 * 2 * 11 / 7, (3 * 5 + 2 * 3) * 2 * 11 * 0.02 * 70
    moved = (6 * 70 * 5 + 8 * 11 * 70) / 5
    assert both["dense"] == pytest.approx(plain["dense"] + moved + again / 4 + dead / 3)
    assert both["sparse"] == pytest.approx(plain["sparse"] + 9 / 8 * again + dead / 2)
    assert both["sparse"] - gpu_costs(machine, **sizes, low=False)["sparse"] == pytest.approx(9 / 8 * again)


def test_dense_backend_traces_as_one_graph():
    state = make_state()
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(BATCH, D_IN, generator=g), torch.randn(BATCH, D_OUT, generator=g)
    rows = torch.arange(BATCH, dtype=torch.int32).repeat_interleave(2)
    kept = SparseActs(rows, torch.arange(2 * BATCH, dtype=torch.int32) % D_SAE, torch.rand(2 * BATCH, generator=g))

    def gradients():
        found = dense_gradients(
            x,
            y,
            state.weights(),
            kept,
            None,
            group_sizes=SETTINGS.group_sizes,
            group_weights=(0.25,) * 4,
            target_variance=10.0,
            aux_coef=0.0,
        )
        return found.nested.loss, found.rows("W_enc", 0, D_SAE), found.rows("W_dec", 0, D_SAE)

    compiled = torch.compile(gradients, fullgraph=True, backend="eager")()
    for a, b in zip(compiled, gradients(), strict=True):
        torch.testing.assert_close(a, b)
