"""Transaction scripts, one file per noun. The caller owns the transaction; nothing here commits."""
