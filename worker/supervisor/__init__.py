"""The supervisor of one GPU: claims jobs, keeps their leases, watches the trainer. It never loads torch."""
