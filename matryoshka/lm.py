"""A language model: load it, capture its activations at hook points, splice replacements in.

The only file that imports transformers or transformer_lens, and only inside functions, since that takes seconds.

One set of weights, two module trees. `TransformerBridge` (no weight processing) says which tensor a hook point is. But
its forward re-implements attention and costs 15 to 25 percent of the speed, so the forward that runs is that of a
second tree of plain Hugging Face modules over the same tensors: each hook point is traced through the bridge to the
input or output of one Hugging Face module, and a plain torch hook reads it there. A trace is trusted only after a
check against the bridge on a few tokens; a hook point that has no trace or fails the check is read through the bridge.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from matryoshka.devices import resolve_device, resolve_dtype
from matryoshka.errors import UserError
from matryoshka.hook_points import HookPoints
from matryoshka.load_failure import cannot_load
from matryoshka.sites import Norm, fit_norm, hook_point
from matryoshka.taps import Captured, Tap
from matryoshka.unembedding import Unembedding

__all__ = ["LanguageModel", "resolve_device", "resolve_dtype"]

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 8
# Relative L2 difference up to which two ways of computing one tensor agree: a whole forward by another attention
# kernel, and one norm. Different sites differ by about 1.
_SAME_FORWARD = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
_SAME_NORM = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


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

    def __init__(self, bridge: Any, plain: Any, paths: Mapping[nn.Module, str], tokenizer: Any, name: str) -> None:
        """Use `load`. `paths`: module that the bridge wraps -> its path, the same in `plain`."""
        self._bridge = bridge
        self._plain = plain
        self._points = HookPoints(bridge, plain, paths, name)
        self._taps: dict[str, Tap | None] = {}  # hook point -> its checked tap, or None: only through the bridge
        self._norms: dict[str, Norm | None] = {}
        accepted = inspect.signature(plain.forward).parameters
        self._forward_options = {"use_cache": False} if "use_cache" in accepted else {}
        parameters = list(plain.parameters())
        config = plain.config.get_text_config()
        self.name = name
        self.revision: str | None = getattr(plain.config, "_commit_hash", None)
        self.dtype: torch.dtype = plain.dtype
        self.device: torch.device = parameters[0].device
        self.d_model = int(config.hidden_size)
        self.n_layers = len(bridge.blocks)
        self.n_ctx = int(getattr(config, "max_position_embeddings", None) or bridge.cfg.n_ctx)
        self.tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        added = getattr(tokenizer, "added_tokens_decoder", {})
        marked = [index for index, token in added.items() if token.special]
        self.special_ids: tuple[int, ...] = tuple(sorted({*tokenizer.all_special_ids, *marked}))
        self.n_params = sum(p.numel() for p in parameters)
        self.weight_bytes = sum(p.numel() * p.element_size() for p in parameters)
        self._n_tokens = plain.get_input_embeddings().weight.shape[0]

    @classmethod
    def load(
        cls, name_or_path: str, *, revision: str | None = None, dtype: str = "auto", device: str = "auto"
    ) -> LanguageModel:
        """Load a causal language model and its tokenizer from the hub, its cache, or a folder.

        Safetensors weights only, and never the model's own code.

        Raises:
            UserError: not found, gated or unreachable; no tokenizer; weights that do not fit the architecture; an
                architecture that TransformerLens does not know.
        """
        on = resolve_device(device)
        name = str(name_or_path)
        with _quiet():
            model, tokenizer = _load_plain(name, revision, resolve_dtype(dtype, on))
            model = model.to(on).eval().requires_grad_(False)
            shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
            # The bridge wraps the modules of `model` in place; the copy made here stays as it is.
            plain = copy.deepcopy(model, shared)
            paths = {module: path for path, module in model.named_modules()}
            bridge = _boot_bridge(name, model, tokenizer)
        return cls(bridge, plain, paths, tokenizer, name)

    def capture(self, tokens: Tensor, hook_points: Sequence[str]) -> dict[str, Tensor]:
        """Activations at `hook_points` for `tokens` [B, T] int64, from one forward that stops at the last of them.

        Contexts are taken as they are: no padding, no attention mask, no BOS added.

        Returns:
            hook point -> [B, T, d_model], in the model's dtype on its device; each one a tensor of its own.

        Raises:
            UserError: a hook point the model does not have; token ids or a length that it cannot take.
        """
        names = list(dict.fromkeys(hook_points))
        tokens = self._checked(tokens)
        taps = self._checked_taps(names)
        if all(tap is not None for tap in taps.values()):
            found = self._run_plain(tokens, {name: tap for name, tap in taps.items() if tap is not None})
        else:
            found = self._run_bridge(tokens, names)
        return {name: found[name] for name in names}

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
            self._norms[name] = self._find_norm(name, f"blocks.{layer}.{'ln2' if site == 'resid_mid' else 'ln1'}")
        return self._norms[name]

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
        taps = self._checked_taps(list(functions))
        for name in functions:
            if name.endswith(".hook_resid_mid"):
                raise UserError(
                    f"{name} cannot be replaced, since the MLP and the residual connection read it separately. "
                    "Replace attn_out or resid_pre, which it is the sum of, or mlp_out."
                )
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            if any(tap is None for tap in taps.values()):
                hooks = [(name, lambda t, hook, f=f: f(t).to(t.dtype)) for name, f in functions.items()]  # noqa: ARG005
                return self._bridge.run_with_hooks(tokens, fwd_hooks=hooks, **self._forward_options)
            for name, tap in taps.items():
                assert tap is not None
                stack.callback(tap.attach(lambda t, f=functions[name]: f(t).to(t.dtype)).remove)
            return self._plain(tokens, **self._forward_options).logits

    @contextlib.contextmanager
    def tapped(self, functions: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
        """While the context lasts, call each function on its hook point's activation in every forward of this model.

        What a function returns, unless None, goes on in the activation's place. It sees [B, T, d_model].

        Raises:
            UserError: a hook point the model does not have, or that is not simply an edge of one of its modules.
        """
        taps = self._checked_taps(list(functions))
        with contextlib.ExitStack() as stack:
            for name, function in functions.items():
                # Both trees, since a forward may run in either.
                traced = None if taps[name] is None else self._points.trace(name)
                if traced is None:
                    raise UserError(f"{name} of {self.name} cannot be tapped: no module reads or gives it.")
                for tap in traced:
                    stack.callback(tap.attach(function).remove)
            yield

    @cached_property
    def unembedding(self) -> Unembedding:
        """The final norm and W_U. Raises UserError for a model whose logits are made in another way."""
        probe = self.capture(self._probe_tokens(), [hook_point("resid_post", self.n_layers - 1)]).popitem()[1]
        return Unembedding.fit(self._bridge, self._plain, probe, self.logits(self._probe_tokens()), self.name)

    def describe(self) -> dict[str, Any]:
        """JSON-able facts for a manifest."""
        return {
            "model": self.name,
            "revision": self.revision,
            "architecture": type(self._plain).__name__,
            "weight_dtype": str(self.dtype).removeprefix("torch."),
            "attention": getattr(self._plain.config, "_attn_implementation", None),
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

    def _checked_taps(self, names: Sequence[str]) -> dict[str, Tap | None]:
        """hook point -> where to read it in the plain tree, or None: only the bridge can read it."""
        for name in names:
            self._points.require(name)
        new = [name for name in names if name not in self._taps]
        traced = {name: taps for name in new if (taps := self._points.trace(name)) is not None}
        self._taps.update(dict.fromkeys(new))
        if traced:
            tokens = self._probe_tokens()
            plain = self._run_plain(tokens, {name: taps[0] for name, taps in traced.items()})
            bridge = self._run_bridge(tokens, list(traced), {_edge_of(name): taps[1] for name, taps in traced.items()})
            for name, taps in traced.items():
                # The bridge's module stands in the same place of the tree as the plain one, so if the hook point is
                # this edge of the one it is this edge of the other. The two forwards round differently.
                edge = bridge.get(_edge_of(name))
                same_edge = edge is not None and torch.equal(edge, bridge[name])
                difference = _relative_difference(plain[name], bridge[name])
                if same_edge and difference <= _SAME_FORWARD[self.dtype]:
                    self._taps[name] = taps[0]
                    continue
                logger.warning(
                    "%s of %s is read through TransformerBridge, which is slower: the plain module differs from it "
                    "(relative difference %.2g)",
                    name,
                    self.name,
                    difference,
                )
        return {name: self._taps[name] for name in names}

    def _probe_tokens(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self._n_tokens, (1, min(_PROBE_TOKENS, self.n_ctx)), generator=generator)
        return tokens.to(self.device)

    def _run_plain(self, tokens: Tensor, taps: Mapping[str, Tap]) -> dict[str, Tensor]:
        with Captured(taps) as captured, torch.inference_mode(), contextlib.ExitStack() as stack:
            for name, tap in taps.items():
                stack.callback(tap.attach(lambda t, name=name: captured.take(name, t)).remove)
            self._plain(tokens, **self._forward_options)
        return captured.tensors

    def _run_bridge(
        self, tokens: Tensor, names: Sequence[str], taps: Mapping[str, Tap] | None = None
    ) -> dict[str, Tensor]:
        """Read hook points with the bridge's own hooks, and in the same forward what passes `taps`, if anything."""
        taps = taps or {}
        with Captured(names, optional=taps) as captured, torch.inference_mode(), contextlib.ExitStack() as stack:
            for name, tap in taps.items():
                stack.callback(tap.attach(lambda t, name=name: captured.take(name, t)).remove)
            hooks = [(name, lambda t, hook, name=name: captured.take(name, t)) for name in names]  # noqa: ARG005
            self._bridge.run_with_hooks(tokens, return_type=None, fwd_hooks=hooks, **self._forward_options)
        return captured.tensors

    def _find_norm(self, residual: str, norm: str) -> Norm | None:
        taps = self._points.trace(f"{norm}.hook_in")
        site = self._checked_taps([residual])[residual]
        if taps is None or site is None:
            return None
        module: Any = taps[0].module
        wanted = {"residual": site, "in": taps[0], "out": Tap(module, "out")}
        seen = self._run_plain(self._probe_tokens(), wanted)
        if not torch.equal(seen["residual"], seen["in"]):
            return None
        return fit_norm(module, seen["in"], seen["out"], tolerance=_SAME_NORM[self.dtype])


