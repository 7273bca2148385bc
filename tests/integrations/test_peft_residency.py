"""Many adapters of which a bounded number is in the model: tokens are those of each alone, whatever had to move."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import hf_paged
from hf_paged.engine.scheduler import Scheduler
from hf_paged.integrations.peft_checkpoints import load_adapter, unload_adapter
from tests.helpers import left_pad, make_model, native_calls, random_prompts
from tests.integrations.peft_models import alone, config, peft_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
NAMES = [f"r{i}" for i in range(6)]
PROMPTS = random_prompts([9, 4, 20, 33, 7, 5, 12, 6, 17, 3, 8, 11], seed=6)


def kinds(family: str) -> dict[str, Any]:
    made = {name: config(family, r=4 * (i + 1)) for i, name in enumerate(NAMES)}
    return made | {"r5": config(family, "dora")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    peft_model("llama", kinds("llama")).save_pretrained(folder)
    return {name: folder / name for name in NAMES}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    """Name -> what PEFT generates with it for each prompt."""
    model = peft_model("llama", kinds("llama"))
    return {name: [alone(model, p, name) for p in PROMPTS] for name in [*NAMES, "__base__"]}


def with_own(**options: Any) -> Any:
    """A PeftModel with an adapter that was made here, and is active."""
    return hf_paged.enable(peft_model("llama", {"own": config("llama")}), **options)


def loaded(folders: dict[str, Path], holder: str = "peft", **options: Any) -> Any:
    model = with_own(**options) if holder == "peft" else hf_paged.enable(make_model("llama"), **options)
    for name, folder in folders.items():
        load_adapter(model, folder, name)
    return model


def resident(model: Any) -> set[str]:
    return set(model.peft_config) & set(NAMES)


@pytest.mark.parametrize("holder", ["peft", "transformers"])
def test_more_adapters_than_may_be_in_the_model(folders: Any, expected: Any, holder: str) -> None:
    # transformers' own loader does not take DoRA.
    mine = NAMES if holder == "peft" else NAMES[:-1]
    model = loaded({name: folders[name] for name in mine}, holder, max_resident_adapters=2)
    most = 2 if holder == "peft" else 3  # what transformers made active stays besides
    assert len(resident(model)) == most
    names = [*mine, "__base__"] * 2
    prompts = PROMPTS[: len(names)] + PROMPTS[: max(0, len(names) - len(PROMPTS))]
    wanted = [expected[name][i % len(PROMPTS)] for i, name in enumerate(names)]
    with native_calls(model, len(names)):
        results = hf_paged.generate_many(model, prompts, adapters=names, **GREEDY)
    assert [r.error for r in results] == [None] * len(names)
    assert [r.token_ids for r in results] == wanted
    assert len(resident(model)) == most
    assert set(hf_paged.explain(model, **left_pad(PROMPTS)).adapters) >= set(mine)
    # The same again, with prefixes of adapters that have gone and come back.
    again = hf_paged.generate_many(model, prompts, adapters=names, **GREEDY)
    assert [r.token_ids for r in again] == wanted


def test_those_running_together_never_exceed_the_bound(folders: Any, expected: Any) -> None:
    model = loaded(folders, max_resident_adapters=3)
    seen = []
    schedule = Scheduler.schedule

    def watched(self: Scheduler) -> Any:
        plan = schedule(self)
        seen.append((len({s.adapters.names for s in self.running if s.adapters}), len(resident(model))))
        return plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "schedule", watched)
        results = hf_paged.generate_many(model, PROMPTS, adapters=NAMES * 2, **GREEDY)
    assert [r.token_ids for r in results] == [expected[n][i] for i, n in enumerate(NAMES * 2)]
    assert max(running for running, _ in seen) == 3
    assert max(there for _, there in seen) == 3


def test_adapter_names_of_the_peft_model(folders: Any, expected: Any) -> None:
    model = loaded(folders, max_resident_adapters=2)
    names = [*NAMES, "__base__", "r0", "r3", "r1", "r5", "r2"]
    with native_calls(model):
        output = model.generate(**left_pad(PROMPTS), **GREEDY, adapter_names=names, eos_token_id=None)
    for i, name in enumerate(names):
        kept = expected[name][i]
        assert output[i, 33 : 33 + len(kept)].tolist() == kept
    # What cannot be native must not lose the names that PEFT does not see.
    gone = next(name for name in NAMES if name not in resident(model))
    with pytest.raises(hf_paged.FallbackError, match="adapter_names needs the engine"):
        model.generate(**left_pad(PROMPTS), **GREEDY, adapter_names=[gone] * 12, use_cache=False)


def test_many_threads_and_preemption(folders: Any, expected: Any) -> None:
    model = loaded(folders, max_resident_adapters=2, kv_cache_memory=120_000, block_size=4)
    client = hf_paged.engine(model)
    wrong: list[Any] = []

    def work(start: int) -> None:
        for k in range(6):
            i = (start + 5 * k) % len(PROMPTS)
            name = [*NAMES, "__base__"][(start + k) % 7]
            result = client.submit(PROMPTS[i], adapter=name, **GREEDY).result(60)
            if result.error or result.token_ids != expected[name][i]:
                wrong.append((name, i, result))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(resident(model)) <= 2


def test_original_calls_find_their_adapter(folders: Any, expected: Any) -> None:
    """Requests that need the original `generate()` have theirs brought in, and what was active is put back."""
    model = loaded(folders, max_resident_adapters=1, fallback="silent")
    options = GREEDY | {"prefix_allowed_tokens_fn": lambda batch, ids: list(range(128))}
    results = hf_paged.generate_many(model, PROMPTS[:6], adapters=NAMES, **options)
    assert [r.token_ids for r in results] == [expected[n][i] for i, n in enumerate(NAMES)]
    assert hf_paged.stats(model).fallback_calls
    assert model.active_adapters == ["own"]
    assert len(resident(model)) == 1


def test_unload_and_replace_of_adapters_that_are_out(folders: Any, expected: Any) -> None:
    model = loaded(folders, max_resident_adapters=1)
    assert resident(model) == {"r5"}
    unload_adapter(model, "r0")
    with pytest.raises(hf_paged.InvalidRequestError, match="'r0' is not loaded"):
        hf_paged.engine(model).submit(PROMPTS[0], adapter="r0", **GREEDY)
    with pytest.raises(hf_paged.InvalidRequestError, match="'r0' is not loaded"):
        unload_adapter(model, "r0")
    with pytest.raises(hf_paged.InvalidRequestError, match="loaded already"):
        load_adapter(model, folders["r2"], "r1")
    load_adapter(model, folders["r2"], "r1", replace=True)
    (result,) = hf_paged.generate_many(model, PROMPTS[:1], adapters="r1", **GREEDY)
    assert result.token_ids == expected["r2"][0]


def test_weights_that_changed_here_are_never_dropped(folders: Any) -> None:
    model = loaded(folders, max_resident_adapters=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".r5." in name:
                parameter.mul_(-3.0)
    trained = alone_plain(model, "r5")
    hf_paged.generate_many(model, PROMPTS[:1], adapters="r0", **GREEDY)
    assert resident(model) == {"r5", "r0"}, "what was changed here stays, beside the one that may be there"
    (result,) = hf_paged.generate_many(model, PROMPTS[:1], adapters="r5", **GREEDY)
    assert result.token_ids == trained


def alone_plain(model: Any, name: str) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_PAGED_DISABLE", "1")
        tokens = alone(model, PROMPTS[0], name)
    model.set_adapter("own")
    return tokens


@pytest.mark.parametrize("what", ["changed", "gone"])
def test_a_folder_that_is_not_what_it_was_fails_its_requests_only(
    tmp_path: Path, expected: Any, what: str
) -> None:
    peft_model("llama", kinds("llama")).save_pretrained(tmp_path)
    model = loaded({name: tmp_path / name for name in NAMES}, max_resident_adapters=1)
    weights = tmp_path / "r0" / "adapter_model.safetensors"
    if what == "gone":
        weights.unlink()
    else:
        os.utime(weights, ns=(1, 1))
    results = hf_paged.generate_many(model, PROMPTS[:3], adapters=["r1", "r0", "r2"], **GREEDY)
    assert isinstance(results[1].error, hf_paged.InvalidRequestError)
    assert "has changed since it was loaded" in str(results[1].error)
    assert [results[0].token_ids, results[2].token_ids] == [expected["r1"][0], expected["r2"][2]]


def test_requests_for_more_adapters_than_may_be_there(folders: Any) -> None:
    model = loaded(folders, max_resident_adapters=2)
    with pytest.raises(hf_paged.InvalidRequestError, match="3 adapters for one request; max_resident"):
        hf_paged.engine(model).submit(PROMPTS[0], adapter=["r0", "r1", "r2"], **GREEDY)
    for bad in (0, -1, 2.5, "2", True):
        with pytest.raises(hf_paged.ConfigError, match="max_resident_adapters"):
            hf_paged.PagedConfig(max_resident_adapters=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("most", [None, 4])
def test_memory_of_adapters(tmp_path: Path, count: int, most: int | None) -> None:
    """Tensors beyond the base model's: the files of the adapters that may be in it plus five percent."""
    peft.get_peft_model(make_model("gpt2"), config("gpt2", r=64), adapter_name="x").save_pretrained(tmp_path)
    size = (tmp_path / "x" / "adapter_model.safetensors").stat().st_size
    model = hf_paged.enable(make_model("gpt2"), max_resident_adapters=most)
    load_adapter(model, tmp_path / "x", "first")
    before = tensors()  # held, so that what other tests left behind does not go meanwhile
    for i in range(count):
        load_adapter(model, tmp_path / "x", f"n{i}")
    names = [f"n{i}" for i in range(0, count, max(1, count // 12))]
    hf_paged.generate_many(model, [PROMPTS[0]] * len(names), adapters=names, **GREEDY)
    hf_paged.release_memory(model)
    # Whatever the bound is, those that are in the model are all that is there.
    grown = num_bytes(tensors()) - num_bytes(before)
    assert 0.9 * size < grown / (count if most is None else most) <= 1.05 * size


def tensors() -> list[torch.Tensor]:
    """Those of this process with a storage of their own: other tests may have left sparse ones."""
    gc.collect()
    found = (o for o in gc.get_objects() if isinstance(o, torch.Tensor))
    return [t for t in found if t.device.type == "cpu" and t.layout is torch.strided]


def num_bytes(some: list[torch.Tensor]) -> int:
    """Bytes of all storages that they hold."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in some}.values())
