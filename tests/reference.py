"""A mixture of experts in plain loops over tokens and experts: what EcoMoE is checked against.

It shares no code with the package and follows the definitions, term by term; autograd
differentiates it. Slow on purpose.
"""

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "identity": lambda x: x,
}


class Outcome(NamedTuple):
    output: Tensor
    terms: dict[str, Tensor]  # auxiliary losses before their weights
    auxiliary: Tensor  # their weighted sum
    expert_ids: list[list[int]]


class LoopMoE:
    """The mixture that an EcoMoE layer describes, in fp64 from a copy of its parameters.

    Attributes:
        parameters: By the layer's own names.
    """

    def __init__(self, layer, *, activation="gelu"):
        self.layer = layer
        self.activation = ACTIVATIONS[activation]
        self.parameters = {
            name: parameter.detach().double().clone().requires_grad_(parameter.requires_grad)
            for name, parameter in layer.named_parameters()
        }
        self.buffers = {name: buffer.double() for name, buffer in layer.named_buffers()}
        self.temperature = layer.temperature.double().item()
        self.dense = copy.deepcopy(layer.dense).double() if layer.dense is not None else None

    @property
    def hashed(self):
        return hasattr(self.layer.router, "tokens")

    def __call__(self, x, targets=None) -> Outcome:
        layer = self.layer
        tokens = x.reshape(-1, layer.d_model)
        logits, ids, outputs, combined = [], [], [], []
        for place, token in enumerate(tokens):
            scores = self.score(token, place)
            ranked = sorted(zip((-scores).tolist(), range(layer.num_experts), strict=True))
            chosen = [e for _, e in ranked[: layer.top_k]]
            gates = self.gates(scores, chosen)
            if self.hashed:  # the choice is all there is: neither near misses nor preferences
                gates = [1 / layer.top_k] * layer.top_k
                scores = torch.tensor(
                    [0.0 if e in chosen else -100.0 for e in range(layer.num_experts)]
                ).double()
            answers = [self.expert(e, token) for e in chosen]
            logits.append(scores)
            ids.append(chosen)
            outputs.append(answers)
            combined.append(sum(g * y for g, y in zip(gates, answers, strict=True)))
        output = (
            torch.stack(combined) if combined else tokens.new_zeros(0, layer.experts.d_output)
        ).reshape(*x.shape[:-1], layer.experts.d_output)
        terms = self.terms(tokens, logits, ids, outputs, targets) if combined else {}
        weights = self.weights()
        auxiliary = sum((weights[name] * term for name, term in terms.items()), torch.zeros(()))
        return Outcome(output, terms, auxiliary, ids)

    def score(self, token, place):
        if self.hashed:
            token_id = self.layer.router.tokens.ids.flatten()[place].item()
            return self.hash_scores(token_id)
        if "router.centroids" in self.parameters or "router.centroids" in self.buffers:
            return self.cosines(token)

        def affine(name, v):
            return (
                self.parameters[f"router.{name}.weight"] @ v
                + self.parameters[f"router.{name}.bias"]
            )

        if "router.hidden.weight" in self.parameters:
            hidden = affine("hidden", token)
            return affine("score", torch.where(hidden > 0, hidden, torch.zeros_like(hidden)))
        return affine("score", token)

    def cosines(self, token):
        known = self.buffers | self.parameters
        position = known["router.projection"] @ token
        cosines = [cosine(position, centroid) for centroid in known["router.centroids"]]
        return torch.exp(known["router.log_scale"]) * torch.stack(cosines)

    def hash_scores(self, token_id):
        seed = int(self.layer.router.seed)
        experts = range(self.layer.num_experts)
        mixed = mix32(token_id + seed)
        return torch.tensor([mix32(mixed + mix32(e)) for e in experts], dtype=torch.float64)

    def gates(self, scores, chosen):
        if len(chosen) == 1:  # always 1, with the gradient of log p
            p = self.softmax(scores, self.temperature)[chosen[0]]
            return [p / p.detach()]
        exponentials = [torch.exp(scores[e] / self.temperature) for e in chosen]
        return [value / sum(exponentials) for value in exponentials]

    def expert(self, e, token):
        def linear(name, v):
            y = self.parameters[f"experts.{name}.weight"][e] @ v
            bias = self.parameters.get(f"experts.{name}.bias")
            return y if bias is None else y + bias[e]

        if self.layer.d_hidden is None:
            return linear("head", token)
        if self.layer.experts.gated:
            both = linear("gate_up_proj", token)
            half = self.layer.d_hidden
            hidden = self.activation(both[:half]) * both[half:]
        else:
            hidden = self.activation(linear("up_proj", token))
        return linear("down_proj", hidden)

    def weights(self):
        layer, control = self.layer, self.layer.control
        return {
            "balance": layer.strength * control.balance_weight,
            "starvation": 0.04 if layer.strength * control.balance_weight > 0 else 0.0,
            "entropy": layer.strength * control.entropy_weight,
            "oracle": layer.strength * control.oracle_weight,
            "prototype": 1.0,
            "ortho": layer.ortho_weight,
            "divergence": layer.divergence_weight,
            "z": layer.z_weight,
        }

    def terms(self, tokens, logits, ids, outputs, targets):
        weights = self.weights()
        terms = {}
        if weights["balance"]:
            terms["balance"] = self.balance(logits, ids)
        if weights["starvation"] and self.layer.usage_floor:
            # Its gradient stays in the router.
            own = [self.score(t.detach(), place) for place, t in enumerate(tokens)]
            starvation = self.starvation(logits if self.hashed else own, ids)
            first = self.layer.control.temperature
            last = min(first, self.layer.control.final_temperature)
            annealed = (first - self.temperature) / (first - last) if first > last else 1.0
            terms["starvation"] = (0.05 + 0.95 * annealed) * starvation
        if weights["entropy"]:
            terms["entropy"] = self.entropy(logits)
        if weights["oracle"]:
            terms["oracle"] = self.oracle(tokens, logits, targets)
        prototypes = self.parameters.get("prototypes")
        if prototypes is not None:
            terms["prototype"] = mean(
                1 - cosine(token.detach(), prototypes[chosen[0]])
                for token, chosen in zip(tokens, ids, strict=True)
            )
        if weights["ortho"]:
            terms["ortho"] = mean_squared_cosine(list(prototypes))
        if weights["divergence"]:
            terms["divergence"] = mean(mean_squared_cosine(answers) for answers in outputs)
        if weights["z"]:
            terms["z"] = mean(torch.log(torch.exp(scores).sum()) ** 2 for scores in logits)
        return terms

    def balance(self, logits, ids):
        num_experts, num_tokens = self.layer.num_experts, len(ids)
        importance = [
            sum(self.softmax(scores)[e] for scores in logits) / num_tokens
            for e in range(num_experts)
        ]
        loss = sum(p * torch.log(p * num_experts) for p in importance)
        firsts = [chosen[0] for chosen in ids]
        slots = [e for chosen in ids for e in chosen]
        for choices in (firsts, slots):
            shares = [choices.count(e) / len(choices) for e in range(num_experts)]
            variation = num_experts * sum(share**2 for share in shares) - 1
            # The value is that of the counts, the gradient the documented one.
            slope = 2 * num_experts * sum(f * p for f, p in zip(shares, importance, strict=True))
            loss = loss + (variation + slope - slope.detach()) / 2
        return loss

    def starvation(self, logits, ids):
        num_experts, loss = self.layer.num_experts, torch.zeros(())
        slots = [e for chosen in ids for e in chosen]
        firsts = [chosen[0] for chosen in ids]
        for e in range(num_experts):
            usage = num_experts * min(firsts.count(e) / len(firsts), slots.count(e) / len(slots))
            want = max(0.0, 1 - usage / self.layer.usage_floor)
            chances = [
                self.softmax(scores)[e] * (chosen[0] != e)
                for scores, chosen in zip(logits, ids, strict=True)
            ]
            # As fp32 can tell it: the layer's router is that wide.
            unit = mean(chances).detach().clamp_min(torch.finfo(torch.float32).tiny)
            first, eighth = (
                mean((chance / unit) ** order for chance in chances).clamp_min(2.0 ** (-8 * order))
                for order in (1, 8)
            )
            inclined = (1 - want) * torch.log(eighth) / 8 + want * torch.log(first)
            loss = loss - want * (inclined + torch.log(unit))
        return loss

    def entropy(self, logits):
        def token_entropy(scores):
            probs = self.softmax(scores, self.temperature)
            return -sum(p * torch.log(p) for p in probs if p > 0)

        return math.log(self.layer.num_experts) - mean(token_entropy(scores) for scores in logits)

    def oracle(self, tokens, logits, targets):
        teachers = self.teachers(tokens.detach(), targets)
        return mean(
            sum(
                t * (torch.log(t) - torch.log(p))
                for t, p in zip(teacher.detach(), self.softmax(scores), strict=True)
            )
            for teacher, scores in zip(teachers, logits, strict=True)
        )

    def teachers(self, tokens, targets):
        layer = self.layer
        every = range(layer.num_experts)
        if layer.oracle == "competence":
            for token, target in zip(tokens, targets.reshape(-1).tolist(), strict=True):
                losses = [-torch.log(self.softmax(self.expert(e, token)))[target] for e in every]
                yield self.softmax(-torch.stack(losses))
        elif layer.oracle == "dense":
            answers = [self.dense(token) for token in tokens]
            scale = mean((answer**2).mean() for answer in answers)
            for token, answer in zip(tokens, answers, strict=True):
                distances = [((self.expert(e, token) - answer) ** 2).mean() for e in every]
                yield self.softmax(-torch.stack(distances) / scale)
        elif layer.oracle == "prototype":
            for token in tokens:
                cosines = [cosine(token, self.parameters["prototypes"][e]) for e in every]
                yield self.softmax(10.0 * torch.stack(cosines))
        else:
            yield from layer.oracle(tokens)

    @staticmethod
    def softmax(scores, temperature=1.0):
        exponentials = torch.exp(scores / temperature)
        return exponentials / exponentials.sum()


def mix32(number):
    """The documented mixing of bits, on Python's integers, which cannot overflow."""
    number %= 2**32
    number = (number ^ (number >> 16)) * 0x2C1B3C6D % 2**32
    number = (number ^ (number >> 12)) * 0x297A2D39 % 2**32
    return number ^ (number >> 15)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def cosine(a, b):
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def mean_squared_cosine(vectors):
    pairs = [(a, b) for a in vectors for b in vectors if a is not b]
    return mean(cosine(a, b) ** 2 for a, b in pairs) if pairs else torch.zeros(())
