"""Adapters by the name of the model: each request its own, loaded before or, where it is allowed, at run time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_paged
from hf_paged.integrations.peft_checkpoints import load_adapter
from tests.helpers import demo_model
from tests.server.support import Running, error_of, running
from tests.server.test_limits import LONG, start, wait_for

BODY = {"prompt": "The list of", "max_tokens": 16, "temperature": 0}


def save(folder: Path, seed: int, rank: int = 4, hidden_from: str = "llama") -> Path:
    """A LoRA of the demo model whose weights change what it says."""
    model = demo_model(hidden_from)
    targets = ["q_proj", "v_proj"] if hidden_from == "llama" else ["c_attn"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=rank, lora_alpha=8 * rank, target_modules=targets, init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints `one`, `two` and those that must not be loaded."""
    root = tmp_path_factory.mktemp("adapters")
    save(root / "one", 1)
    save(root / "nested" / "two", 2)
    save(root / "wide", 3, rank=64)
    save(root / "other-base", 4, hidden_from="gpt2")
    shutil.copytree(root / "one", root / "not-numbers")
    weights = load_file(root / "one" / "adapter_model.safetensors")
    first = next(iter(weights))
    weights[first][0, 0] = float("nan")
    save_file(weights, root / "not-numbers" / "adapter_model.safetensors")
    shutil.copytree(root / "one", root / "pickle")
    (root / "pickle" / "adapter_model.safetensors").unlink()
    torch.save({}, root / "pickle" / "adapter_model.bin")
    shutil.copytree(root / "one", root / "bad-config")
    (root / "bad-config" / "adapter_config.json").write_text("[]")
    outside = tmp_path_factory.mktemp("outside")
    save(outside / "three", 5)
    (root / "link").symlink_to(outside / "three")
    shutil.copytree(root / "one", root / "linked-weights")
    (root / "linked-weights" / "adapter_model.safetensors").unlink()
    (root / "linked-weights" / "adapter_model.safetensors").symlink_to(
        outside / "three" / "adapter_model.safetensors"
    )
    return root


def expected(folder: Path | None, tokenizer: Any) -> str:
    """What PEFT itself says."""
    model = demo_model("llama")
    tuned = model if folder is None else peft.PeftModel.from_pretrained(model, folder).eval()
    inputs = tokenizer(BODY["prompt"], return_tensors="pt")
    output = tuned.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def text(client: httpx.Client, model: str) -> str:
    response = client.post("/v1/completions", json=BODY | {"model": model})
    assert response.status_code == 200, response.text
    assert response.json()["model"] == model
    return response.json()["choices"][0]["text"]


@pytest.fixture
def dynamic(checkpoints: Path, tokenizer: Any) -> Iterator[Running]:
    """A server that loads adapters from the folder of checkpoints."""
    model = demo_model("llama")
    limits: dict[str, Any] = {"max_adapters": 2, "max_adapter_rank": 16}
    with running(model, tokenizer, model_names=("base",), adapter_root=checkpoints, **limits) as server:
        yield server
        server.wait_until_empty()
    hf_paged.disable(model)


def test_each_request_runs_with_the_adapter_it_names(checkpoints: Path, tokenizer: Any) -> None:
    model = demo_model("llama")
    folders = {"base": None, "one": checkpoints / "one", "two": checkpoints / "nested" / "two"}
    wanted = {name: expected(folder, tokenizer) for name, folder in folders.items()}
    assert len(set(wanted.values())) == 3
    with running(model, tokenizer, model_names=("base",)) as server, server.client() as client:
        for name in ("one", "two"):
            load_adapter(model, folders[name], name)  # type: ignore[arg-type]
        with ThreadPoolExecutor(6) as threads:
            names = list(wanted) * 4
            assert list(threads.map(lambda name: text(client, name), names)) == [
                wanted[name] for name in names
            ]
        cards = client.get("/v1/models").json()["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [
            ("base", None),
            ("one", "base"),
            ("two", "base"),
        ]
        assert client.get("/v1/models/two").json()["id"] == "two"
        error_of(client.post("/v1/completions", json=BODY | {"model": "three"}), 404)
        for name in ("default", "__base__", "../one"):
            error_of(client.post("/v1/completions", json=BODY | {"model": name}), 404)
    assert hf_paged.stats(model).fallback_calls == {}
    hf_paged.disable(model)


