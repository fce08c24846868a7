"""The dispatcher: jobs on storage, their turns, and the leases that replicas are given."""
