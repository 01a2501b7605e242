"""The saved form of a transcoder: its arithmetic against plain loops, its files, its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.transcoder import Transcoder, TranscoderConfig, prefix_ends

D_IN, D_OUT, GROUPS = 12, 10, (5, 11, 32)
ROWS = 7


def make(*, skip: bool = False, seed: int = 0) -> Transcoder:
    config = TranscoderConfig(
        d_in=D_IN, d_out=D_OUT, group_sizes=GROUPS, k=9, skip=skip, source_hook="blocks.3.hook_resid_mid", model="toy"
    )
    transcoder = Transcoder(config)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(parameter.shape, generator=generator) for name, parameter in transcoder.named_parameters()
    }
    # thresholds of both signs: a pre-activation above a negative threshold is still nothing when it is negative
    weights["threshold"] = torch.randn(48, generator=generator) * 2
    transcoder.set_weights(weights)
    return transcoder


@pytest.fixture
def x() -> Tensor:
    return torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(1))


def slow_acts(t: Transcoder, x: Tensor, end: int) -> np.ndarray:
    W, b, threshold = (v.numpy().astype(np.float64) for v in (t.W_enc, t.b_enc, t.threshold))
    acts = np.zeros((len(x), end))
    for row in range(len(x)):
        for latent in range(end):
            pre = b[latent] + sum(float(x[row, i]) * W[i, latent] for i in range(D_IN))
            if pre > threshold[latent] and pre > 0:
                acts[row, latent] = pre
    return acts


def slow_decode(t: Transcoder, acts: np.ndarray, x: Tensor, end: int) -> np.ndarray:
    y_hat = np.tile(t.b_dec.numpy().astype(np.float64), (len(x), 1))
    for row in range(len(x)):
        for latent in range(end):
            y_hat[row] += acts[row, latent] * t.W_dec[latent].numpy()
        if t.W_skip is not None:
            for i in range(D_IN):
                y_hat[row] += float(x[row, i]) * t.W_skip[i].numpy()
    return y_hat


def test_prefix_ends() -> None:
    assert prefix_ends((2, 3, 5)) == (2, 5, 10)
    assert prefix_ends((4,)) == (4,)
    assert make().prefix_ends == (5, 16, 48)
    assert make().config.d_sae == 48


@pytest.mark.parametrize("skip", [False, True])
def test_arithmetic_equals_plain_loops(skip: bool, x: Tensor) -> None:
    t = make(skip=skip)
    acts = t.encode(x)
    wanted = slow_acts(t, x, 48)
    assert 0 < (wanted > 0).sum() < wanted.size
    np.testing.assert_allclose(acts.numpy(), wanted, rtol=1e-4, atol=1e-5)
    nested = t.nested(acts, x=x)
    assert len(nested) == 3
    for i, end in enumerate((5, 16, 48)):
        y_hat = slow_decode(t, wanted, x, end)
        np.testing.assert_allclose(nested[i].numpy(), y_hat, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(t.decode(acts, i + 1, x=x).numpy(), y_hat, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(t(x, i + 1).numpy(), y_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(t(x), nested[-1])


@pytest.mark.parametrize("n_groups", [1, 2, 3])
def test_a_prefix_is_a_slice(n_groups: int, x: Tensor) -> None:
    """The first groups alone are a transcoder of their own: the weights sliced at the prefix end."""
    t = make()
    end = t.prefix_ends[n_groups - 1]
    small = Transcoder(t.config.model_copy(update={"group_sizes": GROUPS[:n_groups]}))
    small.set_weights(
        {
            "W_enc": t.W_enc[:, :end],
            "b_enc": t.b_enc[:end],
            "W_dec": t.W_dec[:end],
            "b_dec": t.b_dec,
            "threshold": t.threshold[:end],
        }
    )
    acts = t.encode(x, n_groups)
    assert acts.shape == (ROWS, end)
    torch.testing.assert_close(acts, t.encode(x)[:, :end])
    torch.testing.assert_close(acts, small.encode(x))
    torch.testing.assert_close(t.decode(t.encode(x), n_groups), small(x))
    torch.testing.assert_close(t.decode(acts, n_groups), small(x))


@pytest.mark.parametrize("n_groups", [0, -1, 4])
def test_no_such_prefix(n_groups: int, x: Tensor) -> None:
    t = make()
    for call in (lambda: t(x, n_groups), lambda: t.encode(x, n_groups), lambda: t.decode(t.encode(x), n_groups)):
        with pytest.raises(UserError, match=f"no prefix {n_groups}: this transcoder has 3 nested groups"):
            call()


def test_a_skip_transcoder_asks_for_its_input(x: Tensor) -> None:
    t = make(skip=True)
    with pytest.raises(UserError, match="pass x="):
        t.decode(t.encode(x))


def test_bfloat16_input(x: Tensor) -> None:
    t = make(skip=True)
    torch.testing.assert_close(t(x.bfloat16()), t(x.bfloat16().float()))


@pytest.mark.parametrize("skip", [False, True])
def test_saved_is_loaded(skip: bool, x: Tensor, tmp_path: Path) -> None:
    t = make(skip=skip)
    t.save(tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["config.json", "transcoder.safetensors"]
    again = Transcoder.load(str(tmp_path / "a" / "b"))
    assert again.config == t.config
    assert set(again.state_dict()) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"} | (
        {"W_skip"} if skip else set()
    )
    for name, value in t.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert torch.equal(again(x), t(x))
    assert not any(p.requires_grad for p in again.parameters())


def test_a_killed_save_is_no_transcoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr("matryoshka.transcoder.publish_json", die)
    with pytest.raises(RuntimeError, match="killed"):
        make().save(tmp_path)
    with pytest.raises(UserError, match=r"is not a transcoder: it has no config\.json"):
        Transcoder.load(tmp_path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make().save(tmp_path)
    return tmp_path


def test_missing_files(saved: Path) -> None:
    with pytest.raises(UserError, match=r"is not a transcoder: it has no config\.json"):
        Transcoder.load(saved / "nowhere")
    (saved / "transcoder.safetensors").unlink()
    with pytest.raises(UserError, match=r"it has no transcoder\.safetensors"):
        Transcoder.load(saved)


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    tensors = {**load_file(folder / "transcoder.safetensors"), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "transcoder.safetensors")


def test_wrong_tensors(saved: Path) -> None:
    good = load_file(saved / "transcoder.safetensors")
    for change in (
        {"W_dec": good["W_dec"].T.contiguous()},
        {"extra": torch.zeros(2)},
        {"W_skip": torch.zeros(D_IN, D_OUT)},
        {"threshold": None},
        {"b_enc": torch.zeros(48, 1)},
    ):
        edit_tensors(saved, **change)
        with pytest.raises(UserError, match="weights do not fit the config"):
            Transcoder.load(saved)
        save_file(good, saved / "transcoder.safetensors")
    Transcoder.load(saved)


def test_damaged_weights(saved: Path) -> None:
    file = saved / "transcoder.safetensors"
    whole = file.read_bytes()
    for content in (b"", b"not tensors at all", whole[:-4], whole[:20]):
        file.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as safetensors"):
            Transcoder.load(saved)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"format_version": 2}, "format_version 2; this version reads 1"),
        ({"k": 49}, "k = 49 is more than the 48 latents"),
        ({"group_sizes": []}, "group_sizes"),
        ({"group_sizes": [5, 0]}, "group_sizes"),
        ({"d_in": -1}, "d_in"),
        ({"shoe_size": 43}, "shoe_size"),
        ({"d_out": 11}, "weights do not fit the config"),
        ({"skip": True}, "weights do not fit the config"),
    ],
)
def test_wrong_config(changes: dict[str, object], what: str, saved: Path) -> None:
    content = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**content, **changes}))
    with pytest.raises(UserError, match=what):
        Transcoder.load(saved)


def test_config_checks() -> None:
    with pytest.raises(ValidationError, match="k = 17 is more than the 16 latents"):
        TranscoderConfig(d_in=2, d_out=2, group_sizes=(5, 11), k=17)
    assert TranscoderConfig(d_in=2, d_out=2, group_sizes=(5, 11), k=16).d_sae == 16
