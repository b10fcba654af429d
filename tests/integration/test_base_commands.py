"""`espalier base-models`: an operator learns that a base cannot be used before any tenant's job fails on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, update
from typer.testing import CliRunner, Result

from cli.base_files import BaseDescription, BaseFilesError, describe_base, find_license
from cli.main import app
from core.db.models import BaseModelRow, BaseTokenizer
from core.db.session import service_transaction
from core.domain.bases import BaseModelSource, Registry
from core.domain.workers import WorkerFacts
from core.services.registry import register_base_model, sync_base_models
from core.services.workers import record_worker
from local.binaries import find_smollm2
from local.servers import ServerAddresses
from tests.databases import Database
from tests.factories.bases import BASE_MODEL, make_entry
from tests.factories.tiny_bases import write_tiny_base
from tests.processes import storage_settings
from tests.sessions import any_role_transaction

ADDED = "acme-labs/added"
Espalier = Callable[..., Result]


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base_dir(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture
def espalier(database: Database, servers: ServerAddresses, tmp_path: Path) -> Espalier:
    env = {
        "ESPALIER_OWNER_DATABASE_URL": database.owner_url,
        **storage_settings(servers.storage),
        "ESPALIER_TRAINER_THREADS": "1",
    }

    def run(*words: str | Path) -> Result:
        argv = ["base-models", *map(str, words), "--data-dir", str(tmp_path / "data")]
        return CliRunner().invoke(app, argv, env=env, catch_exceptions=False)

    return run


def row_of(owner: Engine, base_model_id: str) -> BaseModelRow:
    with service_transaction(owner) as session:
        return session.get_one(BaseModelRow, base_model_id)


def test_a_base_is_added_from_its_own_files_loaded_once_and_its_tokenizer_kept(
    espalier: Espalier, owner: Engine, base_dir: Path
) -> None:
    done = espalier("add", ADDED, "--source", f"path:{base_dir}", "--quantization", "nf4")
    assert done.exit_code == 0, done.output
    assert f"{ADDED} is usable" in done.output
    assert f"No worker alive serves {ADDED}@none" in done.output
    row = row_of(owner, ADDED)
    assert (row.state, row.dtype, row.max_seq_len) == ("usable", "float32", 512)
    assert set(row.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert str(row.checked_by).startswith("cli:")
    with service_transaction(owner) as session:
        assert session.get(BaseTokenizer, ADDED) is not None


def test_a_bases_licence_is_its_cards_unless_the_operator_names_one(
    espalier: Espalier, owner: Engine, base_dir: Path
) -> None:
    all_given = ("--max-seq-len", "64", "--dtype", "float32", "--target-module", "q_proj")
    assert "licence: unknown" in espalier("add", ADDED, "--source", f"path:{base_dir}", *all_given).output
    assert row_of(owner, ADDED).license is None
    (base_dir / "README.md").write_text("---\ntags: [x]\nlicense: mit\n---\n# A base\n", encoding="utf-8")
    assert "licence: mit" in espalier("add", ADDED, "--source", f"path:{base_dir}", *all_given).output
    assert row_of(owner, ADDED).license == "mit"
    espalier("add", ADDED, "--source", f"path:{base_dir}", "--license", "llama3.2")
    assert row_of(owner, ADDED).license == "llama3.2"
    done = espalier("add", ADDED, "--source", f"path:{base_dir}", "--license", "mit\n---")
    assert (done.exit_code, row_of(owner, ADDED).license) == (1, "llama3.2")


@pytest.mark.parametrize(
    "card",
    ["", "license: mit", "---\nlicense: [\n---\n", "---\nlicense: [mit]\n---\n", "---\nlicense: |\n  a\n  b\n---\n"],
)
def test_a_card_that_names_no_licence_names_none(tmp_path: Path, card: str) -> None:
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert find_license(BaseModelSource(kind="path", location=str(tmp_path))) is None


def test_a_licence_is_in_a_gguf_files_head(tmp_path: Path) -> None:
    assert find_license(BaseModelSource(kind="gguf", location=str(find_smollm2()))) == "apache-2.0"
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(find_smollm2().read_bytes()[:200])
    assert find_license(BaseModelSource(kind="gguf", location=str(cut))) is None


def test_a_base_whose_targets_are_wrong_is_registered_as_unusable_and_why_is_said(
    espalier: Espalier, owner: Engine, base_dir: Path
) -> None:
    done = espalier("add", "acme-labs/wrong", "--source", f"path:{base_dir}", "--target-module", "c_attn")
    assert done.exit_code == 1
    assert "acme-labs/wrong is unusable, because The registry lists target_modules c_attn" in done.output
    assert row_of(owner, "acme-labs/wrong").state == "unusable"
    assert "acme-labs/wrong is unusable, because" in espalier("list").output


def test_what_its_files_say_cannot_be_trained_is_not_registered(
    espalier: Espalier, owner: Engine, base_dir: Path, tmp_path: Path
) -> None:
    config = base_dir / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "gpt2"}))
    for source, reason in (
        (f"path:{base_dir}", "Models of type 'gpt2' cannot be fused"),
        (f"path:{tmp_path}/nowhere", "No such file"),
        ("hub:acme/none@0123", "No such file"),
        (f"gguf:{config}", "no GGUF file"),
    ):
        done = espalier("add", "acme-labs/never", "--source", source)
        assert (done.exit_code, reason in done.output) == (1, True), done.output
    assert espalier("add", "acme-labs/never", "--source", "ftp:x").exit_code == 2
    with service_transaction(owner) as session:
        assert session.get(BaseModelRow, "acme-labs/never") is None


def test_check_finds_that_a_base_has_gone_and_that_it_is_back(
    espalier: Espalier, owner: Engine, tiny_base: Path, tmp_path: Path
) -> None:
    with any_role_transaction(owner) as session:
        register_base_model(session, make_entry(tmp_path / "moved"), is_by_hand=False)
    done = espalier("check", BASE_MODEL)
    assert (done.exit_code, row_of(owner, BASE_MODEL).state) == (1, "unusable"), done.output
    assert f"because There is no base model at {tmp_path}/moved" in done.output
    shutil.copytree(tiny_base, tmp_path / "moved")
    done = espalier("check", BASE_MODEL, "--quantization", "nf4")
    assert (done.exit_code, row_of(owner, BASE_MODEL).state) == (0, "usable"), done.output
    assert espalier("check", "nobody/nothing").exit_code == 1
    assert espalier("check", BASE_MODEL, "--quantization", "int3").exit_code == 2


def test_what_a_worker_cannot_load_is_listed_with_its_reason(espalier: Espalier, owner: Engine) -> None:
    pool = f"{BASE_MODEL}@none"
    with service_transaction(owner) as session:
        facts = WorkerFacts("small", (pool,), "idle", refusals={pool: "It has too little memory."})
        record_worker(session, facts, alive_seconds=60, is_start=True)
    assert f"Worker small cannot load {pool}: It has too little memory." in espalier("list").output


def test_a_base_added_by_hand_is_removed_by_hand_and_one_of_the_registrys_is_not(
    espalier: Espalier, owner: Engine, tmp_path: Path
) -> None:
    with any_role_transaction(owner) as session:
        entry = make_entry(tmp_path).model_copy(update={"id": "acme-labs/brief"})
        register_base_model(session, entry, is_by_hand=True)
        register_base_model(session, make_entry(tmp_path), is_by_hand=False)
        sync_base_models(session, Registry(base_models=(make_entry(tmp_path),)))
    assert row_of(owner, "acme-labs/brief").is_in_registry
    assert espalier("remove", "acme-labs/brief").exit_code == 0
    assert not row_of(owner, "acme-labs/brief").is_in_registry
    refused = espalier("remove", BASE_MODEL)
    assert (refused.exit_code, "stands in the registry's file" in refused.output) == (1, True)
    assert row_of(owner, BASE_MODEL).is_in_registry


def test_what_was_found_of_a_base_stands_until_its_entry_changes(owner: Engine, tmp_path: Path) -> None:
    with any_role_transaction(owner) as session:
        register_base_model(session, make_entry(tmp_path), is_by_hand=False)
        found = {"state": "unusable", "state_reason": "It is broken.", "state_since": func.now(), "checked_by": "w"}
        session.execute(update(BaseModelRow).where(BaseModelRow.id == BASE_MODEL).values(found))
    since = row_of(owner, BASE_MODEL).state_since
    with any_role_transaction(owner) as session:
        sync_base_models(session, Registry(base_models=(make_entry(tmp_path, slots=3),)))
    row = row_of(owner, BASE_MODEL)
    assert (row.slots, row.state, row.state_reason, row.state_since) == (3, "unusable", "It is broken.", since)
    with any_role_transaction(owner) as session:
        sync_base_models(session, Registry(base_models=(make_entry(tmp_path, dtype="bfloat16"),)))
    row = row_of(owner, BASE_MODEL)
    assert (row.state, row.state_reason, row.checked_by) == ("unchecked", None, None)
    assert row.state_since > since


def test_a_gguf_file_says_what_it_is_in_its_head_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    smollm2 = find_smollm2()
    source = BaseModelSource(kind="gguf", location=str(smollm2))
    assert describe_base(source) == BaseDescription("llama", 8192, "bfloat16")
    cut = tmp_path / "cut.gguf"
    with smollm2.open("rb") as whole:
        cut.write_bytes(whole.read(200))
    with pytest.raises(BaseFilesError, match=r"cut\.gguf"):
        describe_base(BaseModelSource(kind="gguf", location=str(cut)))
