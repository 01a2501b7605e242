"""The sparse backend: everything behind the encoder touches only the k * batch entries that survived BatchTopK."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .dead import DeadBlock
from .gradients import Gradients
from .nested_loss import nested_loss_, total_scatter
from .sparse_acts import SparseActs, bag_starts, bag_sums, row_dots


def sparse_gradients(
    x: Tensor,
    y: Tensor,
    weights: dict[str, Tensor],
    kept: SparseActs,
    dead: SparseActs | DeadBlock | None,
    *,
    prefix_ends: Tensor,
    group_weights: tuple[float, ...],
    target_variance: float,
    aux_coef: Tensor | float,
    join: Callable[[Tensor], Tensor] = lambda planes: planes,
    residual_scatter: Callable[[Tensor], Tensor] = total_scatter,
) -> Gradients:
    """Loss and gradients from the entries alone; x [batch, d_in], y [batch, d_out], prefix_ends int32 [n_groups].

    Where `weights` hold a part of the latents, `join` adds the parts of the others to the planes [groups, rows, d_out];
    where x and y are a part of the batch, `residual_scatter` gives that of the whole.

    A bag is one (group, row) pair; the dead latents' entries form one more plane of bags. The three products are
    an embedding_bag over bags (decode), a sampled dense-dense product (d_acts), and embedding_bags over latents
    (dW_dec, dW_enc). Of a DeadBlock the plane and the gradients are products of small matrices instead.
    """
    (batch, d_out), n_groups = y.shape, len(group_weights)
    W_dec, W_skip = weights["W_dec"], weights.get("W_skip")
    d_sae = W_dec.shape[0]
    bag = torch.bucketize(kept.latents, prefix_ends, right=True, out_int32=True) * batch + kept.rows
    bag, order = bag.sort(stable=True)
    rows, latents, acts = kept.rows[order], kept.latents[order], kept.acts[order]
    selected = None if kept.selected is None else kept.selected[order]
    n_planes = n_groups + (dead is not None)
    if isinstance(dead, SparseActs):
        bag = torch.cat([bag, dead.rows + n_groups * batch])
        rows, latents = torch.cat([rows, dead.rows]), torch.cat([latents, dead.latents])
        acts = torch.cat([acts, dead.acts])
        selected = None if selected is None or dead.selected is None else torch.cat([selected, dead.selected])
    starts = bag_starts(bag, n_planes * batch)
    decoded = F.embedding_bag(latents, W_dec, starts, per_sample_weights=acts, mode="sum", include_last_offset=True)
    planes = decoded.view(n_planes, batch, d_out)
    if isinstance(dead, DeadBlock):  # no bag is of its plane
        dead.decode_(W_dec, planes[n_groups])
    planes = join(planes)
    decoded = planes.view(n_planes * batch, d_out)
    nested = nested_loss_(
        planes,
        _base(x, y, weights),
        weights=group_weights,
        target_variance=target_variance,
        aux_coef=None if dead is None else aux_coef,
        residual_scatter=residual_scatter,
    )
    d_acts = row_dots(starts, latents, decoded, W_dec)
    if selected is not None:
        d_acts = torch.where(selected, d_acts, 0.0)

    by_latent, order = latents.sort(stable=True)
    latent_starts = bag_starts(by_latent, d_sae)
    if selected is None:  # on a CPU, where additions have an order
        d_b_enc, decoder_dot = (torch.zeros(d_sae).index_add_(0, latents, values) for values in (d_acts, acts * d_acts))
    else:
        sums = bag_sums(torch.stack([d_acts, acts * d_acts], 1), order, latent_starts)
        d_b_enc, decoder_dot = sums[:, 0].contiguous(), sums[:, 1].contiguous()
    of_dead = None
    if isinstance(dead, DeadBlock):
        of_dead = dead.gradients(x, W_dec, planes[n_groups])
        of_dead.add_to("b_enc", d_b_enc)
        of_dead.add_to("decoder_dot", decoder_dot)
    small = {"b_enc": d_b_enc, "b_dec": decoded[:batch].sum(0)}
    if W_skip is not None:
        small["W_skip"] = x.t() @ decoded[:batch]
    sides = {"W_enc": (rows[order], d_acts[order], x), "W_dec": (bag[order], acts[order], decoded)}

    def gradient_rows(name: str, start: int, end: int) -> Tensor:
        index, values, table = sides[name]
        offsets = latent_starts
        if (start, end) != (0, d_sae):
            first, last = int(latent_starts[start]), int(latent_starts[end])
            index, values = index[first:last], values[first:last]
            offsets = latent_starts[start : end + 1] - first
        found = F.embedding_bag(index, table, offsets, per_sample_weights=values, mode="sum", include_last_offset=True)
        return found if of_dead is None else of_dead.add_to(name, found, start)

    return Gradients(nested, small, decoder_dot, gradient_rows, stored=False)


def prefix_errors(
    x: Tensor,
    y: Tensor,
    weights: dict[str, Tensor],
    kept: SparseActs,
    prefix_ends: Tensor,
    *,
    join: Callable[[Tensor], Tensor] = lambda planes: planes,
) -> Tensor:
    """sum over the batch of ||y_hat_i - y||^2 for each of the prefixes, [n_groups]; the arguments of sparse_gradients.

    One decode alone, for prefixes that are measured but not trained.
    """
    (batch, d_out), n_groups = y.shape, prefix_ends.shape[0]
    bag = torch.bucketize(kept.latents, prefix_ends, right=True, out_int32=True) * batch + kept.rows
    bag, order = bag.sort(stable=True)
    planes = F.embedding_bag(
        kept.latents[order],
        weights["W_dec"],
        bag_starts(bag, n_groups * batch),
        per_sample_weights=kept.acts[order],
        mode="sum",
        include_last_offset=True,
    )
    errors = join(planes.view(n_groups, batch, d_out)).cumsum(0).add_(_base(x, y, weights))
    return errors.square_().sum((1, 2), dtype=torch.float64)


def _base(x: Tensor, y: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """b_dec (+ x @ W_skip) - y, [batch, d_out]."""
    base = weights["b_dec"] - y
    return base if "W_skip" not in weights else torch.addmm(base, x, weights["W_skip"])
