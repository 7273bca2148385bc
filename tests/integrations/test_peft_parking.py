"""Adapters that leave the model for host memory come back as they were, without being read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_paged
from hf_paged.engine import registry
from hf_paged.integrations import peft_checkpoints
from hf_paged.integrations.peft_checkpoints import load_adapter, unload_adapter
from hf_paged.integrations.peft_parking import HostMover, host_budget
from hf_paged.resolve import resolve_model
from tests.helpers import make_model, random_prompts
from tests.integrations.peft_models import alone, config, peft_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
NAMES = [f"r{i}" for i in range(5)]
PROMPTS = random_prompts([9, 4, 20, 33, 7], seed=6)


def kinds() -> dict[str, Any]:
    made = {name: config("llama", r=4 * (i + 1)) for i, name in enumerate(NAMES[:3])}
    return made | {"r3": config("llama", "lora_bias"), "r4": config("llama", "dora")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    peft_model("llama", kinds()).save_pretrained(folder)
    return {name: folder / name for name in NAMES}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    model = peft_model("llama", kinds())
    return {name: alone(model, PROMPTS[0], name) for name in NAMES}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of adapters that PEFT reads from their folders."""
    names: list[str] = []
    load = peft_checkpoints.load_into
    monkeypatch.setattr(
        peft_checkpoints,
        "load_into",
        lambda holder, path, name: names.append(name) or load(holder, path, name),
    )
    return names


class Elsewhere(HostMover):
    """A device: what moves gets other storage, on either side."""

    def __init__(self) -> None:
        self.out = self.back = 0

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        self.out += 1
        return tensor.clone()

    def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        self.back += 1
        assert device == torch.device("cpu")
        return tensor.clone()


def loaded(folders: dict[str, Path], names: list[str], holder: str = "peft", **options: Any) -> Any:
    model = peft_model("llama", {"own": config("llama")}) if holder == "peft" else make_model("llama")
    hf_paged.enable(model, **({"max_resident_adapters": 1, "adapter_host_memory": "1GiB"} | options))
    for name in names:
        load_adapter(model, folders[name], name)
    return model


def residency(model: Any) -> Any:
    return registry.get(resolve_model(model)).adapters.residency


def parked(model: Any) -> list[str]:
    return [name for name, one in residency(model)._known.items() if one.parked is not None]


def bring_in(model: Any, name: str) -> None:
    with hf_paged.paused(model):
        assert residency(model).bring_in([name], ())


def serve(model: Any, name: str) -> list[int]:
    (result,) = hf_paged.generate_many(model, PROMPTS[:1], adapters=name, **GREEDY)
    assert result.error is None
    return result.token_ids


def all_of(model: Any) -> dict[str, dict[str, Any]]:
    """Layer -> table -> what is there by name of an adapter, as objects."""
    found = {}
    for path, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            tables = (*layer.adapter_layer_names, *layer.other_param_names)
            found[path] = {t: dict(getattr(layer, t).items()) for t in tables}
    return found


@pytest.mark.parametrize("holder", ["peft", "transformers"])
@pytest.mark.parametrize("device", ["host", "elsewhere"])
def test_tokens_are_those_of_each_alone_and_nothing_is_read_again(
    folders: Any, expected: Any, reads: list[str], holder: str, device: str
) -> None:
    names = NAMES[:4]
    model = loaded(folders, names, holder)
    mover = residency(model)._mover = Elsewhere() if device == "elsewhere" else HostMover()
    for _ in range(2):
        for name in names:
            assert serve(model, name) == expected[name]
    results = hf_paged.generate_many(model, PROMPTS[:1] * 4, adapters=names, **GREEDY)
    assert [r.token_ids for r in results] == [expected[name] for name in names]
    assert reads == names, "each once, when it was loaded"
    assert len(parked(model)) >= 2
    if isinstance(mover, Elsewhere):
        assert mover.back > 0
        assert mover.out >= mover.back


@pytest.mark.parametrize("device", ["host", "elsewhere"])
def test_it_comes_back_as_it_was(folders: Any, device: str) -> None:
    model = loaded(folders, ["r3", "r2"])
    if device == "elsewhere":
        residency(model)._mover = Elsewhere()
    bring_in(model, "r3")
    before, state = all_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    settings, active = model.peft_config["r3"], model.active_adapters
    bring_in(model, "r2")
    assert "r3" not in model.peft_config
    assert not any(".r3." in key for key in model.state_dict())
    assert not any("r3" in table for tables in all_of(model).values() for table in tables.values())
    bring_in(model, "r3")
    after = all_of(model)
    assert after.keys() == before.keys()
    for path, tables in before.items():
        for table, values in tables.items():
            assert after[path][table].keys() == values.keys()
            assert all(after[path][table][name] is value for name, value in values.items())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.peft_config["r3"] is settings
    assert model.active_adapters == active
    model.delete_adapter("r3")  # PEFT has all it needs for that
    assert not any(".r3." in key for key in model.state_dict())


def test_what_peft_itself_generates_with_it(folders: Any, expected: Any, monkeypatch: Any) -> None:
    model = loaded(folders, ["r1", "r2"])
    bring_in(model, "r1")
    monkeypatch.setenv("HF_PAGED_DISABLE", "1")
    assert alone(model, PROMPTS[0], "r1") == expected["r1"]


