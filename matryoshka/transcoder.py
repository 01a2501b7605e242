"""The Matryoshka transcoder as it is used: read, run, saved. Training keeps its own weights (train/step/step.py).

A saved transcoder is a folder with `transcoder.safetensors` and `config.json`. Conditioning and scales are folded
into the weights, so the input is the activation itself, in the convention that config.json names.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from matryoshka.config import Config, Count, explain
from matryoshka.errors import UserError
from matryoshka.locations import local_path
from matryoshka.runs import fsync_path, publish_json, read_json

WEIGHTS_FILE = "transcoder.safetensors"
CONFIG_FILE = "config.json"
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TranscoderConfig(Config):
    """What a transcoder is: its shape, and which activations it reads and predicts."""

    format_version: Literal[1] = 1
    d_in: Count
    """Width of the source activation."""
    d_out: Count
    """Width of the target activation."""
    group_sizes: Annotated[tuple[Count, ...], Field(min_length=1)]
    """Number of latents of each nested group; they are disjoint and sum to d_sae."""
    k: Count | None
    """Mean number of active latents in a row that it was trained for (BatchTopK); None where nobody says."""
    skip: bool = False
    """Whether an affine path x @ W_skip is added to the output."""
    input: str = "resid_mid"
    """Convention of the input: the raw source site, `normalized`, or `mlp_in` / `attn_in` (design.md 4)."""
    source_site: str = "resid_mid"
    source_hook: str = ""
    """Full TransformerLens name of the source activation, `blocks.17.hook_resid_mid`."""
    target_hook: str = ""
    """Full TransformerLens name of the target activation, `blocks.17.hook_mlp_out`."""
    model: str = ""
    """Language model whose activations it was trained on."""
    model_revision: str | None = None
    model_digest: str | None = None
    """Digest of the model's weight files, where the shard set knew it."""

    @model_validator(mode="after")
    def _check(self) -> TranscoderConfig:
        if self.k is not None and self.k > self.d_sae:
            raise ValueError(f"k = {self.k} is more than the {self.d_sae} latents there are")
        return self

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return sum(self.group_sizes)

    @property
    def prefix_ends(self) -> tuple[int, ...]:
        """Cumulative ends m_i of the groups: prefix i is the latents [0, m_i)."""
        return prefix_ends(self.group_sizes)


