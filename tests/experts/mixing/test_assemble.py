"""Mixtures laid together from adapters whose gates were made apart; many tasks in one batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from some_mixtures import some_mixture
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from experts.errors import MixingError
from experts.mixing import LayerAdapter, RequestMixture, assemble_mixture, install_mixture, load_mixture
from experts.mixing.post_hoc import glider_bias

Adapters = dict[str, dict[str, LayerAdapter]]


@pytest.fixture
def parts(model: nn.Module, adapters: Adapters, tmp_path: Path) -> Path:
    """A folder with each adapter's own mixture, by gate and name."""
    for gate in ("glider", "arrow", "mole"):
        for name, adapter in adapters.items():
            mixture = some_mixture(model, {name: adapter}, gate, {} if gate == "mole" else {"k": 1})
            folder = tmp_path / "parts" / gate / name
            folder.mkdir(parents=True)
            mixture.save(folder)
            mixture.remove()
    return tmp_path / "parts"


def assembled(parts: Path, gate: str, names: str, folder: Path) -> Path:
    gates = {name: parts / gate / name / "gate.safetensors" for name in names}
    assemble_mixture(gates, {name: parts / gate / name / "adapters" / name for name in names}, folder)
    return folder


@pytest.mark.parametrize("gate", ["glider", "arrow"])
def test_rows_are_those_of_the_parts_bit_for_bit(
    gate: str, parts: Path, model: nn.Module, base_folder: Path, tmp_path: Path
) -> None:
    mixture = load_mixture(model, assembled(parts, gate, "abcd", tmp_path / "all"))
    assert mixture.options.model_dump()["k"] == {"glider": 2, "arrow": 3}[gate]
    for number, name in enumerate("abcd"):
        own = load_mixture(AutoModelForCausalLM.from_pretrained(base_folder), parts / gate / name)
        for layer, one in own.gates.items():
            row = mixture.layers[layer].adapters.index(number)
            for key, tensor in one.state_dict().items():
                torch.testing.assert_close(mixture.gates[layer].state_dict()[key][row], tensor[0], rtol=0, atol=0)


def test_an_assembled_arrow_is_the_installed_one(
    parts: Path, model: nn.Module, adapters: Adapters, base_folder: Path, tokens: Tensor, tmp_path: Path
) -> None:
    load_mixture(model, assembled(parts, "arrow", "abcd", tmp_path / "all"))
    other = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    install_mixture(other, adapters, "arrow")
    torch.testing.assert_close(model(tokens).logits, other(tokens).logits, rtol=1e-4, atol=1e-5)


def test_another_adapter_leaves_files_and_rows_as_they_were(parts: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    fewer, more = (assembled(parts, "glider", names, tmp_path / names) for names in ("ab", "abc"))
    for file in sorted((fewer / "adapters").rglob("*.*")):
        assert (more / file.relative_to(fewer)).read_bytes() == file.read_bytes()
    small, large = (load_file(folder / "gate.safetensors") for folder in (fewer, more))
    for key, rows in small.items():
        assert torch.equal(large[key][: len(rows)], rows)


def test_what_cannot_be_laid_together_is_refused(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(MixingError, match="made for all its adapters together"):
        assembled(parts, "mole", "ab", tmp_path / "m")
    with pytest.raises(MixingError, match="at least one adapter"):
        assemble_mixture({}, {}, tmp_path / "m")
    one, other = (parts / gate / "a" / "gate.safetensors" for gate in ("glider", "arrow"))
    with pytest.raises(MixingError, match="several methods: arrow, glider"):
        assemble_mixture({"a": one, "b": other}, {}, tmp_path / "m")
    with pytest.raises(MixingError, match="'b' is that of a"):
        assemble_mixture({"b": one}, {}, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_each_adapter_may_have_its_own_threshold() -> None:
    similarity = torch.tensor([[0.7, 0.2], [0.4, 0.5]])
    bias = glider_bias(similarity, threshold=torch.tensor([0.6, 0.9]))
    torch.testing.assert_close(bias, torch.tensor([[103 * 0.7, 103 * 0.2], [3 * 0.4, 3 * 0.5]]))


def test_requests_of_eight_tasks_share_a_batch(base_folder: Path, adapters: Adapters, model: nn.Module) -> None:
    """32 requests, each steered to its task: the same tokens as alone, greedily, through prompt and steps."""
    many = {f"{name}{copy}": adapter for name, adapter in adapters.items() for copy in "xy"}
    mixture = some_mixture(model, many, "glider")
    generator = torch.Generator().manual_seed(1)
    similarity = torch.rand(32, len(many), generator=generator) * 0.5
    similarity[torch.arange(32), torch.arange(32) % 8] += 0.45  # some are sure of their task, some are not
    rows = glider_bias(similarity).tolist()
    wishes = [RequestMixture(bias=dict(zip(many, row, strict=True))) for row in rows]
    prompts = torch.randint(3, 200, (32, 5), generator=generator)

    def answer(prompt: Tensor, own: list[RequestMixture]) -> Tensor:
        with mixture.requests(own):
            made = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
        return made[:, 5:]

    together = answer(prompts, wishes)
    for row, wish in enumerate(wishes):
        assert torch.equal(answer(prompts[row : row + 1], [wish])[0], together[row])
    plain = answer(prompts, [RequestMixture()] * 32)
    assert (plain != together).any(1).sum() > 8  # the bias matters
