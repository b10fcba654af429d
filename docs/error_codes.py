"""`python -m docs.error_codes`: print docs/errors.md, the page of every public error code.

A code is public and stable. A test compares this module with the code base: no code is missing here, and none is left
over.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

TENANT, OPERATOR, BOTH = "tenant", "operator", "tenant, operator"


@dataclass(frozen=True)
class Answer:
    """The code of an HTTP answer that is an error."""

    code: str
    status: str
    seen_by: str
    means: str
    do: str


@dataclass(frozen=True)
class JobFailure:
    """The code of a job or an attempt that failed. `next` is what the service does by itself."""

    code: str
    seen_by: str
    means: str
    next: str
    do: str


@dataclass(frozen=True)
class RowProblem:
    """The code of a row that the check of a file refuses. Its tenant sees it."""

    code: str
    means: str
    do: str


_WAIT = "Wait, then ask again; `retry-after` says how long."
_OPERATOR_MENDS = "The operator looks at the servers and the log."
ANSWERS = (
    Answer("base_model_unusable", "409", TENANT, "No worker can load this base.", "Ask the operator to mend it."),
    Answer("body_cut", "400", TENANT, "The connection ended before the body was complete.", "Send the request again."),
    Answer("body_stalled", "408", BOTH, "The body came too slowly.", "Send it faster, or in smaller requests."),
    Answer("checksum_mismatch", "400", TENANT, "The MD5 of the parts is another one.", "Check the order of the parts."),
    Answer("completions_busy", "503", TENANT, "Too many uploads are being completed.", _WAIT),
    Answer("conflict", "409", BOTH, "The object's state does not allow this.", "Read the message; change the request."),
    Answer("database_read_only", "503", OPERATOR, "`/readyz`: the database takes no writes.", _OPERATOR_MENDS),
    Answer("database_unavailable", "503", OPERATOR, "`/readyz`: the database does not answer.", _OPERATOR_MENDS),
    Answer("downloads_busy", "503", TENANT, "Too many downloads are under way.", _WAIT),
    Answer("file_in_use", "409", TENANT, "A job still needs the file.", "Cancel the job, or wait for its end."),
    Answer("file_not_found", "400", TENANT, "There is no such file.", "Check the id; upload the file."),
    Answer("header_stalled", "408", BOTH, "The header took too long.", "Send the request again."),
    Answer("header_too_large", "431", BOTH, "The header has too many fields or bytes.", "Send fewer headers."),
    Answer("http_error", "any other", BOTH, "The request breaks a rule of HTTP.", "Read the message."),
    Answer("idempotency_key_reused", "422", TENANT, "The key was used for another request.", "Use a new key."),
    Answer("insufficient_scope", "403", TENANT, "The API key lacks a scope.", "Use a key that has it."),
    Answer("internal_error", "500", BOTH, "The service has a bug.", "Tell the operator the `x-request-id`."),
    Answer(
        "invalid_api_key",
        "401",
        BOTH,
        "The API key is missing, unknown, expired or revoked.",
        "Send a valid bearer token.",
    ),
    Answer(
        "invalid_file", "400", TENANT, "The file did not pass its check.", "Read its `problems`; upload another one."
    ),
    Answer("invalid_request", "400", BOTH, "A field is wrong.", "Change the field that `param` names."),
    Answer("job_not_ended", "409", TENANT, "The job has not ended.", "Cancel it first."),
    Answer("line_too_long", "400 or 413", TENANT, "A line has too many bytes.", "Write one example a line; split it."),
    Answer("listings_busy", "503", TENANT, "Too many long lists are under way.", _WAIT),
    Answer("long_bodies_busy", "503", TENANT, "Too many slow bodies are being received.", _WAIT),
    Answer("malformed_request", "400", BOTH, "This is not HTTP.", "Check the client."),
    Answer("method_not_allowed", "405", BOTH, "The URL has no such method.", "Check the method."),
    Answer("model_in_use", "409", TENANT, "The checkpoint's job has not ended.", "Cancel the job, or wait."),
    Answer("model_not_found", "404", BOTH, "There is no such model.", "Look at `GET /v1/models`."),
    Answer("not_found", "404", BOTH, "There is no such thing for this caller.", "Check the id."),
    Answer("not_supported", "501", TENANT, "OpenAI's API has this call, but this service does not.", "Do without it."),
    Answer("nothing_to_learn", "400", TENANT, "No row has anything to learn.", "Give answers with weight 1."),
    Answer("organization_disabled", "403", TENANT, "The organization is disabled.", "Ask the operator."),
    Answer(
        "outlives_its_maker",
        "403",
        TENANT,
        "The key would expire after the one that made it.",
        "Choose an earlier time.",
    ),
    Answer("payload_too_large", "413", BOTH, "The body is too large.", "Send less, or use an upload in parts."),
    Answer("permission_denied", "403", TENANT, "Only the operator may do this.", "Ask the operator."),
    Answer("pool_not_found", "404", OPERATOR, "There is no such pool.", "Look at `espalier pools`."),
    Answer(
        "preview_limit", "400", TENANT, "The preview needs too much time or memory.", "Ask for fewer or shorter rows."
    ),
    Answer("previews_busy", "503", TENANT, "Too many previews are under way.", _WAIT),
    Answer(
        "queue_quota_exceeded",
        "429",
        TENANT,
        "The quota of queued and paused jobs is used up.",
        "Wait, or cancel a job.",
    ),
    Answer("rate_limit_exceeded", "429", TENANT, "The organization sends too many requests a minute.", _WAIT),
    Answer("read_only_key", "403", OPERATOR, "The operator's key may only read.", "Use a key that may write."),
    Answer("schema_too_old", "503", OPERATOR, "`/readyz`: the schema is too old.", "Run `espalier migrate`."),
    Answer("statement_timeout", "504", BOTH, "A statement took too long.", "Ask for less; do not just repeat it."),
    Answer(
        "storage_quota_exceeded", "403", TENANT, "The storage quota has no room for this.", "Delete files or models."
    ),
    Answer("storage_unavailable", "503", OPERATOR, "`/readyz`: the object store cannot be used.", _OPERATOR_MENDS),
    Answer(
        "template_refused", "400", TENANT, "The base's chat template refuses a row.", "Change the row; see the hint."
    ),
    Answer("tenant_deleted", "409", OPERATOR, "The tenant is deleted, and cannot come back.", "Make another tenant."),
    Answer("tenant_exists", "400", OPERATOR, "Another tenant has this slug.", "Choose another slug."),
    Answer("token_quota_exceeded", "400", TENANT, "The job may train too many tokens.", "Use fewer epochs or rows."),
    Answer(
        "tokenizer_unknown", "409", TENANT, "No worker has loaded the base yet.", "Try again when one has loaded it."
    ),
    Answer("too_many_completions", "429", TENANT, "You complete too many uploads at once.", "Wait for one to end."),
    Answer("too_many_connections", "503", BOTH, "Every connection is in use.", _WAIT),
    Answer("too_many_downloads", "429", TENANT, "You have too many downloads under way.", "Wait for one to end."),
    Answer("too_many_examples", "413", TENANT, "The file has too many examples.", "Split it."),
    Answer("too_many_listings", "429", TENANT, "You read too many long lists at once.", "Wait for one to end."),
    Answer("too_many_live_keys", "409", TENANT, "Too many keys are valid at once.", "Revoke one."),
    Answer("too_many_long_bodies", "429", TENANT, "You send too many slow bodies at once.", "Wait for one to end."),
    Answer("too_many_pipelined", "429", BOTH, "Too many requests were sent before their answers.", "Wait for answers."),
    Answer("too_many_previews", "429", TENANT, "You have too many previews under way.", "Wait for one to end."),
    Answer("too_many_streams", "429", TENANT, "Too many event streams are open.", "Close some."),
    Answer("too_many_uploads", "429", TENANT, "You have too many uploads under way.", "Wait for one to end."),
    Answer("unavailable", "503", BOTH, "A server that the request needs does not answer.", _WAIT),
    Answer("unknown_url", "404", BOTH, "There is no such URL.", "Check the URL; `/v1` is a part of it."),
    Answer("unsupported_integration", "400", TENANT, "Integrations are not supported.", "Leave them out."),
    Answer("unsupported_method", "400", TENANT, "This training method is not supported.", "Use `supervised`."),
    Answer("upload_completing", "409", TENANT, "Another request is completing the upload.", _WAIT),
    Answer("upload_not_pending", "409", TENANT, "The upload is completed, cancelled or expired.", "Begin another one."),
    Answer(
        "upload_size_mismatch",
        "400",
        TENANT,
        "The parts have more or fewer bytes than the upload.",
        "Add missing parts, or cancel it.",
    ),
    Answer("uploads_busy", "503", TENANT, "Too many uploads are under way.", _WAIT),
    Answer("url_too_long", "414", BOTH, "The URL is too long.", "Shorten it."),
    Answer("warm_start_unsupported", "400", TENANT, "A job cannot start from an adapter.", "Start from its base."),
)

_FAILS, _AGAIN, _UNCOUNTED = "fails", "another attempt", "another attempt; this one does not count"
_ALONE = "fails if the job was alone; else another attempt, alone"
_NOTHING = "Nothing."
_LOOK = "Nothing; the operator looks at the worker's log."
JOB_FAILURES = (
    JobFailure("adapter_invalid", BOTH, "The finished adapter did not pass its inspection.", _AGAIN, _LOOK),
    JobFailure("diverged", BOTH, "The training made numbers that are not finite.", _FAILS, "Lower the learning rate."),
    JobFailure("integrity", BOTH, "A stored object differs from what was written.", _AGAIN, _LOOK),
    JobFailure(
        "invalid_job", BOTH, "The job cannot be trained on this base.", _FAILS, "Change what the message names."
    ),
    JobFailure("invalid_training_data", BOTH, "A row cannot be trained on.", _FAILS, "Mend the line; see the message."),
    JobFailure("lease_lost", OPERATOR, "The worker is alive, but could not reach the database.", _UNCOUNTED, _NOTHING),
    JobFailure(
        "no_progress", BOTH, "The job was interrupted over 20 times without a new step.", _FAILS, "Submit again."
    ),
    JobFailure(
        "nothing_learned", BOTH, "The adapter changes nothing.", _FAILS, "Raise the learning rate; check the rows."
    ),
    JobFailure("oom_gpu", BOTH, "The job does not fit the device.", _FAILS, "Lower `max_seq_len`, rank or batch size."),
    JobFailure(
        "oom_host", BOTH, "The worker's host had too little memory.", _ALONE, "Submit a job that needs less memory."
    ),
    JobFailure("stalled", BOTH, "The training made no progress.", _ALONE, "Submit a smaller job; see the log."),
    JobFailure("storage_refused", BOTH, "The object store refused a file.", _AGAIN, _LOOK),
    JobFailure("storage_unavailable", BOTH, "The object store was away for too long.", _UNCOUNTED, _OPERATOR_MENDS),
    JobFailure(
        "storage_url_refused",
        OPERATOR,
        "The object store refused the signed URLs.",
        _UNCOUNTED,
        "Check clocks and the key.",
    ),
    JobFailure("trainer_crashed", BOTH, "The trainer process ended by itself.", _AGAIN, _LOOK),
    JobFailure("trainer_killed", BOTH, "The trainer process was killed.", _AGAIN, "The operator looks at its memory."),
    JobFailure("unrecordable", BOTH, "The database did not accept a report of the trainer.", _AGAIN, _LOOK),
    JobFailure("worker_disk", BOTH, "The worker's scratch disk is full or broken.", _AGAIN, "The operator makes room."),
    JobFailure("worker_lost", BOTH, "The worker died, or its host did.", _AGAIN, "The operator looks at the host."),
)

ROW_PROBLEMS = (
    RowProblem("bad_weight", "A weight is not 0 or 1, or is not in an answer.", "Use 0 or 1, or remove it."),
    RowProblem("bom_inside", "A byte order mark is inside the file.", "Put a line break there instead."),
    RowProblem("content_empty", "The content of an assistant message is empty.", "Add text, or remove the message."),
    RowProblem("content_not_text", "The content is not text.", "Give a string, or a list of text parts."),
    RowProblem("duplicate_field", "An object has a field twice.", "Keep one of them."),
    RowProblem("empty_line", "A line is empty.", "Remove it."),
    RowProblem(
        "foreign_format", "The file is CSV, Parquet, a JSON list or another format.", "Run the command in the hint."
    ),
    RowProblem("huge_integer", "An integer has too many digits.", "Remove it."),
    RowProblem("last_line_cut", "The file ends in the middle of a row.", "Upload the whole file."),
    RowProblem("messages_missing", "`messages` is missing, empty or not a list.", "Add the messages."),
    RowProblem("no_assistant", "There is no assistant message.", "Add the answer to learn."),
    RowProblem("no_examples", "The file has no examples.", "Write one JSON object on each line."),
    RowProblem("not_a_number", "NaN or Infinity is not JSON.", "Use a number or null."),
    RowProblem("not_an_object", "A line or a message is not a JSON object.", "See the hint for the form."),
    RowProblem("not_json", "The line is not JSON.", "See the hint for the column."),
    RowProblem("not_supported", "The row has a field of OpenAI's that is not supported.", "See the hint."),
    RowProblem("not_text", "The text has a NUL or half a surrogate pair.", "Remove it."),
    RowProblem("not_utf8", "A byte is not UTF-8.", "Save the file as UTF-8."),
    RowProblem("nothing_to_learn", "Every assistant weight is 0.", "Give one message weight 1."),
    RowProblem("template_refused", "The base's chat template refuses the row.", "See the hint."),
    RowProblem("too_deep", "The JSON is nested too deeply.", "Flatten it."),
    RowProblem("too_many_messages", "The row has too many messages.", "Split the conversation."),
    RowProblem("unknown_field", "A field is unknown.", "Remove it."),
    RowProblem("unknown_role", "A role is unknown.", "Use one that the hint names."),
)

# Codes that no client sees: the error is caught inside the process or only logged, or every raise names another code.
INTERNAL = (
    "base_model_refused",
    "base_model_unsupported",
    "busy",
    "engine_error",
    "error",
    "no_free_slot",
    "rate_limited",
    "stale_lease",
    "state_unreadable",
    "stopped",
    "trainer_error",
    "worker_unfit",
)

_HEAD = """# Error codes

