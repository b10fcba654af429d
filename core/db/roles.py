"""The database's roles. Migrations make all of them except the owner. They belong to the whole server, as roles do.

| role | used by | can see |
|---|---|---|
| the owner | `espalier` commands; its name is chosen at the installation | what policies show: they bind it too |
| `espalier_api`, `_worker`, `_schedule` | the serving processes, which log in with them | what each is granted |
| `espalier_scaler` | an autoscaler, which logs in with it | `pool_demand` |
| `espalier_operator` | the owner and the API, which become it | settings of tenants, keys, the audit log |
| `espalier_outlook` | owns functions and views | the columns that these sum up |
| `espalier_auditor` | the owner, to check the promises | every row, to read |
| `espalier_backup` | `pg_dump` | every row and every sequence, to read |
"""

from __future__ import annotations

SERVING = ("espalier_api", "espalier_worker", "espalier_schedule")
OPERATOR = "espalier_operator"
AUDITOR = "espalier_auditor"
BACKUP = "espalier_backup"
ROLES = (*SERVING, "espalier_scaler", OPERATOR, "espalier_outlook", AUDITOR, BACKUP)
