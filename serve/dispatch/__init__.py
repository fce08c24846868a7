"""The dispatcher: jobs on storage, whose turn it is, and what replicas are given to make."""
