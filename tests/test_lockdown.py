import pytest
import torch

from ecomoe.ecology.lockdown import gumbel_noise, probe_counts, probe_rows


def counts(logits_ME, *, temperature=1.0, top_k=2, valid_M=None):
    gumbel_ME = gumbel_noise(logits_ME.shape[1], num_probes=logits_ME.shape[0])
    sums = probe_counts(
        logits_ME, top_k=top_k, temperature=temperature, gumbel_ME=gumbel_ME, valid_M=valid_M
    )
    return {name: value.item() for name, value in sums.items()}


def test_certain_router_never_flips_and_undecided_one_nearly_always():
    certain = 1000.0 * torch.arange(8.0).expand(64, 8)
    assert counts(certain) == {"probes": 64, "flips": 0, "margin": 64 * 1000.0}
    undecided = torch.zeros(64, 8)
    # A random pair equals a given one with probability 1/28.
    assert counts(undecided)["flips"] > 50


def test_temperature_decides_what_noise_can_flip():
    logits_ME = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    flips = [counts(logits_ME, temperature=t)["flips"] for t in (0.01, 0.3, 3.0)]
    assert flips[0] < flips[1] < flips[2]


def test_nothing_flips_where_all_are_chosen():
    assert counts(torch.zeros(8, 2))["probes"] == 0


def test_padding_and_nan_are_left_out():
    logits_ME = torch.zeros(4, 4)
    logits_ME[0] = torch.nan
    found = counts(logits_ME, valid_M=torch.tensor([True, True, False, True]))
    assert found["probes"] == 2
    assert found["margin"] == 0


@pytest.mark.parametrize("num_tokens", [1, 5, 64, 1000])
def test_rows_are_spread_and_in_range(num_tokens):
    rows = probe_rows(num_tokens, device=torch.device("cpu"))
    assert rows.min() == 0
    assert rows.max() < num_tokens
    assert len(rows.unique()) == min(64, num_tokens)


def test_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    noise = gumbel_noise(4)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(noise, gumbel_noise(4))
    assert noise.isfinite().all()
