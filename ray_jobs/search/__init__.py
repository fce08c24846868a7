"""What `ray_jobs.tune` searches: the space, its trials, the results."""
