"""The real neighbour: what SAELens computes from our folder, for every prefix, with and without skip."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from matryoshka.errors import UserError
from matryoshka.interop.export import export
from matryoshka.interop.provenance import Provenance
from matryoshka.lm import LanguageModel
from matryoshka.transcoder import Transcoder

# sae_lens imports a deprecated module of TransformerLens, and tells how to load the language model.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:\\s*This SAE has non-empty model_from_pretrained_kwargs:UserWarning"),
]

GROUPS = (5, 11, 32)

Make = Callable[..., Transcoder]


@pytest.fixture
def make(make_transcoder: Make) -> Make:
    return partial(make_transcoder, seed=3, group_sizes=GROUPS, model_revision="abc")


def rows(n: int = 9) -> torch.Tensor:
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("n_groups", [1, 2, 3])
def test_saelens_computes_the_same(make: Make, tmp_path: Path, skip: bool, n_groups: int) -> None:
    from sae_lens import SAE  # not importorskip: it is in the dev extra, and without it this test must fail

    transcoder, x = make(skip=skip), rows()
    export([transcoder.prefix(n_groups)], "saelens", tmp_path / "out")
    theirs: Any = SAE.load_from_disk(tmp_path / "out")
    acts = theirs.encode(x)
    ours = transcoder.encode(x, n_groups)
    assert acts.shape == (9, sum(GROUPS[:n_groups]))
    assert 0 < int((ours > 0).sum()) < ours.numel()
    torch.testing.assert_close(acts, ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(x), transcoder(x, n_groups), atol=1e-5, rtol=1e-5)
    without_skip = transcoder.decode(ours, n_groups, x=torch.zeros_like(x))
    torch.testing.assert_close(theirs.decode(acts), without_skip, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("convention", "hook"),
    [("resid_mid", "hook_resid_mid"), ("normalized", "ln2.hook_normalized"), ("mlp_in", "mlp.hook_in")],
)
def test_saelens_knows_where_it_belongs(make: Make, tmp_path: Path, convention: str, hook: str) -> None:
    from sae_lens import SAE

    provenance = Provenance(ctx_len=1024, has_bos=True, dataset="monology/pile-uncopyrighted")
    export([make(input=convention)], "saelens", tmp_path / "out", provenance)
    theirs: Any = SAE.load_from_disk(tmp_path / "out")
    metadata = theirs.cfg.metadata
    assert (metadata.hook_name, metadata.hook_name_out) == (f"blocks.3.{hook}", "blocks.3.hook_mlp_out")
    assert (metadata.model_name, metadata.context_size, metadata.prepend_bos) == ("google/gemma-2-2b", 1024, True)
    assert metadata.model_from_pretrained_kwargs == {"center_writing_weights": False, "fold_ln": False}
    assert theirs.cfg.apply_b_dec_to_input is False
    assert theirs.cfg.architecture() == "jumprelu_transcoder"


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("convention", ["resid_mid", "normalized", "mlp_in"])
def test_read_gives_back_what_was_written(make: Make, tmp_path: Path, skip: bool, convention: str) -> None:
    transcoder = make(skip=skip, input=convention)
    export([transcoder], "saelens", tmp_path / "out")
    again = Transcoder.from_pretrained(tmp_path / "out")
    assert again.config == transcoder.config
    for name, weight in transcoder.named_parameters():
        assert torch.equal(weight, getattr(again, name)), name


def test_what_saelens_saves_comes_back_unchanged(tmp_path: Path) -> None:
    """Import then export is the identity, on a file that SAELens wrote."""
    from sae_lens.saes.transcoder import SkipTranscoder, SkipTranscoderConfig

    config = SkipTranscoderConfig.from_dict(
        {
            "d_in": 12,
            "d_out": 10,
            "d_sae": 48,
            "apply_b_dec_to_input": False,
            "metadata": {"hook_name": "blocks.2.hook_resid_mid", "hook_name_out": "blocks.2.hook_mlp_out"},
        }
    )
    theirs = SkipTranscoder(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    theirs.save_model(tmp_path / "theirs")
    ours = Transcoder.from_pretrained(tmp_path / "theirs")
    x = rows()
    torch.testing.assert_close(ours(x), theirs(x).detach(), atol=1e-5, rtol=1e-5)
    export([ours], "saelens", tmp_path / "again")
    before = load_file(tmp_path / "theirs" / "sae_weights.safetensors")
    after = load_file(tmp_path / "again" / "sae_weights.safetensors")
    assert not after.pop("threshold").any()  # a ReLU is a JumpReLU with threshold 0
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "topk"}, "architecture 'topk'"),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input = True"),
        ({"normalize_activations": "layer_norm"}, "fold it into the weights"),
        ({"activation_fn": "topk"}, "activation_fn = 'topk'"),
        ({"metadata": {"hook_name": "blocks.3.hook_mlp_in"}}, "cannot be told"),
        ({"metadata": {"hook_name": "embed"}}, "not a hook point of a block"),
        ({"metadata": {"hook_name": "blocks.3.hook_resid_mid", "input": "attn_in"}}, "does not exist"),
    ],
)
def test_what_cannot_be_read_is_refused(make: Make, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    export([make()], "saelens", tmp_path / "out")
    file = tmp_path / "out" / "cfg.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        Transcoder.from_pretrained(tmp_path / "out")


def test_a_layer_norms_hook_is_ambiguous_unless_we_wrote_it(make: Make, tmp_path: Path) -> None:
    export([make()], "saelens", tmp_path / "out")
    assert Transcoder.from_pretrained(tmp_path / "out", norm_kind="layer").config.input == "normalized"
    file = tmp_path / "out" / "cfg.json"
    content = json.loads(file.read_text())
    del content["metadata"]["input"]
    file.write_text(json.dumps(content))
    assert Transcoder.from_pretrained(tmp_path / "out", norm_kind="rms").config.input == "normalized"
    with pytest.raises(UserError, match="is before gain and bias in TransformerLens 3 and after them in 2"):
        Transcoder.from_pretrained(tmp_path / "out", norm_kind="layer")


def test_damaged_weights_are_refused(make: Make, tmp_path: Path) -> None:
    export([make()], "saelens", tmp_path / "out")
    file = tmp_path / "out" / "sae_weights.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "b_enc": tensors["b_enc"][:7].clone()}, file)
    with pytest.raises(UserError, match="do not fit the config"):
        Transcoder.from_pretrained(tmp_path / "out")
    save_file({name: tensor for name, tensor in tensors.items() if name != "W_dec"}, file)
    with pytest.raises(UserError, match="expected W_enc, b_enc, W_dec, b_dec, threshold"):
        Transcoder.from_pretrained(tmp_path / "out")
    file.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        Transcoder.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("convention", ["resid_mid", "normalized", "mlp_in"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gemma2"])
def test_saelens_runs_a_model_with_it(
    make: Make,
    name: str,
    convention: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    boot_bridge: Callable[[Path], Any],
) -> None:
    """add_sae on SAELens's own model gives the logits of our splice: the hook names are those it wants."""
    from sae_lens import SAE
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    folder = str(request.getfixturevalue(name))
    hooks = {"source_hook": "blocks.1.hook_resid_mid", "target_hook": "blocks.1.hook_mlp_out"}
    transcoder = make(scale=0.3, d_in=24, d_out=24, input=convention, model=folder, **hooks)
    export([transcoder], "saelens", tmp_path / "out")
    model = LanguageModel.load(folder, dtype="float32", device="cpu")
    tokens = torch.randint(4, 90, (2, 11), generator=torch.Generator().manual_seed(0))
    with transcoder.spliced_into(model):
        expected = model.logits(tokens)
    bridge = boot_bridge(Path(folder))
    # What SAETransformerBridge.boot_transformers does to a bridge it has booted.
    bridge.__class__ = SAETransformerBridge
    bridge._acts_to_saes, bridge._transcoder_output_hooks = {}, {}
    clean = bridge(tokens)
    bridge.add_sae(SAE.load_from_disk(tmp_path / "out"), use_error_term=False)
    spliced = bridge(tokens)
    torch.testing.assert_close(spliced, expected, atol=1e-4, rtol=1e-4)
    assert (spliced - clean).norm() > 0.01 * clean.norm()
