"""/v1/files/{id}/preview: rows as tokens with their loss mask, as the chosen base model sees them."""

from __future__ import annotations

from fastapi import Depends

from api.admission import PREVIEWS
from api.dependencies import Caller, Database, Previews, needs
from api.parameters import FileId
from api.previews import PreviewOrder
from api.routers import TenantRouter
from api.schemas.previews import CreatePreview, PreviewObject
from core.db.session import tenant_transaction
from core.domain.api_keys import Scope
from core.domain.errors import InvalidRequestError
from core.domain.ids import IdKind, parse_id
from core.services.base_models import find_tokenizer, get_base_model
from core.services.files import get_file

router = TenantRouter("/v1/files", tag="files")


@router.post(
    "/{file_id}/preview", summary="Preview a file's rows", dependencies=[needs(Scope.DOWNLOAD), Depends(PREVIEWS)]
)
def create_preview(
    previews: Previews, database: Database, caller: Caller, file_id: FileId, body: CreatePreview
) -> PreviewObject:
    """Show rows as tokens with the loss mask, as the base model will be trained on them, and count tokens."""
    # No transaction is open while the child renders.
    with tenant_transaction(database, caller.tenant_id, actor=caller.actor) as session:
        file = get_file(session, caller.tenant_id, file_id=parse_id(IdKind.FILE, file_id))
        base = get_base_model(session, caller.tenant_id, base_model_id=body.model)
        tokenizer_key = find_tokenizer(session, base.id)
    if file.purpose != "fine-tune":
        raise InvalidRequestError(f"The file's purpose is {file.purpose!r}; it has no rows to train on.")
    max_seq_len = body.max_seq_len or base.max_seq_len
    if max_seq_len > base.max_seq_len:
        message = f"max_seq_len is {max_seq_len}; {base.id} takes at most {base.max_seq_len}."
        raise InvalidRequestError(message, param="max_seq_len")
    order = PreviewOrder(file.object_key, tokenizer_key, body.from_line, body.rows, max_seq_len)
    made = previews.preview(order)
    return PreviewObject.of(made.report, is_whole_file=made.is_whole_file, file_id=file_id, model=base.id)
