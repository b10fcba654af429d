"""The clock beside the workers: wakes pools, expires leases, deletes what is over. It holds no torch."""