<!-- Printed by `python -m docs.error_codes`. Change that module, and run `make errors`. -->

A code is stable: programs may compare it. A message may change: people read it. The reasons why a job *waits* are
not errors. Their codes are in [following jobs](following-jobs.md).
"""
_ANSWERS_HEAD = """
## HTTP answers

The body is OpenAI's: `{"error": {"message", "type", "param", "code"}}`. `param` names the field at fault. The header
`x-should-retry: false` tells OpenAI's clients that the same request would be refused again.
"""
_FAILURES_HEAD = """
## Failed jobs

A job's `error` is `{"code", "message", "param"}`. A fault of the job itself fails it at once. For any other fault there
is another attempt, three at most. [Operations](operations.md#stopping-losing-and-stalling) says which attempts count.
After each other attempt that fails, an event of the job says why. The code is in `attempts.error` and in the worker's
log.
"""
_PROBLEMS_HEAD = """
## File checks

The file object's `problems` have these codes, each with its line, its field and a hint. `espalier validate FILE` finds
the same ones before an upload. [Datasets](datasets.md) says what a row may hold.
"""


def render_page() -> str:
    """Return the page as it is kept in `docs/errors.md`."""
    answers = ((f"`{each.code}`", each.status, each.seen_by, each.means, each.do) for each in ANSWERS)
    failures = ((f"`{each.code}`", each.seen_by, each.means, each.next, each.do) for each in JOB_FAILURES)
    problems = ((f"`{each.code}`", each.means, each.do) for each in ROW_PROBLEMS)
    return "".join(
        (
            _HEAD,
            _ANSWERS_HEAD,
            _render_table(("code", "status", "who sees it", "means", "what to do"), answers),
            _FAILURES_HEAD,
            _render_table(("code", "who sees it", "means", "what the service does", "what to do"), failures),
            _PROBLEMS_HEAD,
            _render_table(("code", "means", "what to do"), problems),
        )
    )


def _render_table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = (columns, ("---",) * len(columns), *rows)
    return "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    sys.stdout.write(render_page())
