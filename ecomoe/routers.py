"""Modules that turn tokens into a `Routing`.

A router computes in fp32 (fp64 inside an fp64 model) whatever the dtype around it: a rounding error
in a logit changes which expert a token reaches.

Which of them to choose is a question that the equifinality paper (arXiv:2604.14419) asks;
docs/routers.md sets them side by side.

Axes: N tokens, M of them that come, D features, E experts, K experts chosen for a token, P features
of the space that centroids lie in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecomoe import arguments
from ecomoe.activations import has_hooks
from ecomoe.closed_form import linear_twice
from ecomoe.routing import Routing, route, route_fixed, top_k_experts, without_autocast
from ecomoe.token_ids import INTEGERS, TokenIds, hash_scores


class Part(NamedTuple):
    """Some of a model's tokens, where a layer is not given all of them.

    Attributes:
        rows_M: Which tokens come, of the ``num_tokens``.
        num_tokens: All tokens.
    """

    rows_M: Tensor
    num_tokens: int


class Router(nn.Module):
    """What every router shares: precision, selection and the `Routing` it returns.

    A subclass computes the logits. A forward hook on a router sees the whole decision.

    Attributes:
        options: Names of the arguments that the class has of its own; see `build_router`.
        scores_apart: Whether it returns `Routing.own_logits_NE` in training.
        offset_wanted: Whether it returns `Routing.offset_N1` in training.
        part: Which of the model's tokens the call under way has; ``None`` for all. See `given`.
    """

    scores_apart = False
    offset_wanted = True
    part: Part | None = None

    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k

    def reset_parameters(self) -> None:
        """Draw fresh parameters, where there are any."""

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return the scores of all experts for fp32 (or fp64) tokens, ``(N, E)``.

        A constant may be taken from all of a token's: see `offset`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define logits(x_ND)")

    def offset(self, x_ND: Tensor) -> Tensor | None:
        """Return what `logits` takes from a token's scores, ``(N, 1)``; ``None`` for nothing."""
        return None

    def logits_apart(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores for tokens of any dtype, and once more without a gradient for these."""
        wide_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
        return self.logits(wide_ND), self.logits(wide_ND.detach())

    def expert_parameters(self) -> list[nn.Parameter]:
        """Return the parameters whose first axis counts experts; `ecomoe.rescue` writes them."""
        raise NotImplementedError(f"{type(self).__name__} must define expert_parameters()")

    def forward(
        self, x_ND: Tensor, temperature: Tensor, random_routing: Tensor | None = None
    ) -> Routing:
        """Route tokens of any floating dtype; see `ecomoe.routing.route`."""
        with without_autocast(x_ND):
            own_logits_NE = offset_N1 = None
            learns = self.training and torch.is_grad_enabled()
            if self.scores_apart and learns:
                logits_NE, own_logits_NE = self.logits_apart(x_ND)
            else:
                logits_NE = self.logits(x_ND.to(torch.promote_types(x_ND.dtype, torch.float32)))
            if self.offset_wanted and learns:
                offset_N1 = self.offset(x_ND.to(torch.promote_types(x_ND.dtype, torch.float32)))
            routing = route(
                logits_NE,
                top_k=self.top_k,
                temperature=temperature,
                random_routing=random_routing,
            )
            return routing._replace(own_logits_NE=own_logits_NE, offset_N1=offset_N1)

    @contextmanager
    def given(self, part: Part | None) -> Iterator[None]:
        """Let whoever knows something of each of the model's tokens know which of them come."""
        self.part = part
        try:
            yield
        finally:
            self.part = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(keep_wide(fn), recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Show sizes when printed."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}"


def keep_wide(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap the function of ``nn.Module._apply`` so that ``.half()`` and the like spare fp32 values.

    Moves between devices go through, and so does a change to a wider dtype.
    """

    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if tensor.is_floating_point() and result.itemsize < tensor.itemsize <= 4:
            return tensor.to(result.device)
        return result

    return apply


class Affine(nn.Module):
    """``x W^T + b``, but no `nn.Linear`: quantisers and adapters leave the router alone."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=dtype)
        )
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Draw as `nn.Linear` does: uniform within ``1/sqrt(in_features)``."""
        bound = 1.0 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)`` in the wider of the two dtypes."""
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return F.linear(x.to(wide), self.weight.to(wide), self.bias.to(wide))


class LinearRouter(Router):
    """One affine map from features to logits, as in most MoE transformers."""

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        top_k: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        self.score = Affine(d_model, num_experts, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh parameters."""
        self.score.reset_parameters()

    def expert_parameters(self) -> list[nn.Parameter]:
        """Return the last map's weight (E, D) and bias (E,)."""
        return [self.score.weight, self.score.bias]

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return the scores of all experts, ``(N, E)``."""
        return self.score(x_ND)  # type: ignore[no-any-return]

    def logits_apart(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `Router.logits_apart` does, from one product."""
        plain = type(self).logits is LinearRouter.logits and "logits" not in vars(self)
        if not plain or has_hooks(self.score) or x_ND.itemsize > self.score.weight.itemsize:
            return super().logits_apart(x_ND)
        return linear_twice(x_ND, self.score.weight, self.score.bias)


class MLPRouter(Router):
    """The E paper's router (section 3.1): D -> 128 -> E with a ReLU between."""

    hidden_features = 128

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        top_k: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        self.hidden = Affine(d_model, self.hidden_features, device=device, dtype=dtype)
        self.score = Affine(self.hidden_features, num_experts, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh parameters."""
        self.hidden.reset_parameters()
        self.score.reset_parameters()

    def expert_parameters(self) -> list[nn.Parameter]:
        """Return the last map's weight (E, D) and bias (E,)."""
        return [self.score.weight, self.score.bias]

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return the scores of all experts, ``(N, E)``."""
        return self.score(F.relu(self.hidden(x_ND)))  # type: ignore[no-any-return]


class CosineRouter(Router):
    """Scaled cosine between a token's place in a small space and learned centroids.

    ``logits = scale * cos(P x, c_e)``: the equifinality paper's geometric routing, whose space has
    64 dimensions. It has ``d_space * (D + E) + 1`` parameters where a linear map has ``D * E``. The
    scale is learned as its logarithm, so that it stays positive; it starts at 10 (as in CLIP and
    SigLIP), since the cosines alone would leave every gate near uniform. A temperature divides the
    scaled similarity.

    Args:
        d_model: Features D.
        num_experts: Experts E.
        top_k: Experts per token.
        d_space: Dimensions of the space. Tokens fill at most D of them, whatever P is; the parts of
            all centroids beyond do no more than weaken each expert's score, which one dimension
            does as well. So D + 1 is the bound, or 64 in a layer that is smaller.
        device: As for `nn.Linear`.
        dtype: As for `nn.Linear`.

    Raises:
        ValueError: ``d_space`` is no int from 1 to the bound.
    """

    options: ClassVar[tuple[str, ...]] = ("d_space",)
    initial_scale = 10.0
    projection: Tensor
    centroids: Tensor
    log_scale: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        top_k: int,
        d_space: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        self.d_space = arguments.size("d_space", d_space)
        most = max(d_model + 1, 64)
        if d_space > most:
            raise ValueError(
                f"d_space={d_space} must be an int from 1 to {most}: maps of d_model={d_model} "
                f"features fill no more than {d_model} dimensions; lower d_space"
            )
        self._declare("projection", torch.empty(d_space, d_model, device=device, dtype=dtype))
        self._declare("centroids", torch.empty(num_experts, d_space, device=device, dtype=dtype))
        # One element and not a scalar: FSDP shards no scalars.
        self._declare("log_scale", torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def _declare(self, name: str, tensor: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(tensor))

    def reset_parameters(self) -> None:
        """Draw a projection as `nn.Linear` does, and centroids in directions without preference."""
        with torch.no_grad():
            bound = 1.0 / math.sqrt(self.projection.shape[1])
            self.projection.uniform_(-bound, bound)
            self.centroids.normal_(std=self.d_space**-0.5)
            self.log_scale.fill_(math.log(self.initial_scale))

    def expert_parameters(self) -> list[nn.Parameter]:
        """Return the centroids (E, P)."""
        assert isinstance(self.centroids, nn.Parameter)
        return [self.centroids]

    def positions(self, x_ND: Tensor) -> Tensor:
        """Return the tokens' places in the space, ``(N, P)``; only their directions count."""
        wide = torch.promote_types(x_ND.dtype, self.projection.dtype)
        return F.linear(x_ND.to(wide), self.projection.to(wide))

    def cosines(self, x_ND: Tensor) -> Tensor:
        """Return the cosines between the tokens' places and the centroids, ``(N, E)``."""
        place_NP = F.normalize(self.positions(x_ND), dim=-1)
        centroid_EP = F.normalize(self.centroids.to(place_NP.dtype), dim=-1)
        return F.linear(place_NP, centroid_EP)

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return the scores of all experts less each token's greatest, ``(N, E)``.

        The softmax of either is the same. But a division of large scores by a low temperature costs
        digits of their differences, and the scale's gradient sums up multiples of them.
        """
        cosines_NE = self.cosines(x_ND)
        return self.log_scale.exp() * (cosines_NE - cosines_NE.amax(-1, keepdim=True))

    def offset(self, x_ND: Tensor) -> Tensor:
        """Return each token's greatest score, ``(N, 1)``."""
        return self.log_scale.exp() * self.cosines(x_ND).amax(-1, keepdim=True)

    def extra_repr(self) -> str:
        """Show sizes when printed."""
        return f"{super().extra_repr()}, d_space={self.d_space}"


class IsoCosineRouter(CosineRouter):
    """`CosineRouter` in the space that gives it as many parameters as a linear router has.

    The control for the number of parameters, the paper's "iso-parameter cosine": the largest space
    with ``d_space * (D + E) + 1 <= D * E + E``, and at least one dimension.
    """

    options: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        top_k: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        linear = d_model * num_experts + num_experts
        super().__init__(
            d_model,
            num_experts=num_experts,
            top_k=top_k,
            d_space=max((linear - 1) // (d_model + num_experts), 1),
            device=device,
            dtype=dtype,
        )


class RandomRouter(CosineRouter):
    """`CosineRouter` whose projection, centroids and scale stay as they were drawn.

    Tokens still go by what they are like, but nothing is learned about where: the paper's
    "random-fixed". (A random assignment that ignores the token's content is what `HashRouter` is.)
    The tensors are buffers, so that no optimizer and no ``requires_grad_(True)`` finds them.
    """

    # What stays as it was drawn is nobody's to give away.
    expert_parameters = Router.expert_parameters

    def _declare(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor)


class HashRouter(Router):
    """Experts fixed by the token id, in equal parts: hash layers (Roller et al. 2021).

    No parameter and no gradient. Each pair of token id and expert has a pseudo-random number, and
    the ``top_k`` experts of the highest are the token's; each layer draws a seed of its own. The
    choice is final, so its logits say so: 0 for the chosen experts, `route_fixed`'s margin below
    for the others.

    The ids come from the model's token embedding by `ecomoe.token_ids.feed_token_ids`, which
    `ecomoe.convert` calls. Under gradient checkpointing run one forward pass to a backward pass: a
    recomputation reads the ids of the last.

    Args:
        d_model: Not used; every router takes it.
        num_experts: Experts E.
        top_k: Experts per token.
        device: Where the seed is.
        dtype: Not used.
    """

    seed: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        top_k: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        self.tokens = TokenIds()
        # Saved with the model: the experts know the tokens that they were trained on.
        self.register_buffer("seed", torch.empty(1, dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw another seed."""
        self.seed.random_(2**32)

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return the numbers that rank the experts of each token, int64, ``(N, E)``."""
        ids = self.tokens.ids
        if ids is None:
            raise ValueError(
                "router='hash' goes by token ids, and this call has none; pass input_ids to a "
                "converted language model. In a model of your own, or where the embedding was "
                "replaced, call ecomoe.token_ids.feed_token_ids(model, embedding)"
            )
        if ids.dtype not in INTEGERS:
            raise ValueError(
                f"router='hash' got token ids of dtype {ids.dtype}, which must be integers; name "
                "the token embedding itself to feed_token_ids"
            )
        num_tokens = x_ND.shape[0] if self.part is None else self.part.num_tokens
        if ids.numel() != num_tokens:
            raise ValueError(
                f"router='hash' got {ids.numel()} token ids for {num_tokens} tokens and needs one "
                "a token; call the whole model, name the embedding that receives these tokens' ids "
                "to feed_token_ids, or choose another router where the model merges, adds or "
                "leaves out tokens"
            )
        ids_N = ids.reshape(-1).to(x_ND.device)
        ids_M = ids_N if self.part is None else ids_N[self.part.rows_M]
        return hash_scores(ids_M, num_experts=self.num_experts, seed=self.seed)

    def forward(
        self, x_ND: Tensor, temperature: Tensor, random_routing: Tensor | None = None
    ) -> Routing:
        """Route tokens by their ids; ``x_ND`` gives their number, device and precision."""
        wide_ND = x_ND.detach().to(torch.promote_types(x_ND.dtype, torch.float32))
        expert_ids_NK = top_k_experts(self.logits(wide_ND), top_k=self.top_k)
        return route_fixed(
            expert_ids_NK,
            num_experts=self.num_experts,
            temperature=temperature.to(wide_ND.dtype),
            random_routing=random_routing,
        )


ROUTERS: dict[str, type[Router]] = {
    "mlp": MLPRouter,
    "linear": LinearRouter,
    "cosine": CosineRouter,
    "cosine_iso": IsoCosineRouter,
    "hash": HashRouter,
    "random": RandomRouter,
}


def build_router(
    name: str,
    d_model: int,
    *,
    num_experts: int,
    top_k: int,
    options: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Router:
    """Return a router by its name in `ROUTERS`.

    Args:
        name: A key of `ROUTERS`.
        d_model: Features D.
        num_experts: Experts E.
        top_k: Experts per token.
        options: Arguments of the router's own, such as ``{"d_space": 32}``.
        device: As for `nn.Linear`.
        dtype: As for `nn.Linear`.

    Raises:
        ValueError: The name or an option is unknown, or an option's value breaks its rule.
    """
    arguments.choice("router", name, ROUTERS)
    build: Callable[..., Router] = ROUTERS[name]
    known = ROUTERS[name].options
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(
            f"router_options={options!r} must be a dict of the router's own arguments; pass e.g. "
            "{'d_space': 32}, or None"
        )
    unknown = [key for key in options or () if key not in known]
    if unknown:
        raise ValueError(
            f"router_options={options!r} names {_listed(unknown)}, and router={name!r} takes "
            f"{_listed(known) or 'no options'}; leave out "
            f"{_listed(unknown) if known else 'router_options'}"
        )
    return build(
        d_model,
        num_experts=num_experts,
        top_k=top_k,
        device=device,
        dtype=dtype,
        **(options or {}),
    )


def _listed(names: Iterable[object]) -> str:
    return ", ".join(repr(name) for name in names)
