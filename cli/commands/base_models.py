"""`espalier base-models`: list, add, check and switch the base models of the registry."""

from __future__ import annotations

import os
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from sqlalchemy import Engine

from cli.base_files import BaseFilesError, describe_base, find_license
from cli.output import fail, fields_of, is_json, print_json, print_rows, say
from cli.owner import DEFAULT_DATA_DIR, DataDir, actor, operator_session, owner_engine
from cli.stores import find_storage
from cli.tables import Column
from core.db.models import BaseModelRow
from core.db.session import owner_transaction
from core.domain.bases import BaseModelEntry, BaseModelSource, BaseState
from core.domain.jobs import pool_name
from core.services import base_models as bases
from core.services import registry
from core.services.workers import Refusal, is_served, list_refusals
from core.settings import TrainerSettings
from core.storage import S3ObjectStore
from worker.supervisor.artifacts import publish_tokenizer
from worker.supervisor.loading import BaseUnusableError, TrainerStarter
from worker.supervisor.orders import order_base

base_models = typer.Typer(no_args_is_help=True, help="Base models of the registry.")
_COLUMNS = (
    "id",
    "state",
    Column("state_since", "since"),
    Column("checked_by", "by"),
    Column("quantizations", "quantized"),
    Column("max_seq_len", "length"),
    Column("is_enabled", "enabled"),
    Column("disabled_at", "disabled"),
)
_FIELDS = (
    "id",
    "state",
    "state_reason",
    "state_since",
    "checked_by",
    "quantizations",
    "max_seq_len",
)
Quantized = Annotated[str | None, typer.Option(help="Load it in this quantization.")]
Licensed = Annotated[str | None, typer.Option("--license", help="The weights' licence; what its files say by default.")]


