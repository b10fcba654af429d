"""The schedule: wakes pools, expires leases, deletes what is over. It never loads torch."""