def _edge_of(name: str) -> str:
    return f"edge of {name}"


def _relative_difference(a: Tensor, b: Tensor) -> float:
    a, b = a.cpu().double(), b.cpu().double()  # MPS has no float64
    return float((a - b).norm() / b.norm())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what transformers and transformer_lens do to bars, logs and warning filters to the time of a load."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handlers = list(logging.root.handlers)
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
        from transformers.utils import logging as transformers_logging

        bars = transformers_logging.is_progress_bar_enabled()
        hub_bars = not are_progress_bars_disabled()
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.disable_progress_bar()
        if hub_bars:  # a download of gigabytes keeps its bar
            enable_progress_bars()
        transformers_logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
            if not hub_bars:
                disable_progress_bars()
            logging.root.handlers[:] = [h for h in logging.root.handlers if h in handlers]


def _load_plain(name: str, revision: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """The Hugging Face model, on the CPU, and its tokenizer, both of one commit."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    part = "configuration"
    try:
        config = AutoConfig.from_pretrained(name, **where)
        where["revision"] = getattr(config, "_commit_hash", None) or revision
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        part = "weights"
        # The default is sdpa where it is exact. It has no soft cap, and not every version of transformers knows that.
        capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
        where |= {"attn_implementation": "eager"} if capped else {}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **where
        )
        model, report = loaded
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise cannot_load(name, revision, part, error) from error
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise UserError(
            f"The weight files of {name} do not fit its architecture: {len(absent)} tensors are missing or of another "
            f"shape ({', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}), and would be random. Download or "
            "convert the model again."
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise cannot_load(name, revision, "tokenizer", ValueError("it has no words, only special tokens"))
    return model, tokenizer


def _boot_bridge(name: str, model: Any, tokenizer: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    # The bridge changes its tokenizer, and loads it a second time unless it claims to prepend BOS already.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.init_kwargs["add_bos_token"] = True
    try:
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=model, tokenizer=tokenizer, device=str(model.device), dtype=model.dtype
        )
    except (ValueError, KeyError, NotImplementedError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"TransformerLens cannot wrap {name}, a {type(model).__name__}: {reason} Use a model of an architecture "
            "that its TransformerBridge supports."
        ) from error
    if not hasattr(bridge, "blocks"):
        raise UserError(f"{name} is a {type(model).__name__}, which is not a stack of decoder blocks. Use one that is.")
    return bridge
