"""The flow as Ray jobs: one module a stage, and the pipeline of them all."""
