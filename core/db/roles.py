"""The database's roles. All but the owner are made by migrations, and belong to the whole server, as roles do.

| role | who | sees |
|---|---|---|
| the owner | whoever installs names it, for `espalier` commands | what policies show: they bind it |
| `espalier_api`, `_worker`, `_schedule` | log in as the processes that serve | what each is granted |
| `espalier_scaler` | logs in for an autoscaler | `pool_demand` |
| `espalier_operator` | the owner and the API become it | settings of tenants, keys, the audit log |
| `espalier_outlook` | owns functions and views | the columns that those sum up |
| `espalier_auditor` | the owner becomes it to check the promises | every row, to read |
| `espalier_backup` | `pg_dump` becomes it | every row and every sequence, to read |
"""

from __future__ import annotations

SERVING = ("espalier_api", "espalier_worker", "espalier_schedule")
OPERATOR = "espalier_operator"
AUDITOR = "espalier_auditor"
BACKUP = "espalier_backup"
ROLES = (*SERVING, "espalier_scaler", OPERATOR, "espalier_outlook", AUDITOR, BACKUP)
