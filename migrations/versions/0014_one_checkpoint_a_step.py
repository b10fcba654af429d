"""A step of a job has one checkpoint: the first that was published, even if a later attempt repeats the step."""

from alembic import op

from migrations.forced import unforced

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

_OLD = "uq_checkpoints_job_id_lease_token_step"
_NEW = "uq_checkpoints_job_id_step"


def upgrade() -> None:
    with unforced():
        op.execute(
            "delete from checkpoints c using checkpoints earlier where earlier.job_id = c.job_id"
            " and earlier.step = c.step and earlier.lease_token < c.lease_token"
        )
    op.drop_constraint(op.f(_OLD), "checkpoints")
    op.create_unique_constraint(op.f(_NEW), "checkpoints", ["job_id", "step"])
    op.execute("revoke delete on checkpoints from espalier_worker")


def downgrade() -> None:
    op.execute("grant delete on checkpoints to espalier_worker")
    op.drop_constraint(op.f(_NEW), "checkpoints")
    op.create_unique_constraint(op.f(_OLD), "checkpoints", ["job_id", "lease_token", "step"])