def test_the_name_of_a_peft_model_is_the_model_with_its_adapter(checkpoints: Path, tokenizer: Any) -> None:
    model = peft.PeftModel.from_pretrained(demo_model("llama"), checkpoints / "one").eval()
    with running(model, tokenizer, model_names=("tuned",)) as server, server.client() as client:
        assert text(client, "tuned") == expected(checkpoints / "one", tokenizer)
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tuned"]
    hf_paged.disable(model)


def load(client: httpx.Client, name: str, path: str, **more: Any) -> httpx.Response:
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path} | more)


def test_adapters_come_and_go_at_run_time(dynamic: Running, checkpoints: Path, tokenizer: Any) -> None:
    base, one = expected(None, tokenizer), expected(checkpoints / "one", tokenizer)
    two = expected(checkpoints / "nested" / "two", tokenizer)
    with dynamic.client() as client:
        assert text(client, "base") == base
        response = load(client, "mine", "one")
        assert response.is_success, response.text
        assert "'mine' added" in response.text
        assert (text(client, "mine"), text(client, "base")) == (one, base)
        error_of(load(client, "mine", "nested/two"), 400)
        # Other weights under the name: what was cached of the old ones is not used.
        assert load(client, "mine", "nested/two", load_inplace=True).is_success
        assert (text(client, "mine"), text(client, "base")) == (two, base)
        assert load(client, "other", "one").is_success
        assert "as many as may be" in error_of(load(client, "third", "one"), 400)["message"]
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).is_success
        error_of(client.post("/v1/completions", json=BODY | {"model": "mine"}), 404)
        error_of(client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}), 404)
        error_of(client.post("/v1/unload_lora_adapter", json={"lora_name": "base"}), 404)
        assert text(client, "other") == one


def test_a_request_that_runs_keeps_its_adapter_until_it_ends(
    dynamic: Running, checkpoints: Path, tokenizer: Any
) -> None:
    with dynamic.client() as client, ThreadPoolExecutor(1) as threads:
        assert load(client, "mine", "one").is_success
        body = LONG | {"model": "mine", "max_tokens": 200}
        alone = client.post("/v1/completions", json=body).json()["choices"]
        meanwhile = threads.submit(client.post, "/v1/completions", json=body)
        wait_for(lambda: dynamic.state.served.engine.stats().running == 1)
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).is_success
        assert meanwhile.result(30).json()["choices"] == alone


@pytest.mark.parametrize(
    "path",
    [
        "nothing",
        "",
        ".",
        "..",
        "../outside",
        "one/../../x",
        "~",
        "~root",
        "/etc",
        "/",
        "one\0",
        "link",
        "linked-weights",
        "pickle",
        "wide",
        "not-numbers",
        "other-base",
        "bad-config",
        "one/adapter_config.json",
        "http://127.0.0.1/one",
        "file:one",
        "some-org/some-adapter",
        "x" * 1025,
    ],
)
def test_nothing_else_is_loaded(dynamic: Running, path: str, tokenizer: Any) -> None:
    with dynamic.client() as client:
        before = text(client, "base")
        error = error_of(load(client, "mine", path), 400)
        assert error["param"] == "lora_path"
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["base"]
        assert text(client, "base") == before


@pytest.mark.parametrize("name", ["base", "", "__base__", "a/b", "a.b", "..", "x" * 129, "hf_paged_trial"])
def test_names_that_cannot_be(dynamic: Running, name: str) -> None:
    with dynamic.client() as client:
        error_of(load(client, name, "one"), 400)
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["base"]


def test_an_absolute_path_below_the_root_is_refused_too(dynamic: Running, checkpoints: Path) -> None:
    with dynamic.client() as client:
        assert load(client, "mine", str(checkpoints / "one")).status_code == 400


def test_adapters_that_load_while_requests_run(dynamic: Running, checkpoints: Path, tokenizer: Any) -> None:
    base = expected(None, tokenizer)
    with dynamic.client() as client, ThreadPoolExecutor(6) as threads:
        texts = [threads.submit(text, client, "base") for _ in range(12)]
        for i in range(4):
            assert load(client, "mine", ("one", "nested/two")[i % 2], load_inplace=True).is_success
            texts += [threads.submit(text, client, "base") for _ in range(6)]
        assert {done.result(60) for done in texts} == {base}
    assert json.loads((checkpoints / "one" / "adapter_config.json").read_text())["r"] == 4
    start(dynamic, LONG).close()