def prefix_ends(group_sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Cumulative ends of disjoint groups: (2, 3, 5) -> (2, 5, 10)."""
    return tuple(sum(group_sizes[: i + 1]) for i in range(len(group_sizes)))


class Transcoder(nn.Module):
    """JumpReLU transcoder with nested groups.

    pre_acts = x @ W_enc + b_enc
    acts     = relu(pre_acts) where pre_acts > threshold, else 0
    y_hat_i  = acts[:, :m_i] @ W_dec[:m_i] + b_dec  (+ x @ W_skip)        m_i = prefix_ends[i]

    Parameters (keys of the safetensors file): W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out],
    threshold [d_sae], and W_skip [d_in, d_out] when `config.skip`. W_dec rows have unit norm.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor
    W_skip: Tensor | None

    def __init__(self, config: TranscoderConfig) -> None:
        super().__init__()
        self.config = config
        for name, shape in _shapes(config).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))
        if not config.skip:
            self.W_skip = None

    def __repr__(self) -> str:
        config = self.config
        k = "unknown" if config.k is None else config.k
        sites = f"{config.source_hook or config.source_site} as {config.input} -> {config.target_hook or '?'}"
        return (
            f"Transcoder({sites} of {config.model or '?'}, {config.d_in} -> {config.d_sae} latents -> {config.d_out}, "
            f"prefixes {', '.join(map(str, self.prefix_ends))}, k {k}{', skip' if config.skip else ''})"
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_enc.device

    @property
    def prefix_ends(self) -> tuple[int, ...]:
        """Cumulative ends of the groups."""
        return self.config.prefix_ends

    def pre_acts(self, x: Float[Tensor, "*rows d_in"], n_groups: int | None = None) -> Float[Tensor, "*rows latents"]:
        """x @ W_enc + b_enc for the latents of the first `n_groups` groups (all by default)."""
        end = self._end(n_groups)
        if x.shape[-1] != self.config.d_in:
            raise UserError(f"the input is {x.shape[-1]} wide, and this transcoder reads {self.config.d_in}")
        return _affine(x, self.W_enc[:, :end], self.b_enc[:end])

    def encode(self, x: Float[Tensor, "*rows d_in"], n_groups: int | None = None) -> Float[Tensor, "*rows latents"]:
        """Activations in threshold mode, [..., m_n]."""
        pre_acts = self.pre_acts(x, n_groups)
        return torch.where(pre_acts > self.threshold[: pre_acts.shape[-1]], pre_acts, 0.0).relu_()

    def decode(
        self,
        acts: Float[Tensor, "*rows latents"],
        n_groups: int | None = None,
        *,
        x: Float[Tensor, "*rows d_in"] | None = None,
    ) -> Float[Tensor, "*rows d_out"]:
        """Reconstruction from the first `n_groups` groups. A skip transcoder needs the input `x` too."""
        end = min(self._end(n_groups), acts.shape[-1])
        return _plus_product(self._base(acts, x), acts[..., :end], self.W_dec[:end])

    def nested(
        self, acts: Float[Tensor, "*rows d_sae"], *, x: Float[Tensor, "*rows d_in"] | None = None
    ) -> list[Float[Tensor, "*rows d_out"]]:
        """Every nested reconstruction y_hat_1 ... y_hat_G. Each group is decoded once and the sums cumulate."""
        y_hat = self._base(acts, x)
        nested = []
        start = 0
        for end in self.prefix_ends:
            y_hat = _plus_product(y_hat, acts[..., start:end], self.W_dec[start:end])
            nested.append(y_hat)
            start = end
        return nested

    def forward(self, x: Float[Tensor, "*rows d_in"], n_groups: int | None = None) -> Float[Tensor, "*rows d_out"]:
        """decode(encode(x)) with the first `n_groups` groups."""
        return self.decode(self.encode(x, n_groups), n_groups, x=x)

    def active_groups(self, x: Float[Tensor, "*rows d_in"]) -> Int[Tensor, "*rows"]:
        """How many groups each row needs: 1 + the last group with an active latent, 0 without any. int64.

        Decoding a row with that many groups gives its full reconstruction.
        """
        firing = (self.encode(x) > 0).split(list(self.config.group_sizes), dim=-1)
        fires = torch.stack([group.any(dim=-1) for group in firing], dim=-1)
        numbers = torch.arange(1, fires.shape[-1] + 1, device=fires.device)
        return (fires * numbers).amax(dim=-1)

    def save(self, folder: Path) -> None:
        """Write the two files into `folder`, weights first: a folder without config.json is not a transcoder."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.named_parameters()}
        partial = folder / (WEIGHTS_FILE + ".partial")
        save_file(tensors, partial)
        fsync_path(partial)
        os.replace(partial, folder / WEIGHTS_FILE)
        publish_json(folder / CONFIG_FILE, self.config.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> Transcoder:
        """Read a folder written by `save`.

        Raises UserError when a file is missing, malformed, or its tensors do not have the shapes of config.json.
        """
        folder = local_path(folder)
        content = read_json(folder / CONFIG_FILE, what="transcoder")
        try:
            config = TranscoderConfig.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{folder / CONFIG_FILE} does not describe a transcoder: {explain(error)}") from error
        transcoder = cls(config)
        transcoder.set_weights(_read_weights(folder / WEIGHTS_FILE))
        return transcoder.to(device)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        layer: int | None = None,
        norm_kind: Literal["rms", "layer"] | None = None,
        revision: str | None = None,
        device: str | torch.device = "cpu",
    ) -> Transcoder:
        """Read a transcoder of ours, SAELens, Gemma Scope 1 or 2, or circuit-tracer: a folder, a run, or a hub repo.

        See `matryoshka.interop.pretrained.from_pretrained` for the arguments and errors.
        """
        from matryoshka.interop.pretrained import from_pretrained

        return from_pretrained(path_or_repo, layer=layer, norm_kind=norm_kind, revision=revision).to(device)

    def prefix(self, n_groups: int) -> Transcoder:
        """The first `n_groups` groups as a smaller transcoder of its own: a copy, with the same b_dec and W_skip."""
        end = self._end(n_groups)
        sizes = self.config.group_sizes[:n_groups]
        k = None if self.config.k is None else min(self.config.k, end)
        shorter = Transcoder(self.config.model_copy(update={"group_sizes": sizes, "k": k}))
        weights = {name: parameter.detach() for name, parameter in self.named_parameters()}
        cut = {"W_enc": weights["W_enc"][:, :end], "W_dec": weights["W_dec"][:end]}
        cut |= {name: weights[name][:end] for name in ("b_enc", "threshold")}
        shorter.set_weights({**weights, **cut})
        return shorter.to(self.device)

    def spliced_into(self, model: Any, n_groups: int | None = None) -> AbstractContextManager[None]:
        """While the context lasts, forwards of `model` compute this transcoder in place of what it predicts.

        `model` is a `matryoshka.LanguageModel` or a TransformerBridge. See `matryoshka.lm.splice.spliced_into`.
        """
        from matryoshka.lm.splice import spliced_into

        return spliced_into(self, model, n_groups)

    def set_weights(self, tensors: dict[str, Tensor]) -> None:
        """Copy in all weights by name.

        Raises UserError unless names and shapes are exactly those of the config and every value is a finite float. A
        threshold may be infinite: such a latent never fires.
        """
        wanted = _shapes(self.config)
        found: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != wanted:
            raise UserError(f"the weights do not fit the config: expected the tensors {wanted}, found {found}")
        for name, tensor in tensors.items():
            if tensor.dtype not in _WEIGHT_DTYPES:
                wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _WEIGHT_DTYPES)
                raise UserError(
                    f"the weights {name} are {str(tensor.dtype).removeprefix('torch.')}; expected one of {wanted}"
                )
            bad = ~torch.isfinite(tensor)
            if name == "threshold":
                bad &= tensor != torch.inf
            if n_bad := int(bad.sum()):
                raise UserError(f"{n_bad} of the {tensor.numel()} values of {name} are not finite; the file is broken")
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(tensors[name])

    def _end(self, n_groups: int | None) -> int:
        n_available = len(self.config.group_sizes)
        n_groups = n_available if n_groups is None else n_groups
        if not 1 <= n_groups <= n_available:
            listed = ", ".join(f"{i} ({end:,} latents)" for i, end in enumerate(self.prefix_ends, start=1))
            raise UserError(f"there is no prefix {n_groups}: this transcoder has {n_available} nested groups, {listed}")
        return self.prefix_ends[n_groups - 1]

    def _base(self, acts: Tensor, x: Tensor | None) -> Tensor:
        if self.W_skip is None:
            return self.b_dec.expand(*acts.shape[:-1], -1)
        if x is None:
            raise UserError("a skip transcoder needs its input to decode: pass x=")
        return _affine(x, self.W_skip, self.b_dec)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight + bias over any leading dimensions; one GEMM of all rows."""
    rows = torch.addmm(bias, x.reshape(-1, x.shape[-1]).to(weight.dtype), weight)
    return rows.view(*x.shape[:-1], weight.shape[1])


def _plus_product(base: Tensor, acts: Tensor, weight: Tensor) -> Tensor:
    """base + acts @ weight over any leading dimensions."""
    rows = torch.addmm(base.reshape(-1, base.shape[-1]), acts.reshape(-1, acts.shape[-1]), weight)
    return rows.view(base.shape)


def _shapes(config: TranscoderConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (config.d_in, config.d_sae),
        "b_enc": (config.d_sae,),
        "W_dec": (config.d_sae, config.d_out),
        "b_dec": (config.d_out,),
        "threshold": (config.d_sae,),
    }
    if config.skip:
        shapes["W_skip"] = (config.d_in, config.d_out)
    return shapes


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} is not a transcoder: it has no {path.name}") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from error