def test_beyond_its_memory_the_least_recently_used_are_read_again(
    folders: Any, expected: Any, reads: list[str]
) -> None:
    model = loaded(folders, NAMES[:4])
    sizes = {name: residency(model)._known[name].parked.num_bytes for name in NAMES[:3]}
    residency(model)._host_bytes = sizes["r1"] + sizes["r2"]
    bring_in(model, "r0")  # r3 leaves, and with it there is room for none but r3 and maybe r2
    kept = parked(model)
    assert kept[-1] == "r3"
    assert "r1" not in kept
    assert sum(residency(model)._known[name].parked.num_bytes for name in kept) <= sizes["r1"] + sizes["r2"]
    reads.clear()
    assert [serve(model, name) for name in NAMES[:4]] == [expected[name] for name in NAMES[:4]]
    assert "r1" in reads


def test_prefixes_are_found_again(folders: Any) -> None:
    model = loaded(folders, ["r1", "r2"], block_size=4)
    serve(model, "r1")
    bring_in(model, "r2")
    hits = hf_paged.stats(model).prefix_hit_tokens
    serve(model, "r1")
    assert hf_paged.stats(model).prefix_hit_tokens == hits + 8


def test_edited_while_it_was_out_it_is_served_as_edited_and_stays(folders: Any, expected: Any) -> None:
    model = loaded(folders, ["r1", "r2"], block_size=4)
    assert serve(model, "r1") == expected["r1"]
    held = [p for key, p in model.named_parameters() if ".r1." in key]
    bring_in(model, "r2")
    with torch.no_grad():
        for parameter in held:
            parameter.mul_(-3.0)
    residency(model)._host_bytes = 1
    residency(model)._keep_within_budget()
    assert parked(model) == ["r1"], "the edit is nowhere else"
    with pytest.MonkeyPatch.context() as patch:
        edited = serve(model, "r1")
        patch.setenv("HF_PAGED_DISABLE", "1")
        assert edited == alone(model, PROMPTS[0], "r1") != expected["r1"]
    model.set_adapter("own")
    bring_in(model, "r2")
    assert set(model.peft_config) == {"own", "r1", "r2"}


def test_other_kinds_are_read_again(folders: Any, expected: Any, reads: list[str]) -> None:
    model = loaded(folders, ["r4", "r1"])
    assert parked(model) == []
    assert serve(model, "r4") == expected["r4"]
    assert reads == ["r4", "r1", "r4"]


def test_a_model_that_was_converted_meanwhile_gets_it_from_the_folder(folders: Any, reads: list[str]) -> None:
    model = loaded(folders, ["r1", "r2"])
    model.to(torch.float64)
    bring_in(model, "r1")
    assert reads == ["r1", "r2", "r1"]


def test_an_edit_that_cannot_be_put_back_is_said(folders: Any) -> None:
    model = loaded(folders, ["r1"])
    held = [p for key, p in model.named_parameters() if ".r1." in key]
    load_adapter(model, folders["r2"], "r2")
    with torch.no_grad():
        held[0].add_(1.0)
    model.to(torch.float64)
    with (
        pytest.raises(hf_paged.InvalidRequestError, match="changed while it was out"),
        hf_paged.paused(model),
    ):
        residency(model).bring_in(["r1"], ())


def test_unloaded_it_is_gone(folders: Any, expected: Any) -> None:
    model = loaded(folders, ["r1", "r2"])
    unload_adapter(model, "r1")
    assert parked(model) == []
    with pytest.raises(hf_paged.InvalidRequestError, match="'r1' is not loaded"):
        hf_paged.engine(model).submit(PROMPTS[0], adapter="r1", **GREEDY)
    load_adapter(model, folders["r0"], "r2", replace=True)
    load_adapter(model, folders["r1"], "r1")
    assert serve(model, "r2") == expected["r0"]


def test_how_much_is_kept_where_nobody_has_said(folders: Any) -> None:
    assert host_budget(torch.device("cpu"), None) == 0, "a second place in the same memory"
    assert host_budget(torch.device("cuda"), None) > 1 << 20
    assert host_budget(torch.device("cuda"), 5) == 5
    model = loaded(folders, ["r1", "r2"], adapter_host_memory=None)
    assert parked(model) == []
    for bad in (0, -1, "much", True):
        with pytest.raises(hf_paged.ConfigError, match="adapter_host_memory"):
            hf_paged.PagedConfig(adapter_host_memory=bad)


@pytest.mark.gpu
def test_on_cuda_what_is_out_is_in_pinned_host_memory(folders: Any) -> None:
    model = hf_paged.enable(
        peft_model("llama", {"own": config("llama")}).to("cuda"),
        max_resident_adapters=1,
        adapter_host_memory="1GiB",
    )
    load_adapter(model, folders["r1"], "r1")
    before = {key: value.cpu() for key, value in model.state_dict().items() if ".r1." in key}
    tokens = serve(model, "r1")
    held = [p for key, p in model.named_parameters() if ".r1." in key]
    load_adapter(model, folders["r2"], "r2")
    assert parked(model) == ["r1"]
    assert all(p.device.type == "cpu" and p.is_pinned() for p in held)
    assert serve(model, "r1") == tokens
    assert all(p.device.type == "cuda" for p in held)
    after = {key: value.cpu() for key, value in model.state_dict().items() if ".r1." in key}
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