@base_models.command("list")
def list_bases(data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Show the base models, which of them can be used, and why others cannot."""
    with operator_session(data_dir) as session:
        rows, refusals = bases.list_known_base_models(session), list_refusals(session)
    print_rows(_COLUMNS, (_describe(row, refusals) for row in rows))
    if is_json():
        return
    for row in rows:
        if row.state_reason is not None:
            say(f"{row.id} is unusable, because {row.state_reason}")
    for refusal in refusals:
        say(f"Worker {refusal.worker} cannot load {refusal.pool}: {refusal.reason}")


def _describe(row: BaseModelRow, refusals: tuple[Refusal, ...]) -> dict[str, Any]:
    of_base = [asdict(each) for each in refusals if each.pool.partition("@")[0] == row.id]
    switches = {"is_enabled": row.is_in_registry, "disabled_at": row.disabled_at}
    return {**fields_of(row, _FIELDS), **switches, "refusals": of_base}


@base_models.command("add")
def add_base(
    base_model_id: str,
    source: Annotated[str, typer.Option(help="path:DIRECTORY, gguf:FILE or hub:OWNER/NAME@COMMIT.")],
    quantization: Annotated[list[str] | None, typer.Option(help="Also allow this one, nf4; repeat it.")] = None,
    target_module: Annotated[list[str] | None, typer.Option(help="Repeat it; all linears by default.")] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="The model's own, at most a step's, by default.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; the model's own by default.")] = None,
    max_rank: int = 64,
    slots: int = 8,
    max_tokens_per_step: int = 4096,
    chat_template: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A Jinja file.")] = None,
    license_name: Licensed = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Register a base model, filled in from its own files, and check it."""
    given: dict[str, Any] = {
        "target_modules": target_module,
        "max_seq_len": max_seq_len,
        "dtype": dtype,
        "chat_template": chat_template.read_text(encoding="utf-8") if chat_template else None,
        "license": license_name,
    }
    registered: dict[str, Any] = {
        "id": base_model_id,
        "source": _parse_source(source),
        "quantizations": quantization or (),
        "max_rank": max_rank,
        "slots": slots,
        "max_tokens_per_step": max_tokens_per_step,
        **{name: value for name, value in given.items() if value},
    }
    entry = _complete(registered)
    with owner_engine(data_dir) as engine:
        with owner_transaction(engine, actor=actor()) as session:
            registry.register_base_model(session, entry, is_by_hand=True)
        _announce(entry)
        _check(engine, entry.id, quantization=None, data_dir=data_dir)


@base_models.command("check")
def check_base(base_model_id: str, quantization: Quantized = None, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Load a base model once as a worker does, and keep its tokenizer. Run it where the workers run, as their user."""
    with owner_engine(data_dir) as engine:
        _check(engine, base_model_id, quantization=quantization, data_dir=data_dir)


@base_models.command("remove")
def remove_base(base_model_id: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Take a base model that was added by hand out of the registry. Jobs that have been submitted go on."""
    with owner_engine(data_dir) as engine, owner_transaction(engine, actor=actor()) as session:
        registry.unregister_base_model(session, base_model_id)
    say(f"Removed {base_model_id}.", removed=base_model_id)


@base_models.command("disable")
def disable_base(base_model_id: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Refuse new jobs on a base model, whatever the registry says."""
    with operator_session(data_dir) as session:
        bases.switch_base_model(session, base_model_id, is_disabled=True)
    if is_json():
        print_json({"base_model": base_model_id, "is_disabled": True})


@base_models.command("enable")
def enable_base(base_model_id: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Take new jobs on a base model again."""
    with operator_session(data_dir) as session:
        bases.switch_base_model(session, base_model_id, is_disabled=False)
    if is_json():
        print_json({"base_model": base_model_id, "is_disabled": False})


def _parse_source(text: str) -> BaseModelSource:
    kind, _, location = text.partition(":")
    revision = ""
    if kind == "hub":
        location, _, revision = location.partition("@")
    else:
        location = str(Path(location).resolve()) if location else ""
    try:
        return BaseModelSource.model_validate({"kind": kind, "location": location, "revision": revision})
    except ValidationError as error:
        raise typer.BadParameter("It is path:DIRECTORY, gguf:FILE or hub:OWNER/NAME@COMMIT.") from error


def _complete(registered: dict[str, Any]) -> BaseModelEntry:
    """Fill in missing options from the base's own files. If all options are given, the files are not needed."""
    try:
        if not {"target_modules", "max_seq_len", "dtype"} <= set(registered):
            found = describe_base(registered["source"])
            registered = {
                "target_modules": found.linears,
                "max_seq_len": min(found.max_positions, registered["max_tokens_per_step"]),
                "dtype": found.dtype,
                **registered,
            }
        return BaseModelEntry.model_validate({"license": find_license(registered["source"]), **registered})
    except (BaseFilesError, OSError, ValidationError) as error:
        fail(f"{error} Nothing was registered. Give --target-module, --max-seq-len and --dtype for files elsewhere.")


def _announce(entry: BaseModelEntry) -> None:
    if is_json():
        return
    say(f"Registered {entry.id}: {', '.join(entry.target_modules)}; max_seq_len {entry.max_seq_len}.")
    say(f"Its licence: {entry.license or 'unknown; --license names it'}.")


def _check(engine: Engine, base_model_id: str, *, quantization: str | None, data_dir: Path) -> None:
    with owner_transaction(engine, actor=actor()) as session:
        base = bases.get_known_base_model(session, base_model_id)
    if quantization not in (None, *base.quantizations):
        raise typer.BadParameter(f"{base.id} is not registered with {quantization!r}.")
    try:
        seconds = _load_once(engine, base, quantization=quantization, data_dir=data_dir)
    except BaseUnusableError as error:
        if error.is_worker_fault:
            fail(f"This machine cannot load {base.id}: {error.reason} Whether another can is not known.")
        _record(engine, base, BaseState.UNUSABLE, reason=error.reason)
        fail(f"{base.id} is unusable, because {error.reason}")
    _record(engine, base, BaseState.USABLE)
    pool = pool_name(base.id, quantization)
    with owner_transaction(engine, actor=actor()) as session:
        has_worker = is_served(session, pool)
    facts: dict[str, Any] = {
        "base_model": base.id,
        "state": "usable",
        "load_seconds": round(seconds, 1),
        "is_served": has_worker,
    }
    say(f"{base.id} is usable: loaded in {seconds:.1f} s, its tokenizer is kept.", **facts)
    if not has_worker and not is_json():
        say(f"No worker alive serves {pool}: name it in ESPALIER_WORKER_POOLS, or start the stack again.")


def _load_once(engine: Engine, base: BaseModelRow, *, quantization: str | None, data_dir: Path) -> float:
    """Load a base once in a trainer of its own, store its tokenizer, and end the trainer. Raises BaseUnusableError."""
    own = {} if os.environ.get("ESPALIER_CACHE_DIR") else {"cache_dir": data_dir / "cache"}
    settings = TrainerSettings.model_validate(TrainerSettings().model_dump() | own)
    starter = TrainerStarter(
        threads=settings.trainer_threads,
        scratch_dir=settings.scratch_dir,
        patience_seconds=settings.trainer_start_seconds,
        stop_requested=threading.Event(),
    )
    inspected = starter.inspect(order_base(base, pool_name(base.id, quantization), settings=settings))
    assert inspected is not None
    loaded = starter.load_weights(inspected.trainer)
    assert loaded is not None
    inspected.trainer.close()
    publish_tokenizer(engine, S3ObjectStore(find_storage(data_dir)), base.id, inspected.tokenizer_path)
    return loaded.seconds


def _record(engine: Engine, base: BaseModelRow, state: BaseState, *, reason: str | None = None) -> None:
    with owner_transaction(engine, actor=actor()) as session:
        bases.record_state(session, base.id, state=state, reason=reason, by=actor())
