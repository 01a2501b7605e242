"""A language model: load it, capture its activations at hook points, splice replacements in.

What runs is the plain Hugging Face model, and nothing else. Each hook point is the input or output of one of its
modules (hook_points.py says which), and a plain torch hook reads it there. Whether the tensor found is what its name
says is checked on a few tokens when the model is loaded (identities.py); a site that fails is refused.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from matryoshka.devices import resolve_device, resolve_dtype
from matryoshka.errors import UserError
from matryoshka.lm import hooks
from matryoshka.lm.failures import forward_failed, not_causal, not_finite, refusal
from matryoshka.lm.hook_points import HookPoints
from matryoshka.lm.hooks import ModuleHook, Recorder
from matryoshka.lm.identities import Checked, check_sites
from matryoshka.lm.loading import load_model, quiet
from matryoshka.lm.unembedding import Unembedding, soft_cap_of
from matryoshka.lm.weights_digest import config_digest, weights_digest
from matryoshka.locations import expand
from matryoshka.norms import Norm, fit_norm
from matryoshka.sites import SITES, hook_point

_PROBE_TOKENS = 8
# Relative L2 difference up to which logits are those of the same tokens: two rows of a batch may take other kernels.
_SAME_LOGITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class LanguageModel:
    """A causal language model with its tokenizer, read-only.

    Attributes:
        name: what was asked for, a hub id or a folder. revision: the commit hash that was loaded, if known.
        dtype, device: of the weights and of what `capture` returns.
        d_model, n_layers, n_ctx: width, number of blocks, longest context in tokens.
        tokenizer: the Hugging Face tokenizer, as it was loaded.
        bos_id: the token a context starts with, or None. special_ids: sorted ids of all special tokens.
        n_params, weight_bytes: tied weights are counted once.
    """

    def __init__(self, model: Any, points: HookPoints, tokenizer: Any, name: str) -> None:
        """Use `load`."""
        self._model = model
        self._points = points
        self._shape: torch.Size | None = None  # of the tokens in the forward that runs
        self._norms: dict[str, Norm | None] = {}
        accepted = inspect.signature(model.forward).parameters
        self._forward_options = {"use_cache": False} if "use_cache" in accepted else {}
        parameters = list(model.parameters())
        self.name = name
        self.revision: str | None = getattr(model.config, "_commit_hash", None)
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = parameters[0].device
        self.d_model = points.d_model
        self.n_layers = len(points.blocks)
        self.n_ctx = int(getattr(model.config, "max_position_embeddings", None) or points.n_ctx)
        self.tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        added = getattr(tokenizer, "added_tokens_decoder", {})
        marked = [index for index, token in added.items() if token.special]
        self.special_ids: tuple[int, ...] = tuple(sorted({*tokenizer.all_special_ids, *marked}))
        self.n_params = sum(p.numel() for p in parameters)
        self.weight_bytes = sum(p.numel() * p.element_size() for p in parameters)
        self._n_tokens = model.get_input_embeddings().weight.shape[0]
        self._checked_sites = self._check_sites()

    @classmethod
    def load(
        cls, name_or_path: str, *, revision: str | None = None, dtype: str = "auto", device: str = "auto"
    ) -> LanguageModel:
        """Load a causal language model and its tokenizer from the hub, its cache, or a folder.

        Safetensors weights only, and never the model's own code.

        Raises:
            UserError: not found, gated or unreachable; no tokenizer; weights that do not fit the architecture; an
                architecture that TransformerLens does not know; a forward that fails, or is not finite.
        """
        on = resolve_device(device)
        name = expand(str(name_or_path))
        with quiet():
            model, tokenizer = load_model(name, revision, resolve_dtype(dtype, on), on)
            return cls(model, HookPoints(model, name), tokenizer, name)

    def capture(self, tokens: Tensor, hook_points: Sequence[str]) -> dict[str, Tensor]:
        """Activations at `hook_points` for `tokens` [B, T] int64, from one forward that stops at the last of them.

        Contexts are taken as they are: no padding, no attention mask, no BOS added.

        Returns:
            hook point -> [B, T, d_model], in the model's dtype on its device; each one a tensor of its own.

        Raises:
            UserError: a hook point the model does not have, or that is not what its name says; token ids or a length
                that it cannot take.
        """
        found = self._record(self._checked(tokens), self._hooks(hook_points))
        return {name: found[name] for name in hook_points}

    def norm_before(self, site: str, layer: int) -> Norm | None:
        """The norm whose input is this site: pre-MLP for resid_mid, pre-attention for resid_pre.

        None for other sites, and where the model has no such norm (post-norm models, norms of another form). Found
        out on a few tokens: the norm's input is the site's tensor, and our formula gives the norm's output.
        """
        name = hook_point(site, layer)
        self._points.require(name)
        if site not in ("resid_mid", "resid_pre"):
            return None
        if name not in self._norms:
            self._norms[name] = self._find_norm(site, layer)
        return self._norms[name]

    def sites_of(self, layer: int) -> list[str]:
        """The sites of this layer that can be read."""
        refused = self._checked_sites.refused
        return [site for site in self._points.sites_of(layer) if hook_point(site, layer) not in refused]

    def adds_more(self, layer: int) -> str | None:
        """What mlp_out of this layer is, where its block adds more to the stream than attn_out and mlp_out."""
        return self._checked_sites.notes.get(layer)

    def logits(self, tokens: Tensor, replace: Mapping[str, Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """Logits [B, T, n_tokens] of a full forward in which each hook point of `replace` is replaced.

        Args:
            tokens: [B, T] int64.
            replace: hook point -> function of its activation [B, T, d_model], giving what goes on in its place.

        Raises:
            UserError: as `capture`; also for resid_mid, which has no single place to be replaced at: the MLP and the
                residual connection each read it.
        """
        tokens = self._checked(tokens)
        functions = dict(replace or {})
        module_hooks = self._hooks(functions)
        for name in functions:
            if name.endswith(".hook_resid_mid"):
                raise UserError(
                    f"{name} cannot be replaced, since the MLP and the residual connection read it separately. "
                    "Replace attn_out or resid_pre, which it is the sum of, or mlp_out."
                )
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            for name, hook in module_hooks.items():
                stack.callback(self._attach(hook, lambda t, f=functions[name]: f(t).to(t.dtype)))
            return self._forward(tokens).logits

    @contextlib.contextmanager
    def hooked(self, functions: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
        """While the context lasts, call each function on its hook point's activation in every forward of this model.

        What a function returns, unless None, goes on in the activation's place. It sees [B, T, d_model].

        Raises:
            UserError: as `capture`.
        """
        with contextlib.ExitStack() as stack:
            for name, hook in self._hooks(functions).items():
                stack.callback(self._attach(hook, functions[name]))
            yield

    @cached_property
    def unembedding(self) -> Unembedding:
        """The final norm and W_U. Raises UserError for a model whose logits are made in another way."""
        probe = self.capture(self._probe_tokens(), [hook_point("resid_post", self.n_layers - 1)]).popitem()[1]
        logits = self.logits(self._probe_tokens())
        head, cap = self._model.get_output_embeddings(), soft_cap_of(self._model.config)
        return Unembedding.fit(self._points.final_norm, head, probe, logits, self.name, cap)

    @cached_property
    def weights_digest(self) -> str:
        """The identity of the weight files; see `matryoshka.lm.weights_digest`."""
        return weights_digest(self.name, self.revision)

    @cached_property
    def config_digest(self) -> str:
        """The identity of config.json."""
        return config_digest(self.name, self.revision)

    def describe(self) -> dict[str, Any]:
        """JSON-able facts for a manifest."""
        return {
            "model": self.name,
            "revision": self.revision,
            "architecture": type(self._model).__name__,
            "weight_dtype": str(self.dtype).removeprefix("torch."),
            "attention": getattr(self._model.config, "_attn_implementation", None),
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "n_ctx": self.n_ctx,
            "n_params": self.n_params,
            "tokenizer": {
                "name": self.tokenizer.name_or_path,
                "class": type(self.tokenizer).__name__,
                "vocab_size": len(self.tokenizer),
                "bos_id": self.bos_id,
                "special_ids": list(self.special_ids),
            },
        }

    def _checked(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
            raise UserError(
                f"The model takes tokens of shape [contexts, ctx_len] in int64; these are {list(tokens.shape)} "
                f"in {str(tokens.dtype).removeprefix('torch.')}."
            )
        if tokens.shape[1] > self.n_ctx:
            raise UserError(f"The contexts have {tokens.shape[1]} tokens, and {self.name} takes at most {self.n_ctx}.")
        # On a GPU an id out of range would kill the process at some later line.
        low, high = (int(v) for v in torch.aminmax(tokens))
        if low < 0 or high >= self._n_tokens:
            raise UserError(
                f"The tokens range from {low} to {high}, and {self.name} knows 0 to {self._n_tokens - 1}. They come "
                "from another model's tokenizer: tokenize the text with this model's."
            )
        return tokens.to(self.device)

    def _hooks(self, names: Iterable[str]) -> dict[str, ModuleHook]:
        """hook point -> where to read it. Raises UserError for one that the model does not have or that is refused."""
        found = {}
        for name in names:
            self._points.require(name)
            if name in self._checked_sites.refused:
                raise UserError(refusal(self.name, name, self._checked_sites.refused[name]))
            hook = self._points.trace(name)
            assert hook is not None
            found[name] = hook
        return found

    def _probe_tokens(self) -> Tensor:
        """[2, 8] that differ in the last token alone, so that a forward shows whether it is causal."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self._n_tokens, (1, min(_PROBE_TOKENS, self.n_ctx)), generator=generator).repeat(2, 1)
        tokens[1, -1] = (tokens[1, -1] + 1) % self._n_tokens
        return tokens.to(self.device)

    def _record(self, tokens: Tensor, wanted: Mapping[str, ModuleHook]) -> dict[str, Tensor]:
        with Recorder(wanted) as recorder, torch.inference_mode(), contextlib.ExitStack() as stack:
            for name, hook in wanted.items():
                stack.callback(self._attach(hook, lambda t, name=name: recorder.record(name, t)))
            self._forward(tokens)
        return recorder.tensors

    def _attach(self, hook: ModuleHook, function: Callable[[Tensor], Tensor | None]) -> Callable[[], None]:
        """Call `function` on [B, T, width]; some models (OPT) work on [B * T, width] in a part of their blocks."""

        def shaped(tensor: Tensor) -> Tensor | None:
            if tensor.ndim != 2 or self._shape is None or len(tensor) != self._shape.numel():
                return function(tensor)
            new = function(tensor.unflatten(0, self._shape))
            return None if new is None else new.flatten(0, 1)

        return hook.attach(shaped).remove

    def _forward(self, tokens: Tensor, **options: Any) -> Any:
        """One forward of the plain model. Raises UserError for whatever its code raises."""
        self._shape = tokens.shape
        try:
            return self._model(tokens, **self._forward_options, **options)
        except Exception as error:
            # What our own functions at its hooks raise is theirs, and so is memory that is too small.
            ours = any(f.f_code.co_filename == hooks.__file__ for f, _ in traceback.walk_tb(error.__traceback__))
            if ours or isinstance(error, torch.OutOfMemoryError):
                raise
            raise forward_failed(self.name, type(self._model).__name__, error) from error

    def _check_sites(self) -> Checked:
        points = [hook_point(site, layer) for layer in range(self.n_layers) for site in SITES]
        wanted = {name: hook for name in points if (hook := self._points.trace(name)) is not None}
        seen, output = self._watch(wanted)
        logits = output.logits.float()
        # Some models give -inf to ids that they never want.
        if bool(logits.isnan().any()) or not all(bool(tensor.isfinite().all()) for tensor in seen.values()):
            raise not_finite(self.name, self._model)
        difference = float((logits[0, :-1] - logits[1, :-1]).norm() / logits[0, :-1].norm())
        if difference > _SAME_LOGITS[self.dtype]:
            raise not_causal(self.name, difference)
        hidden = getattr(output, "hidden_states", None)
        checked = check_sites(seen, hidden, self._read_inside, self.n_layers, self.name)
        for name in wanted.keys() - seen.keys():
            checked.refused[name] = "its forward has no such tensor of [contexts, ctx_len, d_model]"
        return checked

    def _read_inside(self, layer: int) -> dict[str, Tensor]:
        """What each module of a block reads of the probe tokens, where that is [B, T, d_model]."""
        modules = self._points.blocks[layer].named_modules()
        return self._watch({path: ModuleHook(module, "in") for path, module in modules if path})[0]

    def _watch(self, wanted: Mapping[str, ModuleHook]) -> tuple[dict[str, Tensor], Any]:
        """(what passed the hooks in a whole forward of the probe tokens, its output); only [B, T, d_model] is kept."""
        tokens = self._probe_tokens()
        seen: dict[str, Tensor] = {}

        def keep(name: str, tensor: Tensor) -> None:
            if tensor.shape == (*tokens.shape, self.d_model):
                seen[name] = tensor.clone()

        with torch.inference_mode(), contextlib.ExitStack() as stack:
            for name, hook in wanted.items():
                stack.callback(self._attach(hook, lambda t, name=name: keep(name, t)))
            return seen, self._forward(tokens, output_hidden_states=True)

    def _find_norm(self, site: str, layer: int) -> Norm | None:
        """The norm between the site and the sublayer, if it reads the site and the sublayer reads what it gives."""
        module, reader = self._points.norm_before(site, layer), self._points.sublayer_input(site, layer)
        if module is None or reader is None:
            return None
        wanted = {
            "site": self._hooks([hook_point(site, layer)])[hook_point(site, layer)],
            "in": ModuleHook(module, "in"),
            "out": ModuleHook(module, "out"),
            "read": reader,
        }
        seen = self._record(self._probe_tokens(), wanted)
        if not torch.equal(seen["site"], seen["in"]) or not torch.equal(seen["out"], seen["read"]):
            return None
        return fit_norm(module, seen["in"], seen["out"])
