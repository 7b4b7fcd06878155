"""`jaxlora adapters` against a running server, and `jaxlora import` into a store."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import openai
import pytest
from adapters_world import BASE_FOLDER, adapter_files, answer, seeded, upload, write_files, zip_of
from peft_world import plain_tensors
from typer.testing import CliRunner

from jaxlora.peft.export import read_stored
from jaxlora.storage.adapter_store import AdapterStore
from serve.cli import main as cli

pytest_plugins = ["adapters_fixtures"]


@pytest.fixture
def run(shelf, monkeypatch):
    """A command's (exit code, stdout, stderr), asked with a tenant's key unless `who` says otherwise."""
    monkeypatch.setattr(cli, "check_neighbours", lambda home: None)

    def invoke(*arguments: str, who: str = "acme"):
        environment = {"COLUMNS": "200", "NO_COLOR": "1", "JAXLORA_KEY": who}
        result = CliRunner(env=environment).invoke(cli.app, ["adapters", *arguments, "--url", shelf.url])
        return result.exit_code, result.stdout, result.stderr

    return invoke


def test_an_adapter_goes_up_is_listed_pinned_fetched_and_deleted(shelf, run, acme, bot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_files(tmp_path / "peft", seeded(1) | {"README.md": b"#"})
    (tmp_path / "two.zip").write_bytes(zip_of(seeded(2)))
    code, out, _ = run("upload", bot, str(folder))
    assert code == 0, out
    assert f"{bot}@1" in out
    assert "note: the file does not record its base" in out
    told = json.loads(run("upload", bot, "two.zip", "--json")[1])
    assert (told["version"], told["tenant"]) == (2, "acme")
    listed = [json.loads(text) for text in run("list", "--json")[1].splitlines()]
    assert [(e["id"], e["version"], e["rank"]) for e in listed] == [(bot, 2, 2)]
    assert run("list", "--prefix", "nobody")[1] == ""
    assert [text.split()[0] for text in run("versions", bot)[1].splitlines()] == [f"{bot}@2", f"{bot}@1"]
    assert run("pin", bot)[0] == 2
    assert run("pin", f"acme/{bot}", who="root")[1] == f"pinned acme/{bot}\n"
    assert "pinned" in run("list")[1]
    assert run("unpin", f"acme/{bot}", who="root")[0] == 0
    assert "pinned" not in run("list")[1]
    code, out, _ = run("download", f"{bot}@1")
    assert code == 0
    with zipfile.ZipFile(tmp_path / f"{bot}-1.zip") as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
    written = sizes["adapter_model.safetensors"] + sizes["adapter_config.json"]
    assert out.startswith(f"wrote {bot}@1, version 1, into {bot}-1.zip; trainable params: 448 || all params: ")
    assert out.endswith(f" || bytes: {written:,}\n")
    code, _, error = run("download", f"{bot}@1")
    assert (code, error) == (2, f"jaxlora: {bot}-1.zip exists; name another file with --out\n")
    assert json.loads(run("delete", f"{bot}@2", "--json")[1])["deleted"] is True
    assert run("delete", bot)[1] == f"deleted {bot}\n"
    assert run("versions", bot)[0] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["peft", "two.zip", f"{bot}-1.zip"])


def test_a_folder_of_the_server_is_loaded_and_unloaded(shelf, run, root, bot):
    folder = str(write_files(shelf.root / bot, seeded(1)))
    assert run("load", bot, folder)[2].startswith("jaxlora: loading from a folder of the server needs a key of")
    assert run("load", bot, folder, who="root")[1] == f"Success: LoRA adapter '{bot}' added successfully.\n"
    first = answer(root, bot)
    code, _, error = run("load", bot, folder, who="root")
    assert code == 2
    assert "has already been loaded" in error
    write_files(shelf.root / bot, seeded(2))
    assert run("load", bot, folder, "--in-place", who="root")[0] == 0
    assert answer(root, bot) != first
    assert run("unload", bot, who="root")[1] == f"Success: LoRA adapter '{bot}' removed successfully.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("upload", "x", "nowhere"), "nowhere is no PEFT folder and no archive of one"),
        (("upload", "../x", "bad.zip"), "tenant must be 1 to 64 letters"),
        (("upload", "x", "bad.zip"), "the upload is no archive that is read here"),
        (("versions", "../../etc/passwd"), "'../../etc/passwd' is no name of an adapter"),
        (("download", "nobody"), "The model `nobody` does not exist."),
    ],
    ids=["no path", "no name", "no archive", "no adapter", "nothing to fetch"],
)
def test_what_is_wrong_is_one_line(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.zip").write_bytes(b"hello")
    code, _, error = run(*arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_an_adapter_that_does_not_fit_is_one_sentence_and_under_verbose_every_mistake(shelf, run, acme, tmp_path):
    """The wire carries both: `message` is the sentence, `details` are the mistakes."""
    config = {"base_model_name_or_path": "Qwen/Qwen3-0.6B"}
    tensors = {k: np.zeros([1024 if n == 32 else n for n in v.shape], v.dtype) for k, v in plain_tensors().items()}
    files = adapter_files(tensors=tensors, **config)
    sentence = (
        "adapter refused: it was made for Qwen3-0.6B (hidden 1024), the base here is owner/tiny (hidden 32); "
        "serve it over its own base"
    )
    error = upload(acme, "x", files).json()["error"]
    assert (error["message"], error["code"], error["param"]) == (sentence, "base_mismatch", None)
    folder = str(write_files(tmp_path / "peft", files))
    short, long = (run("upload", "x", folder, *more) for more in ([], ["--verbose"]))
    assert short == (2, "", f"jaxlora: {sentence} (--verbose lists all {len(error['details'])} mistakes)\n")
    assert long == (2, "", "\n  ".join([f"jaxlora: {sentence}", *error["details"]]) + "\n")
    with pytest.raises(openai.BadRequestError, match="it was made for Qwen3") as caught:
        openai_client(shelf, "root").post(
            "/load_lora_adapter",
            body={"lora_name": "x", "lora_path": str(write_files(shelf.root / "misfit", files))},
            cast_to=str,
        )
    assert caught.value.body["details"] == error["details"]  # the official client keeps what it does not know


def openai_client(shelf, who):
    return openai.OpenAI(base_url=shelf.url + "/v1", api_key=who, max_retries=0)


def test_a_server_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(cli, "check_neighbours", lambda home: None)
    result = CliRunner(env={}).invoke(cli.app, ["adapters", "list", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 2
    assert "no server answers on http://127.0.0.1:9" in result.stderr


COMMANDS = ["list", "versions", "upload", "download", "delete", "pin", "unpin", "load", "unload"]


@pytest.mark.parametrize("command", [*(f"adapters {c}" for c in COMMANDS), "import"])
def test_each_help_shows_an_example(command):
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(cli.app, [*command.split(), "--help"])
    assert f"Example:  jaxlora {command}" in result.output


# ---- import


@pytest.fixture
def bring(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "check_neighbours", lambda home: None)

    def invoke(path, name: str = "support", *more: str):
        options = ["--name", name, "--adapters", str(tmp_path / "store"), "--model", str(BASE_FOLDER), *more]
        return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["import", str(path), *options])

    return invoke


def test_a_folder_and_an_archive_become_versions_of_a_store(bring, tmp_path):
    result = bring(write_files(tmp_path / "peft", adapter_files()))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "imported local/support@1: 4 modules, 448 parameters"
    (tmp_path / "a.tgz").write_bytes(zip_of(seeded(2)))
    assert bring(tmp_path / "a.tgz").exit_code == 0
    assert bring(tmp_path / "a.tgz", "acme/support").exit_code == 0
    assert str(read_stored(tmp_path / "store", "local/support").ref) == "local/support@2"
    assert str(read_stored(tmp_path / "store", "acme/support").ref) == "acme/support@1"


def test_an_import_that_fails_leaves_the_store_as_it_was(bring, tmp_path):
    bad = bring(write_files(tmp_path / "bad", adapter_files(use_dora=True)))
    assert bad.exit_code == 2
    assert bad.stderr == "jaxlora: adapter refused: DoRA adapters are not supported (use_dora)\n"
    assert not (tmp_path / "store").exists()
    good = write_files(tmp_path / "good", adapter_files())
    assert bring(good, "../x").exit_code == 2
    store = AdapterStore(tmp_path / "store", host_bytes=10**6)
    in_use = bring(good)
    store.close()
    assert in_use.exit_code == 2
    assert "is in use" in in_use.stderr
